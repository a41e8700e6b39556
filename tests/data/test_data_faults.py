"""Faults of prompt files: each is one clear error that names file and place."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import HoldfastError
from prompt_files import fails, read, texts, write


def test_a_missing_file_says_so_and_offers_the_hub_form(tmp_path):
    fails(str(tmp_path / "none.csv"), "none.csv", "no such file", "Check the path")
    fails("owner/name", "`hub:owner/name`")


def test_a_folder_is_refused_and_its_files_named(tmp_path):
    write(tmp_path, "a.csv", "goal\nWave.\n")
    fails(str(tmp_path), "the folder", "`a.csv`")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = write(tmp_path, "a.csv", "goal\nWave.\n")

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    fails(path, "a.csv", "Permission denied")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", ""), ("a.jsonl", " \n\n"), ("a.csv", "goal\n"), ("a.json", "[]"),
     ("a.parquet", ""), ("a.csv", "\ufeff"), ("a.txt", "\n")],
)  # fmt: skip
def test_an_empty_file_is_an_error(tmp_path, name, content):
    error = fails(write(tmp_path, name, content), name)
    assert error.found in {"an empty file", "no row in it"}


def test_an_unknown_suffix_lists_the_known_ones(tmp_path):
    fails(write(tmp_path, "a.docx", "x"), "a.docx", ".csv, .tsv, .json, .jsonl")


def test_a_table_without_a_known_column_lists_its_columns(tmp_path):
    path = write(tmp_path, "a.csv", "id,ask,reply\n1,Wave.,No.\n")
    fails(path, "`id`, `ask`, `reply`", "`--column`", "goal, prompt, question")
    assert texts(read(path, column="ask")) == ["Wave."]
    fails(path, "column `asks` in `a.csv`", "`id`, `ask`, `reply`", column="asks")


def test_a_file_cut_by_semicolons_is_recognised(tmp_path):
    fails(write(tmp_path, "a.csv", "goal;target\nWave.;No.\n"), "semicolons")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"goal": "Wave."}\n\n{"goal": \n', ("a.jsonl", "line 3")),
        ("a.jsonl", '{"goal": "Wave."}\n17\n', ("line 2", "number")),
        ("a.jsonl", '{"goal": "Wave."}\n"Sing."\n', ("line 2", "text")),
        ("a.json", '[{"goal": "Wave."},\n {"goal" 1}]', ("a.json", "line 2")),
        ("a.json", "3", ("number",)),
        ("a.json", '{"goal": ["Wave."], "id": [1, 2]}', ("`goal`: 1", "`id`: 2")),
        ("a.json", '{"goal": "Wave."}', ("`goal`: no list",)),
        ("a.json", "[" * 100_000, ("a.json",)),
        ("a.json", '[{"goal": "\\ud800"}]', ("item 1", "surrogate")),
        ("a.jsonl", '{"goal": "Wave.", "id": "\\udc00"}', ("line 1", "surrogate")),
        ("a.jsonl", '{"goal": 3}', ("int at line 1", "`goal`")),
        ("a.jsonl", '{"goal": ["Wave.", 3]}', ("int at line 1", "`goal`")),
        ("a.jsonl", '{"turns": ["", "Wave."]}', ("empty turn at line 1",)),
        ("a.csv", 'goal\n"Wave.\nSing.\n', ("a.csv", "starts on line 2")),
        ("a.csv", "goal,id\nWave.,1\nSing, loudly.,2\n", ("3 cells on line 3",)),
        ("a.csv", "goal,goal\nWave.,Sing.\n", ("two columns called `goal`",)),
        ("a.parquet", "no parquet", ("a.parquet", "Parquet")),
    ],
)
def test_malformed_content_is_named_by_file_and_line(tmp_path, name, content, words):
    fails(write(tmp_path, name, content), *words)


def test_lines_are_counted_through_quoted_line_ends(tmp_path):
    path = write(tmp_path, "a.csv", 'goal,id\n"Wave\nand\nsing.",1\n,2\nSing.,3\n ,4\n')
    file = read(path)
    assert texts(file) == ["Wave\nand\nsing.", "Sing."]
    assert any("2 of 4 rows hold no prompt" in note for note in file.notes)
    assert any("left out: line 5, line 7." in note for note in file.notes)


def test_rows_without_a_prompt_are_left_out_counted_and_the_list_is_cut(tmp_path):
    rows = ['{"goal": "Wave."}', '{"goal": null}', '{"id": 1}', '{"goal": "  "}']
    path = write(tmp_path, "a.jsonl", "\n".join(rows + ['{"goal": ""}'] * 4))
    file = read(path)
    assert (texts(file), file.n_rows) == (["Wave."], 1)
    assert (
        "warning: 7 of 8 rows hold no prompt and were left out: line 2, line 3, line 4,"
        " line 5, line 6 and 2 more." in file.notes
    )
    fails(write(tmp_path, "b.csv", "goal,id\n,1\n ,2\n"), "b.csv", "none in 2 rows")


def test_a_table_without_a_header_is_to_get_one_and_stays_a_table(tmp_path):
    one = write(tmp_path, "a.csv", '"Wave, please."\n"Sing\nand dance."\n')
    error = fails(one, "first line, such as `prompt`")
    assert ".txt" not in str(error)
    two = write(tmp_path, "b.csv", "1,Name a colour you like.\n2,Sing a song.\n")
    fails(two, "first line, such as `prompt`")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_bytes_that_are_not_utf8_are_named_by_offset(tmp_path, mark):
    content = mark + b"goal\nWave.\nCaf\xe9 au lait.\n"
    offset = content.index(b"\xe9")
    path = write(tmp_path, "a.csv", content)
    fails(path, f"0xe9 at byte offset {offset} (line 3)", "iconv -f WINDOWS-1252")
    fails(write(tmp_path, "b.csv", "goal\nWave".encode("utf-16")), "iconv -f UTF-16")


def test_a_file_that_only_repeats_one_prompt_is_an_error(tmp_path):
    path = write(tmp_path, "a.txt", "Wave.\nwave.\nWAVE.\n")
    fails(path, "3 rows that all say the same", "`--column`")
    assert len(read(write(tmp_path, "b.txt", "Wave.\n")).prompts) == 1


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["csv", "json", "jsonl", "txt"]))
def test_any_bytes_are_read_or_refused_by_name(tmp_path_factory, data, kind):
    path = tmp_path_factory.getbasetemp() / f"any.{kind}"
    path.write_bytes(data)
    # Anything but a named error fails the test by itself.
    with contextlib.suppress(HoldfastError):
        assert all(prompt.text.strip() for prompt in read(str(path)).prompts)
