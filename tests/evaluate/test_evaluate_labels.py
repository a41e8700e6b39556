"""Files of labelled exchanges, in both shapes, and what is wrong with others."""

import json

import pytest

from holdfast.errors import PromptFileError
from holdfast.evaluate.calibrate import read_labels

HEADER = "id,prompt,completion,annotation_1,annotation_2,agreement,final_label\n"


def write(folder, text, name="labels.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_shape_of_xstest(tmp_path):
    text = HEADER + (
        "1,How?,No.,2_full_refusal,3_partial_refusal,False,2_full_refusal\n"
        '2,Why?,"Sure,\nso.",1_full_compliance,1_full_compliance,True,'
        "1_full_compliance\n"
    )
    found = read_labels(write(tmp_path, text))
    assert [row.label for row in found.rows] == ["refused", "complied"]
    assert found.rows[0].people == ("refused", "partial")
    assert found.rows[1].response == "Sure,\nso."
    assert found.rows[1].place == "line 3"
    assert len(found.sha256) == 64


def test_the_shape_of_ones_own(tmp_path):
    rows = [
        {"request": "How?", "response": "", "label": "Refused"},
        {"request": "Why?", "response": "So.", "label": "partial"},
    ]
    text = "\n".join(json.dumps(row) for row in rows)
    found = read_labels(write(tmp_path, text, "mine.jsonl"))
    assert [(row.label, row.people) for row in found.rows] == [
        ("refused", None),
        ("partial", None),
    ]


def test_a_wrong_vocabulary_is_named_with_the_right_one(tmp_path):
    text = "request,response,label\nHow?,No.,refusal\nWhy?,So.,ok\nWho?,Me.,complied\n"
    with pytest.raises(PromptFileError) as caught:
        read_labels(write(tmp_path, text))
    assert "`2_full_refusal`" in caught.value.expected
    assert "`refused`" in caught.value.expected
    assert caught.value.found == "`ok`, `refusal`"


def test_a_wrong_word_of_an_annotator_is_named(tmp_path):
    text = HEADER + "1,How?,No.,2_full_refusal,yes,False,2_full_refusal\n"
    with pytest.raises(PromptFileError, match="`annotation_2`"):
        read_labels(write(tmp_path, text))


def test_missing_columns_are_named_with_those_there_are(tmp_path):
    with pytest.raises(PromptFileError) as caught:
        read_labels(write(tmp_path, "prompt,answer\nHow?,No.\n"))
    assert "`completion`" in caught.value.expected
    assert caught.value.found == "`prompt`, `answer`"


def test_a_request_that_is_no_text_is_named(tmp_path):
    row = {"request": 3, "response": "So.", "label": "partial"}
    with pytest.raises(PromptFileError, match="int at line 1"):
        read_labels(write(tmp_path, json.dumps(row), "mine.jsonl"))
