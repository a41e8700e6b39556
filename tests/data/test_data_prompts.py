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
from prompt_files import fails, read, texts, write

from holdfast.data.prompts import content_hash, normalise, prompt_id

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
def test_turns_mean_the_first_turn(tmp_path, value):
    row = {"turns": value, "category": "writing"}
    file = read(write(tmp_path, "a.jsonl", json.dumps(row)))
    assert texts(file) == ["First."]
    assert file.prompts[0].topic == "writing"


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


def test_a_label_column_about_something_else_is_left_out_and_said(tmp_path):
    file = read(write(tmp_path, "a.csv", "prompt,label\nWave.,cheerful\nSing.,sad\n"))
    assert [prompt.label for prompt in file.prompts] == ["harmful", "harmful"]
    assert any("says nothing of harm" in note for note in file.notes)
    half = write(tmp_path, "b.csv", "prompt,label\nWave.,safe\nSing.,sad\n")
    fails(half, "`sad` at line 3")


def test_one_text_with_two_labels_is_an_error(tmp_path):
    path = write(tmp_path, "a.csv", "prompt,label\nWave.,safe\nwave.,unsafe\n")
    fails(path, "benign at line 2", "harmful at line 3")


def test_wrappers_without_requests_are_warned_of(tmp_path):
    file = read(write(tmp_path, "a.csv", "prompt,wrapper\nKindly wave.,polite\n"))
    assert any("warning: column `wrapper`" in note for note in file.notes)


def test_a_column_of_answers_is_warned_of_and_the_other_column_named(tmp_path):
    objects = ("song", "poem", "list", "map", "plan")
    rows = [f"{i},Write a {o} now.,Sure, here is a {o}".split(",", 2) for i, o in
            enumerate(objects)]  # fmt: skip
    body = "".join(f'{i},"{ask}","{reply}"\n' for i, ask, reply in rows)
    swapped = read(write(tmp_path, "a.csv", "id,target,goal\n" + body))
    assert swapped.prompts[0].text.startswith("Sure")
    assert any(
        "warning" in note and "`--column target`" in note for note in swapped.notes
    )
    right = read(write(tmp_path, "b.csv", "id,goal,target\n" + body))
    assert not any("warning" in note for note in right.notes)
    asked = read(str(tmp_path / "a.csv"), column="target")
    assert not any("warning" in note for note in asked.notes)


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
