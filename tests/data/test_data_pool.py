import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from holdfast.data.pool import (
    NO_ANSWER,
    TAGS_INSIDE_ANSWER,
    TAGS_INSIDE_THINKING,
    TWO_THOUGHTS,
    UNENDED,
    Pool,
    split_thought,
)
from holdfast.errors import PromptFileError, SettingsError

ROWS = [
    {
        "prompt": f"How do I find thing {i}?\nPlease.",
        "thinking": f'They want thing {i}, "so" I say no.',
        "response": f"I'm sorry, no {i}.",
        "category": ("a", "b")[i % 2],
    }
    for i in range(23)
]


def write(folder, kind, rows=ROWS):
    path = folder / f"pool.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    else:
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def said(row):
    return (row.row, row.prompt, row.thinking, row.response, row.category, row.content)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
@pytest.mark.parametrize("size", [1, 7, 23, 100])
def test_every_format_and_every_cut_gives_the_same_rows(kind, size, tmp_path):
    pool = Pool(str(write(tmp_path, kind)))
    assert pool.survey.n_rows == 23
    shards = list(pool.shards(size, lambda number: False))
    assert [shard.number for shard in shards] == list(range(-(-23 // size)))
    rows = [row for shard in shards for row in shard.read()]
    assert [row.row for row in rows] == list(range(23))
    assert [dict(row.cells) for row in rows] == ROWS
    assert [said(row) for row in pool.rows(lambda number: True)] == list(
        map(said, rows)
    )


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_skipped_shards_are_not_read_and_the_others_are_the_same(kind, tmp_path):
    pool = Pool(str(write(tmp_path, kind)))
    shards = {
        shard.number: shard.read() for shard in pool.shards(4, lambda n: n % 2 == 0)
    }
    assert list(shards) == [1, 3, 5]
    assert [row.row for row in shards[5]] == [20, 21, 22]
    assert [row.row for row in pool.rows({3, 17}.__contains__)] == [3, 17]


def test_a_folder_is_one_pool_in_the_order_of_its_names(tmp_path):
    for name, part in (("b", ROWS[:3]), ("a", ROWS[3:5])):
        write(tmp_path, "jsonl", part).rename(tmp_path / f"{name}.jsonl")
    pool = Pool(str(tmp_path))
    prompts = [row.prompt for row in pool.rows(lambda number: True)]
    assert prompts == [row["prompt"] for row in (*ROWS[3:5], *ROWS[:3])]


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("<think>\nHm. So.\n</think>\n\nNo.", "Hm. So.", "No."),
        ("Hm.\n</think>\n\nNo.", "Hm.", "No."),
        ("<thinking>Hm.</thinking>No.", "Hm.", "No."),
        ("Just no.", None, "Just no."),
        ("<think>\n\n</think>\n\nNo.", None, "No."),
        ("Write </think> to end it.", None, "Write </think> to end it."),
    ],
)
def test_thinking_inside_the_answer_is_cut_out(text, thinking, answer):
    assert split_thought(text) == (thinking, answer, None)


BROKEN = [
    ({"response": "<think>\nT\n</think>\n\n"}, NO_ANSWER),
    ({"response": "<think>\nT"}, UNENDED),
    ({"response": " <thinking>T, and so on"}, UNENDED),
    ({"thinking": "<think>\nT\n</think>", "response": "A"}, TAGS_INSIDE_THINKING),
    ({"reasoning": "T\n</think>\n", "response": "A"}, TAGS_INSIDE_THINKING),
    ({"thinking": "T", "response": "<think>\nU\n</think>\n\nA"}, TWO_THOUGHTS),
    ({"response": "Write </think> to end it."}, TAGS_INSIDE_ANSWER),
    ({"response": "<think>T</think>Then say <think> again."}, TAGS_INSIDE_ANSWER),
    ({"response": "T\n</think>\n\nA\n</think>\n\nB"}, TAGS_INSIDE_ANSWER),
    ({"response": "<think>a<think>b</think>A"}, TAGS_INSIDE_THINKING),
    ({"thinking": "T", "response": "A"}, None),
    ({"response": "<think>T</think>A"}, None),
    ({"response": "A"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("cells", "fault"), BROKEN)
def test_a_row_with_broken_thinking_says_so(tmp_path, cells, fault):
    path = write(tmp_path, "jsonl", [{"prompt": "Q?", **cells}])
    [row] = Pool(str(path)).rows(lambda n: True)
    assert row.broken == fault


def test_what_belongs_to_the_request_is_part_of_the_prompt(tmp_path):
    rows = [{"instruction": "Translate.", "input": "Guten Tag", "output": "Hello."},
            {"instruction": "Sing.", "input": "", "output": "La."}]  # fmt: skip
    first, second = Pool(str(write(tmp_path, "jsonl", rows))).rows(lambda n: True)
    assert (first.prompt, second.prompt) == ("Translate.\n\nGuten Tag", "Sing.")


def test_half_a_surrogate_pair_in_a_row_is_named_by_its_line(tmp_path):
    path = write(tmp_path, "jsonl", [ROWS[0], {**ROWS[1], "response": "x\ud83d"}])
    with pytest.raises(PromptFileError, match="surrogate pair at line 2"):
        list(Pool(str(path)).rows(lambda n: True))


def test_one_field_with_both_and_fields_under_other_names(tmp_path):
    rows = [
        {
            "question": "Q?",
            "response": "<think>\nT\n</think>\n\nA",
            "category": ["x", "y"],
        },
        {"question": "R?", "response": "B", "category": None},
    ]
    first, second = Pool(str(write(tmp_path, "jsonl", rows))).rows(lambda n: True)
    assert (first.prompt, first.thinking, first.response) == ("Q?", "T", "A")
    assert first.category == "x, y"
    assert (second.thinking, second.category) == (None, None)
    rows = [{"said": "Q?", "good": "A", "why": "T"}]
    path = str(write(tmp_path, "jsonl", rows))
    names = {"prompt": "said", "response": "good", "thinking": "why"}
    [row] = Pool(path, names).rows(lambda n: True)
    assert (row.prompt, row.thinking, row.response) == ("Q?", "T", "A")


def test_drawn_thinking_of_a_chosen_row_goes_before_its_own(tmp_path):
    rows = [{**ROWS[0], "holdfast": {"row": 7, "thinking": "drawn"}}]
    [row] = Pool(str(write(tmp_path, "jsonl", rows))).rows(lambda n: True)
    assert row.thinking == "drawn"


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(PromptFileError, match="no such file"):
        Pool(str(tmp_path / "none.jsonl"))
    with pytest.raises(PromptFileError, match="Parquet or JSONL files"):
        Pool(str(tmp_path))
    path = tmp_path / "pool.jsonl"
    path.write_text(json.dumps(ROWS[0]) + '\n{"prompt": "x"}\n')
    with pytest.raises(PromptFileError, match=r"`response`.*at line 2"):
        list(Pool(str(path)).rows(lambda n: True))
    path.write_text(json.dumps(ROWS[0]) + "\n{broken\n")
    with pytest.raises(PromptFileError, match="line 2"):
        list(Pool(str(path)).rows(lambda n: True))
    path.write_text("\n")
    with pytest.raises(PromptFileError, match="rows in"):
        _ = Pool(str(path)).survey
    with pytest.raises(SettingsError, match="field of prompt"):
        Pool(str(path), {"nonsense": "x"})


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_header_that_is_no_utf8_is_named(kind, tmp_path):
    path = tmp_path / f"pool.{kind}"
    path.write_bytes(b"\xffprompt,response\nHow?,No.\n")
    with pytest.raises(PromptFileError, match=r"0xff in position 0.* near line 1"):
        _ = Pool(str(path)).survey


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_two_columns_of_one_name_are_refused(kind, tmp_path):
    path = tmp_path / f"pool.{kind}"
    if kind == "csv":
        path.write_text("prompt,response,prompt\nHow?,No.,Another?\n")
    else:
        cells = [pa.array([text]) for text in ("How?", "No.", "Another?")]
        names = ["prompt", "response", "prompt"]
        pq.write_table(pa.Table.from_arrays(cells, names), path)
    with pytest.raises(PromptFileError, match="two columns called `prompt`"):
        _ = Pool(str(path)).survey


@pytest.mark.parametrize("column", ["prompt", "notes"])
def test_parquet_whose_text_is_no_utf8_is_named(column, tmp_path):
    path = tmp_path / "pool.parquet"
    damaged = pa.array([b"\xff"] * 2, pa.binary()).view(pa.string())
    table = pa.Table.from_pylist([{**row, "notes": ""} for row in ROWS[:2]])
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, damaged), path)
    pool = Pool(str(path))
    assert pool.survey.n_rows == 2
    with pytest.raises(PromptFileError, match=r"text in UTF-8; .* in rows 1 to 2"):
        list(pool.rows(lambda _: True))
