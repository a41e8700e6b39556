"""Labels of harm decide, under whatever name they stand, or the file is refused."""

import json

import pytest

from holdfast.data.suites import read_suite
from prompt_files import fails, read, write


def labels(tmp_path, rows):
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    return [prompt.label for prompt in read(path).prompts]


SAID = [
    ("label", "safe", "benign"),
    ("label", "Harmless", "benign"),
    ("label", "harmful", "harmful"),
    ("label", 0, "benign"),
    ("label", False, "benign"),
    ("label", 1, "harmful"),
    ("prompt_harm_label", "unharmful", "benign"),
    ("prompt_harm_label", "harmful", "harmful"),
    ("is_harmful", 0, "benign"),
    ("Harmful", "true", "harmful"),
    ("is_safe", True, "benign"),
    ("safe", 0, "harmful"),
    ("toxicity", 1.0, "harmful"),
    ("data_type", "adversarial_benign", "benign"),
    ("category", "harmless", "benign"),
    ("type", "contrast_homonyms", "harmful"),
]


@pytest.mark.parametrize(("column", "value", "expected"), SAID)
def test_a_label_is_read_under_its_own_name(tmp_path, column, value, expected):
    assert labels(tmp_path, [{"prompt": "Wave.", column: value}]) == [expected]


def test_the_rest_of_a_file_with_contrasts_is_safe(tmp_path):
    rows = [
        {"prompt": "Wave.", "type": "homonyms"},
        {"prompt": "Sing.", "type": "contrast_homonyms"},
    ]
    assert labels(tmp_path, rows) == ["benign", "harmful"]
    path = write(tmp_path, "x.jsonl", "\n".join(map(json.dumps, rows)))
    kinds = [item.kind for item in read_suite(f"xstest={path}").items]
    assert kinds == ["safe_lookalike", "harmful"]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("label", "cheerful"),
        ("label", 7),
        ("response_harm_label", "unharmful"),
        ("refusal", 0),
        ("category", "harmless greetings"),
        ("type", "homonyms"),
    ],
)
def test_what_is_not_said_of_the_request_labels_nothing(tmp_path, column, value):
    assert labels(tmp_path, [{"prompt": "Wave.", column: value}]) == ["harmful"]


def test_a_label_column_about_something_else_is_left_out_and_said(tmp_path):
    file = read(write(tmp_path, "a.csv", "prompt,label\nWave.,cheerful\nSing.,sad\n"))
    assert [prompt.label for prompt in file.prompts] == ["harmful", "harmful"]
    assert any("says nothing of harm" in note for note in file.notes)


def test_labels_that_cannot_be_read_or_contradict_each_other_are_refused(tmp_path):
    half = write(tmp_path, "b.csv", "prompt,label\nWave.,safe\nSing.,sad\n")
    fails(half, "`sad` at line 3")
    both = "prompt,label,prompt_harm_label\nWave.,safe,harmful\n"
    fails(write(tmp_path, "c.csv", both), "benign in `label`", "at line 2")
    twice = write(tmp_path, "a.csv", "prompt,label\nWave.,safe\nwave.,unsafe\n")
    fails(twice, "benign at line 2", "harmful at line 3")
    # It may be the answer that is safe, as it is in some files.
    answers = write(tmp_path, "d.csv", "prompt,response,is_safe\nWave.,Hi.,1\n")
    fails(answers, "`is_safe` beside answers", "Call it `label`")


def test_numbers_under_label_are_read_and_said(tmp_path):
    file = read(write(tmp_path, "a.csv", "prompt,label\nWave.,0\nSing.,1\n"))
    assert any("1 or true was read as harmful" in note for note in file.notes)
