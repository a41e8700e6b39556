"""Benchmark files as they are in the wild, where HOLDFAST_BENCHMARKS says they lie."""

import csv
import os
from collections import Counter

import pytest

from holdfast.data.prompts import PromptFile, read_prompts
from holdfast.data.suites import read_suite
from holdfast.errors import PromptFileError

BENCHMARKS = os.environ.get("HOLDFAST_BENCHMARKS")


pytestmark = pytest.mark.skipif(
    BENCHMARKS is None, reason="HOLDFAST_BENCHMARKS is not set"
)


def read(path: str, **options: str | bool) -> PromptFile:
    return read_prompts(path, label="harmful", **options)


@pytest.mark.parametrize(
    ("path", "column", "n_rows", "n_distinct"),
    [
        ("jailbreakbench/jailbreakbench.csv", "Goal", 100, 100),
        ("xstest/xstest_prompts.csv", "prompt", 450, 450),
        ("gsm8k/test.jsonl", "question", 1319, 1319),
        ("mt_bench/question.jsonl", "turns", 80, 80),
        ("star1/STAR-1.json", "question", 1000, 1000),
        ("xstest_human_labels/xstest_v2_completions_gpt4.csv", "prompt", 450, 450),
    ],
)
def test_the_files_are_read_as_they_are(path, column, n_rows, n_distinct):
    file = read(f"{BENCHMARKS}/{path}")
    assert file.column == column
    assert (file.n_rows, len(file.prompts)) == (n_rows, n_distinct)
    assert file.n_duplicates == n_rows - n_distinct


def test_swapped_headers_stop_the_reading_and_only_where_they_are():
    path = f"{BENCHMARKS}/advbench/harmful_behaviors.csv"
    with pytest.raises(PromptFileError, match="--column harmful=target") as caught:
        read(path, role="harmful")
    assert "--yes" in str(caught.value)
    accepted = read(path, role="harmful", accept=True)
    assert (len(accepted.prompts), accepted.n_duplicates) == (504, 16)
    assert any("warning" in note for note in accepted.notes)
    asked = read(path, column="target")
    assert (len(asked.prompts), asked.n_duplicates) == (520, 0)
    assert not any("warning" in note for note in asked.notes)
    other = read(f"{BENCHMARKS}/jailbreakbench/jailbreakbench.csv")
    assert not any("warning" in note for note in other.notes)


def test_both_turns_of_mt_bench_are_read_and_the_first_alone_on_demand():
    path = f"{BENCHMARKS}/mt_bench/question.jsonl"
    prompts = read(path).prompts
    assert {len(prompt.earlier) for prompt in prompts} == {1}
    assert prompts[0].text.startswith("Rewrite your previous response.")
    assert prompts[0].earlier[0].startswith("Compose an engaging travel blog post")
    first = read(path, first_turn=True).prompts
    assert {prompt.earlier for prompt in first} == {()}
    assert [prompt.text for prompt in first] == [each.earlier[0] for each in prompts]


def test_xstest_as_first_published_has_the_labels_of_the_later_file(tmp_path):
    """`type` alone tells contrasts there, which are 200 of 450 rows."""
    with open(f"{BENCHMARKS}/xstest/xstest_prompts.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    first = tmp_path / "xstest_v2_prompts.csv"
    with first.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["id_v1", "id_v2", "type", "prompt", "focus", "note"])
        for row in rows:
            unsafe = row["label"] == "unsafe" and not row["type"].startswith("contrast")
            kind = f"contrast_{row['type']}" if unsafe else row["type"]
            cells = (kind, row["prompt"], row["focus"], row["note"])
            writer.writerow([row["id"], f"v2-{row['id']}", *cells])
    for label in ("harmful", "benign"):
        file = read_prompts(str(first), label=label)
        assert [prompt.label for prompt in file.prompts] == [
            "harmful" if row["label"] == "unsafe" else "benign" for row in rows
        ]
    items = read_suite(f"xstest={first}").items
    assert Counter(item.kind for item in items) == {
        "safe_lookalike": 250,
        "harmful": 200,
    }


def test_labels_and_topics_of_the_files_are_used():
    contrasts = read(f"{BENCHMARKS}/xstest/xstest_prompts.csv").prompts
    assert sum(prompt.label == "benign" for prompt in contrasts) == 250
    goals = read(f"{BENCHMARKS}/jailbreakbench/jailbreakbench.csv").prompts
    assert len({prompt.topic for prompt in goals}) == 10
