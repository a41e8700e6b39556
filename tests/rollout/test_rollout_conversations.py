"""Conversations are asked turn by turn with the model's own answers between them."""

import json

import pytest

import tiny_thinker
from holdfast.cli.app import run
from holdfast.data.chat.conversation import Spans
from holdfast.data.prompts import Prompt, conversation_id
from holdfast.models.decoding.row_state import Completion
from holdfast.models.loading.causal import load
from holdfast.rollout import questions as rollout_questions
from holdfast.rollout import sampling
from holdfast.rollout.questions import Question, converse
from holdfast.rollout.rows import from_table
from holdfast.study import Study

FLAGS = ("--limit", "6", "--max-thinking", "64", "--max-answer", "24")
FLAGS += ("--wrappers-per-request", "1", "--temperature", "0")
CARE = tiny_thinker.requests(tiny_thinker.CARE, 6)
HARM = tiny_thinker.requests(tiny_thinker.HARM, 6)
TALKS = [[care, harm] for care, harm in zip(CARE, HARM, strict=True)]
LONG = [CARE[0], f"Think of {'the piano and ' * 150} say it."]


def write(path, talks):
    rows = ({"turns": turns, "request_id": f"r{i}"} for i, turns in enumerate(talks))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rolled(thinker, file, study, *flags):
    command = ["rollout", str(thinker), "--harmful", file, *FLAGS, *flags]
    assert run([*command, "-o", str(study)]) == 0
    return from_table(Study.open(study).read_table("rollouts.parquet"))


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    return write(tmp_path_factory.mktemp("talks") / "talks.jsonl", TALKS)


@pytest.fixture(scope="module")
def asked(thinker, talks, tmp_path_factory):
    return rolled(thinker, talks, tmp_path_factory.mktemp("studies") / "all")


def of(rows, role):
    return {row.request_id: row for row in rows if row.role == role}


def test_every_turn_is_asked_after_the_models_own_answer(thinker, asked):
    tokenizer = load(str(thinker)).tokenizer
    found = of(asked, "harmful")
    assert set(found) == {f"r{i}" for i in range(6)}
    for place, (first, second) in enumerate(TALKS):
        row = found[f"r{place}"]
        assert row.prompt_id == conversation_id([first, second])
        assert row.prompt == second
        [turn] = row.earlier
        assert turn.prompt == first
        start, end = row.spans.prompt
        shown = tokenizer.decode(row.token_ids[start:end])
        assert shown == (
            f"<|begin|><|user|>{first}<|assistant|>{turn.answer}<|end|>"
            f"<|user|>{second}<|assistant|><think>\n"
        )
        assert turn.thinking
        assert turn.thinking not in shown
        assert row.spans.thinking[0] == end


def test_the_first_turn_alone_is_asked_on_demand_and_has_the_same_answer(
    thinker, talks, asked, tmp_path
):
    alone = of(rolled(thinker, talks, tmp_path / "s", "--turns", "first"), "harmful")
    for name, row in of(asked, "harmful").items():
        assert alone[name].prompt == row.earlier[0].prompt
        assert alone[name].earlier == ()
        assert alone[name].answer == row.earlier[0].answer
        assert alone[name].thinking == row.earlier[0].thinking


def test_a_wrapper_goes_around_the_last_turn_of_a_conversation(asked):
    plain, wrapped = of(asked, "harmful"), of(asked, "wrapped")
    assert set(plain) == set(wrapped)
    for name, row in wrapped.items():
        assert row.earlier == plain[name].earlier
        assert plain[name].prompt in row.prompt
        assert row.split == plain[name].split


def test_neither_batches_nor_an_interruption_change_a_conversation(
    thinker, talks, asked, tmp_path, monkeypatch
):
    study, real, calls = tmp_path / "s", rollout_questions.converse, []

    def twice(*args, **more):
        if len(calls) == 2:
            calls.append(0)
            raise KeyboardInterrupt
        calls.append(len(args[1]))
        return real(*args, **more)

    monkeypatch.setattr(sampling, "converse", twice)
    command = ["rollout", str(thinker), "--harmful", talks, *FLAGS, "-o", str(study)]
    assert run([*command, "--batch-size", "5"]) == 130
    kept = sum(calls)
    assert run([*command, "--batch-size", "5"]) == 0
    again = from_table(Study.open(study).read_table("rollouts.parquet"))
    assert sum(calls) == len(again) == len(asked)
    assert kept == 10
    key = {row.row_id: (row.token_ids, row.earlier, row.verdict) for row in asked}
    assert {r.row_id: (r.token_ids, r.earlier, r.verdict) for r in again} == key


def test_a_conversation_that_outgrows_the_context_is_left_out_and_named(
    thinker, tmp_path, capsys
):
    file = write(tmp_path / "long.jsonl", [*TALKS[:2], LONG])
    rows = rolled(thinker, file, tmp_path / "s", "--wrapped", file)
    assert set(of(rows, "harmful")) == {"r0", "r1"}
    said = " ".join(capsys.readouterr().err.split())
    name = f"harmful/{conversation_id(LONG)}/0"
    assert "1 conversations were left out" in said
    assert name in said
    facts = Study.open(tmp_path / "s").record("rollout")
    assert any(name in note for note in facts["prompt_notes"])


def test_suites_of_conversations_are_judged_with_all_that_the_user_said(
    thinker, talks, asked, tmp_path
):
    study = tmp_path / "s"
    command = [
        "evaluate",
        str(thinker),
        "--suite",
        f"harmful={talks}",
        "-o",
        str(study),
    ]
    command += ["--max-thinking", "64", "--max-answer", "24", "--temperature", "0"]
    assert run([*command]) == 0
    rows = Study.open(study).read_table("evaluation.parquet").to_pylist()
    known = of(asked, "harmful")
    for row in rows:
        same = known[row["request_id"]]
        assert row["prompt"] == same.prompt
        assert row["request"] == f"{same.earlier[0].prompt}\n\n{same.prompt}"
        assert row["answer"] == same.answer
        assert row["earlier"] == [same.earlier[0]._asdict()]
    assert len(rows) == 6


def completion(question, *, closed=True):
    end = question.n_tokens
    spans = Spans((0, end), (end, end), (end, end), (end, end))
    return Completion(
        index=0, token_ids=question.token_ids, spans=spans, thinking="T",
        answer="A" if closed else "", finish="stop" if closed else "length",
        forced_close=False, closed=closed, min_top2_gap=1.0, min_margin=1.0,
    )  # fmt: skip


def test_a_thinking_that_never_ends_ends_the_conversation(thinker):
    adapter = load(str(thinker))
    prompt = Prompt("p", "p", "Three.", "harmful", "t", None, earlier=("One.", "Two."))
    question = Question("harmful", prompt, 0, 7, (1, 2, 3))
    asked = []

    def draw(questions):
        asked.extend((each.asked, each.seed) for each in questions)
        return [(q, completion(q, closed=q.asked == "One.")) for q in questions]

    [(last, made)] = converse(adapter, [question], draw, system_prompt=None, room=200)
    assert [said for said, _ in asked] == ["One.", "Two."]
    assert len({seed for _, seed in asked}) == 2
    assert not made.closed
    assert [turn.prompt for turn in last.turns] == ["One."]
    assert last.row_id == "harmful/p/0"
