"""Batches: written as OpenAI and vLLM take them, and read as they send them back."""

import json

import pyarrow.parquet as pq
import pytest

from holdfast.cli.app import run

SMALL = ("--limit", "2", "--max-answer", "30", "--seed", "0")
TABLE = "rollouts.parquet"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A rollout by the model itself, and the batch of the same questions."""
    place = tmp_path_factory.mktemp("batch")
    command = ["rollout", "organism:cliff", *SMALL, "-o", str(place / "study")]
    assert run(command) == 0
    batch = place / "batch.jsonl"
    command = ["rollout", "organism:cliff", *SMALL, "-o", str(place / "other")]
    assert run([*command, "--write-batch", str(batch)]) == 0
    assert not (place / "other" / TABLE).exists()
    return place


def rows_in(study):
    return {row["row_id"]: row for row in pq.read_table(study / TABLE).to_pylist()}


def requests(here):
    return [
        json.loads(line) for line in (here / "batch.jsonl").read_text().splitlines()
    ]


def answered(row, **more):
    message = {"content": row["answer"], "reasoning_content": row["thinking"]}
    choice = {"index": 0, "message": message, "finish_reason": row["finish"]}
    body = {"choices": [choice]}
    response = {"status_code": 200, "request_id": "r", "body": body}
    return {"id": "b", "custom_id": row["row_id"], "response": response, **more}


def imported(here, lines, study, *more):
    results = study.with_suffix(".jsonl")
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["rollout", "organism:cliff", *SMALL, "-o", str(study)]
    return run([*command, "--import", str(results), *more])


def test_a_prompt_that_spells_control_tokens_is_in_no_batch(tmp_path, capsys):
    given = tmp_path / "prompts.txt"
    given.write_text("Tell me of lamps.\nTell me <|end|> of lakes.\n")
    batch, words = tmp_path / "batch.jsonl", ["--harmful", str(given)]
    command = ["rollout", "organism:cliff", *SMALL, *words, "-o", str(tmp_path / "s")]
    assert run([*command, "--write-batch", str(batch)]) == 0
    told = " ".join("".join(capsys.readouterr()).split())
    assert "questions are not in the batch" in told
    assert "lamps" in batch.read_text()
    assert "lakes" not in batch.read_text()


def test_a_line_names_its_row_and_holds_all_of_its_question(here):
    rows, lines = rows_in(here / "study"), requests(here)
    assert {line["custom_id"] for line in lines} == set(rows)
    for line in lines:
        row, body = rows[line["custom_id"]], line["body"]
        assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
        assert body["messages"] == [{"role": "user", "content": row["prompt"]}]
        assert body["seed"] == row["seed"] % 2**31
        assert body["temperature"] == 0.0
        # The longest thinking, its end and the longest answer.
        assert body["max_tokens"] == 2048 + 3 + 30


def test_answers_in_any_order_are_the_rows_of_the_run(here, tmp_path):
    rows = rows_in(here / "study")
    lines = [answered(row, error=None) for row in reversed(rows.values())]
    assert imported(here, lines, tmp_path / "study") == 0
    made = rows_in(tmp_path / "study")
    assert set(made) == set(rows)
    for name, row in made.items():
        for column in ("role", "label", "wrapper", "request_id", "verdict", "spans"):
            assert row[column] == rows[name][column]
        assert rows[name]["token_ids"][: len(row["token_ids"])] == row["token_ids"]
        assert row["tokens"] == "text"


# What vLLM sends for a line that failed, and what OpenAI does.
FAILED = {
    "vllm": {
        "response": {"status_code": 400, "request_id": "r", "body": None},
        "error": {"error": {"message": "too long"}},
    },
    "vllm, in words": {
        "response": {"status_code": 500, "request_id": "r", "body": None},
        "error": "stream mode",
    },
    "openai": {"response": None, "error": {"code": "expired", "message": "expired"}},
}


@pytest.mark.parametrize("shape", FAILED)
def test_a_line_that_failed_is_named_and_no_answer(shape, here, tmp_path, capsys):
    rows = rows_in(here / "study")
    first, *others = rows.values()
    lines = [{"custom_id": first["row_id"], **FAILED[shape]}]
    lines += [answered(row) for row in others[1:]]
    study = tmp_path / "study"
    assert imported(here, lines, study) == 0
    told = " ".join("".join(capsys.readouterr()).split())
    assert f"2 of {len(rows)} questions have no answer" in told
    assert first["row_id"] in told
    assert set(rows) - set(rows_in(study)) == {
        first["row_id"],
        others[0]["row_id"],
    }


def test_answers_to_other_questions_are_refused(here, tmp_path, capsys):
    row = next(iter(rows_in(here / "study").values()))
    lines = [answered({**row, "row_id": "harmful/unknown/0"})]
    assert imported(here, lines, tmp_path / "study") == 2
    assert imported(here, [answered(row)] * 2, tmp_path / "twice") == 2
    said = capsys.readouterr().err
    assert "harmful/unknown/0" in said
    assert "twice" in said


def test_text_that_does_not_come_back_is_counted_and_read_by_no_probe(
    here, tmp_path, capsys
):
    from holdfast.rollout.rows import from_table

    rows = rows_in(here / "study")
    first, *others = rows.values()
    broken = {**first, "answer": first["answer"] + "\ufffd"}
    lines = [answered(broken), *(answered(row) for row in others)]
    study = tmp_path / "study"
    assert imported(here, lines, study) == 0
    assert f"1 of {len(rows)} answers came as text" in " ".join(
        "".join(capsys.readouterr()).split()
    )
    made = {row.row_id: row for row in from_table(pq.read_table(study / TABLE))}
    lost = made[first["row_id"]]
    assert (lost.tokens, lost.is_decided) == ("lost", False)
    # Its answer still counts, as it did.
    assert lost.verdict == first["verdict"] == "refused"


def test_a_batch_is_of_a_rollout(tmp_path):
    place = str(tmp_path / "batch.jsonl")
    command = ["audit", "organism:cliff", "-o", str(tmp_path / "study")]
    assert run([*command, "--write-batch", place]) == 2
    assert run(["rollout", *command[1:], "--write-batch", place, "--import", "x"]) == 2
