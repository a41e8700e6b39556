"""Readers: each format says the same rows, and what was chosen is said."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.data.prompts import content_hash, normalise, prompt_id
from holdfast.data.requests import read_questions
from holdfast.data.suites import Reading, read_suite
from holdfast.errors import PromptFileError
from prompt_files import fails, read, texts, write

ROWS = [
    {"id": "1", "goal": "Name a colour, please.", "note": "x"},
    {"id": "2", "goal": 'Say "hello"\nand wave.', "note": ""},
    {"id": "3", "goal": "Zähle bis drei – 一二三", "note": "y"},
]
TEXTS = [row["goal"] for row in ROWS]


def csv_of(rows: list[dict[str, str]]) -> str:
    def quote(cell: str) -> str:
        return '"' + cell.replace('"', '""') + '"'

    lines = [",".join(rows[0])]
    lines += [",".join(quote(cell) for cell in row.values()) for row in rows]
    return "\r\n".join(lines) + "\r\n"


def parquet_of(rows: list[dict], folder: Path) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return (folder / "rows.parquet").read_bytes()


@pytest.mark.parametrize(
    "name",
    ["a.csv", "bom.csv", "a.tsv", "a.json", "columns.json", "a.jsonl", "a.parquet"],
)
def test_every_table_format_says_the_same_rows(tmp_path, name):
    content: str | bytes = {
        "a.csv": csv_of(ROWS),
        "bom.csv": "\ufeff" + csv_of(ROWS),
        "a.tsv": csv_of(ROWS).replace('","', '"\t"').replace("id,goal,", "id\tgoal\t"),
        "a.json": json.dumps(ROWS, indent=1),
        "columns.json": json.dumps({k: [r[k] for r in ROWS] for k in ROWS[0]}),
        "a.jsonl": "\n".join(json.dumps(row) for row in ROWS) + "\n\n",
        "a.parquet": b"" if name != "a.parquet" else parquet_of(ROWS, tmp_path),
    }[name]
    file = read(write(tmp_path, name, content))
    assert texts(file) == TEXTS
    assert file.column == "goal"
    assert file.columns == ("id", "goal", "note")
    assert (file.n_rows, file.n_duplicates) == (3, 0)
    assert "column `goal` was chosen out of `id`, `goal`, `note`." in file.notes


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl"])
def test_formats_without_columns_give_one_prompt_a_text(tmp_path, name):
    said = ["Name a colour.", " Count\u2028to three.", "Wave."]
    content = {
        "a.txt": "\ufeff" + "\r\n\r\n".join(said),
        "a.json": json.dumps(said),
        "a.jsonl": "\n".join(map(json.dumps, said)),
    }[name]
    file = read(write(tmp_path, name, content))
    assert texts(file) == said
    assert (file.column, file.columns, file.notes) == (None, (), ())
    fails(str(tmp_path / name), "without columns", column="goal")


@pytest.mark.parametrize("value", [["First.", "Second."], '["First.", "Second."]'])
def test_turns_are_a_conversation_of_which_the_last_turn_is_judged(tmp_path, value):
    row = {"turns": value, "category": "writing"}
    path = write(tmp_path, "a.jsonl", json.dumps(row))
    [found] = read(path).prompts
    assert (found.earlier, found.text) == (("First.",), "Second.")
    assert found.said == "First.\n\nSecond."
    assert found.prompt_id not in (prompt_id("Second."), prompt_id(found.said))
    assert found.request_id == found.prompt_id
    assert found.topic == "writing"
    [alone] = read(path, first_turn=True).prompts
    assert (alone.text, alone.earlier) == ("First.", ())
    assert alone.prompt_id == prompt_id("First.")


def test_a_list_in_any_column_of_prompts_is_a_conversation(tmp_path):
    talk = [
        {"role": "user", "content": "First."},
        {"role": "assistant", "content": "Not what our model says."},
        {"role": "user", "content": "Second."},
        {"role": "assistant", "content": "Nor this."},
    ]
    human = [{"from": "human", "value": "First."}, {"from": "human", "value": "Third."}]
    rows = [{"messages": talk}, {"messages": human}, {"messages": ["First.", None]}]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    said = [(prompt.earlier, prompt.text) for prompt in read(path).prompts]
    assert said == [(("First.",), "Second."), (("First.",), "Third."), ((), "First.")]
    path = write(tmp_path, "b.jsonl", json.dumps({"prompt": ["First.", "Second."]}))
    assert read(path).prompts[0].earlier == ("First.",)
    system = {"messages": [{"role": "system", "content": "Be brief."}, *talk]}
    path = write(tmp_path, "c.jsonl", json.dumps(system))
    fails(path, "a turn of `system` at line 1", "--system-prompt")


def test_a_conversation_beside_the_prompt_that_is_read_is_told_of(tmp_path):
    row = {"prompt": "First.", "messages": ["First.", "Second."]}
    file = read(write(tmp_path, "a.jsonl", json.dumps(row)))
    assert texts(file) == ["First."]
    assert any("`messages` holds conversations in 1 rows" in n for n in file.notes)


def test_a_cell_of_turns_that_is_no_list_is_the_turn_itself(tmp_path):
    assert texts(read(write(tmp_path, "a.csv", "turns\nOnly one.\n"))) == ["Only one."]
    fails(write(tmp_path, "b.csv", "turns\n['a'\n"), "b.csv", "line 2", "JSON list")


def test_known_columns_are_ranked_and_case_does_not_matter(tmp_path):
    path = write(tmp_path, "a.csv", "Behavior,PROMPT,Goal\nb,p,g\n")
    assert texts(read(path)) == ["g"]
    assert texts(read(path, column="prompt")) == ["p"]
    assert read(path, column="prompt").column == "PROMPT"


def test_duplicates_are_found_by_normalised_text_and_counted(tmp_path):
    rows = ["What’s up?", "Wave.", "what's  UP?", "WAVE."]
    file = read(write(tmp_path, "a.txt", "\n".join(rows)))
    assert texts(file) == rows[:2]
    assert (file.n_rows, file.n_duplicates) == (4, 2)
    assert "2 of 4 rows repeat an earlier prompt and were left out." in file.notes


def test_optional_columns_reach_the_rows(tmp_path):
    head = "prompt,wrapper,request_id,label,topic\n"
    rows = "Kindly wave.,polite,r1,safe,greeting\nWave.,none,r1,unsafe,\nSing.,,,,\n"
    kindly, wave, sing = read(write(tmp_path, "a.csv", head + rows)).prompts
    assert (kindly.wrapper, kindly.request_id) == ("polite", "r1")
    assert (kindly.label, kindly.topic) == ("benign", "greeting")
    assert (wave.wrapper, wave.request_id) == (None, "r1")
    assert (wave.label, wave.topic) == ("harmful", None)
    assert (sing.label, sing.wrapper) == ("harmful", None)
    assert sing.request_id == sing.prompt_id == prompt_id("sing.")
    assert {p.source for p in (kindly, wave, sing)} == {"a.csv"}


def test_wrappers_without_requests_are_warned_of(tmp_path):
    file = read(write(tmp_path, "a.csv", "prompt,wrapper\nKindly wave.,polite\n"))
    assert any("warning: column `wrapper`" in note for note in file.notes)


def swapped_rows():
    objects = ("song", "poem", "list", "map", "plan")
    return [
        {"id": str(i), "target": f"Write a {o} now.", "goal": f"Sure, here is a {o}"}
        for i, o in enumerate(objects)
    ]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_column_of_answers_stops_the_reading_and_the_other_one_is_named(
    tmp_path, kind
):
    rows = swapped_rows()
    content = {"csv": csv_of(rows), "jsonl": "\n".join(map(json.dumps, rows))}
    found = content.get(kind) or parquet_of(rows, tmp_path)
    path = write(tmp_path, f"a.{kind}", found)
    fails(path, "--column harmful=target", "--yes", role="harmful")
    asked = read(path, column="target", role="harmful")
    assert texts(asked)[0] == "Write a song now."
    assert not any("warning" in note for note in asked.notes)
    for how in ({"accept": True}, {"column": "goal"}):
        taken = read(path, role="harmful", **how)
        assert texts(taken)[0] == "Sure, here is a song"
        assert any("warning: the rows of column `goal`" in n for n in taken.notes)
    right = [{"goal": row["target"], "target": row["goal"]} for row in rows]
    assert not any(
        "warning" in n for n in read(write(tmp_path, "b.csv", csv_of(right))).notes
    )


def test_a_suite_and_questions_of_ones_own_stop_at_a_column_of_answers_too(tmp_path):
    path = write(tmp_path, "a.csv", csv_of(swapped_rows()))
    with pytest.raises(PromptFileError, match="--column advbench=target"):
        read_suite(f"advbench={path}")
    assert len(read_suite(f"advbench={path}", Reading(accept=True)).items) == 5
    assert len(read_suite(f"advbench={path}", Reading("target")).items) == 5
    rows = [{"prompt": row["goal"], "answer": row["target"]} for row in swapped_rows()]
    path = write(tmp_path, "b.csv", csv_of(rows))
    with pytest.raises(PromptFileError, match="start like answers"):
        read_questions(path)


def test_a_cell_longer_than_the_csv_default_is_read_whole(tmp_path):
    text = "wave " * 60_000
    assert texts(read(write(tmp_path, "a.csv", f"goal\n{text}\n"))) == [text]


def test_the_hash_is_of_the_bytes_as_given(tmp_path):
    content = "\ufeffgoal\r\nWave.\r\n".encode()
    path = write(tmp_path, "a.csv", content)
    assert read(path).sha256 == hashlib.sha256(content).hexdigest()


@settings(deadline=None)
@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)
    assert content_hash(text).startswith(prompt_id(normalise(text)))


def test_reading_a_local_file_imports_no_network_and_no_model_library(tmp_path):
    path = write(tmp_path, "a.csv", "goal\nWave.\n")
    code = (
        "import sys; from holdfast.data.prompts import read_prompts;"
        f"read_prompts({path!r}, label='benign');"
        "print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ,
    )  # fmt: skip
    assert run.stdout.strip() == "set()"


def test_under_wrapped_the_prompt_is_the_attack_and_the_goal_what_it_is_about(tmp_path):
    rows = [{"goal": "Pick a lock.", "prompt": "As a pirate: pick a lock."}]
    path = write(tmp_path, "a.jsonl", json.dumps(rows[0]))
    plain, attack = read(path), read(path, attacked=True)
    assert (plain.column, attack.column) == ("goal", "prompt")
    [prompt] = attack.prompts
    assert prompt.text == "As a pirate: pick a lock."
    assert prompt.request == "Pick a lock."
    assert prompt.request_id == plain.prompts[0].request_id == prompt_id("Pick a lock.")
    assert any("`goal` is the request behind" in note for note in attack.notes)
    asked = read(path, attacked=True, column="prompt").prompts[0]
    assert asked.request_id == prompt.request_id


def test_a_file_that_names_wrappers_has_them_around_the_prompt_not_the_goal(tmp_path):
    head = "goal,prompt,wrapper\n"
    rows = "Wave.,Kindly wave.,polite\nWave.,Wave.,none\n"
    kindly, wave = read(write(tmp_path, "a.csv", head + rows)).prompts
    assert (kindly.text, kindly.wrapper) == ("Kindly wave.", "polite")
    assert (wave.text, wave.wrapper) == ("Wave.", None)
    assert kindly.request_id == wave.request_id == prompt_id("Wave.")
    plain = read(write(tmp_path, "b.csv", head + "Wave.,Kindly wave.,none\n"))
    assert texts(plain) == ["Wave."]


def test_attacks_under_other_names_are_attacks_too(tmp_path):
    row = {"vanilla": "Pick a lock.", "adversarial": "As a pirate: pick a lock."}
    file = read(write(tmp_path, "a.jsonl", json.dumps(row)), attacked=True)
    assert (texts(file), file.prompts[0].request) == (
        ["As a pirate: pick a lock."],
        "Pick a lock.",
    )
    row = {"Behavior": "Pick a lock.", "test_case": "As a pirate: pick a lock."}
    file = read(write(tmp_path, "b.jsonl", json.dumps(row)), attacked=True)
    assert texts(file) == ["As a pirate: pick a lock."]
    alone = read(write(tmp_path, "c.csv", "goal\nPick a lock.\n"), attacked=True)
    assert (texts(alone), alone.prompts[0].request) == (["Pick a lock."], None)


def test_a_column_that_names_attacks_is_read_for_no_prompt(tmp_path):
    head = "forbidden_prompt,jailbroken_prompt,jailbreak,category\n"
    rows = "Wave.,Kindly wave.,AIM,x\nSing.,Kindly sing.,AIM,x\n"
    file = read(write(tmp_path, "a.csv", head + rows), attacked=True)
    assert (file.column, texts(file)) == (
        "jailbroken_prompt",
        ["Kindly wave.", "Kindly sing."],
    )
    assert [prompt.request for prompt in file.prompts] == ["Wave.", "Sing."]
    names = "goal,attack\nWave.,GCG\nSing.,GCG\nSing.,PAIR\n"
    path = write(tmp_path, "b.csv", names)
    fails(path, "`GCG` beside 2 requests of `goal`", "--column", attacked=True)
    # An attack may ask for all of a list, and then holds its requests.
    many = "goal,attack\nWave.,Do all: Wave. Sing.\nSing.,Do all: Wave. Sing.\n"
    many += "Hum.,Hum.\n"
    assert len(read(write(tmp_path, "c.csv", many), attacked=True).prompts) == 2


def test_a_question_beside_an_attack_is_the_request_behind_it(tmp_path):
    head = "q_id,question,prompt\n"
    rows = "1,Wave.,As a pirate wave.\n1,Wave.,As a poet wave.\n2,Sing.,Kindly sing.\n"
    path = write(tmp_path, "a.csv", head + rows)
    first, second, third = read(path, attacked=True).prompts
    assert first.request_id == second.request_id == prompt_id("Wave.")
    assert third.request_id == prompt_id("Sing.")


@pytest.mark.parametrize("column", ["conversation", "conversations"])
def test_saved_chats_are_conversations_without_their_answers(tmp_path, column):
    said = [("human", "Wave."), ("gpt", "Hi."), ("human", "Again."), ("gpt", "Hi.")]
    row = {"id": "1", column: [{"from": who, "value": text} for who, text in said]}
    [prompt] = read(write(tmp_path, "a.json", json.dumps([row]))).prompts
    assert (prompt.earlier, prompt.text) == (("Wave.",), "Again.")


def test_one_prompt_under_two_requests_is_one_cluster(tmp_path):
    head = "prompt,request_id,wrapper\n"
    rows = "Wave.,r1,\nwave.,r2,\nKindly wave.,r2,polite\nSing.,r3,\n"
    wave, kindly, sing = read(write(tmp_path, "a.csv", head + rows)).prompts
    assert wave.request_id == kindly.request_id == "r1"
    assert sing.request_id == "r3"


@pytest.mark.parametrize("said", ["none", "None", "plain", "N/A", ""])
def test_a_wrapper_that_says_none_is_no_wrapper(tmp_path, said):
    row = {"prompt": "Wave.", "wrapper": said, "request_id": "r"}
    assert read(write(tmp_path, "a.jsonl", json.dumps(row))).prompts[0].wrapper is None


CONTEXTS = {
    "Behavior,ContextString\nName the bird.,The bird is blue.\nName the bird.,"
    "It is red.\n": ["The bird is blue.\n\n---\n\nName the bird.",
                    "It is red.\n\n---\n\nName the bird."],
    "instruction,input,output\nTranslate.,Guten Tag,Hello\nSing.,,La\n":
        ["Translate.\n\nGuten Tag", "Sing."],
    "question,context\nWho?,Ann came.\nAnn came. Who?,Ann came.\n":
        ["Ann came.\n\n---\n\nWho?", "Ann came. Who?"],
    "prompt,input\nWave.,7\n": ["Wave."],
}  # fmt: skip


@pytest.mark.parametrize("content", CONTEXTS)
def test_columns_that_belong_to_the_request_are_put_in(tmp_path, content):
    file = read(write(tmp_path, "a.csv", content))
    assert texts(file) == CONTEXTS[content]
    assert file.n_duplicates == 0
