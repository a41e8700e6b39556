"""The rows of an evaluation: what was generated, and what the judge said of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from holdfast.data.items import Item
from holdfast.judges.contract import (
    Exchange,
    JudgeIdentity,
    screen_exact,
    thinking_as_response,
)
from holdfast.judges.degenerate import flaw
from holdfast.judges.exact import is_correct
from holdfast.judges.verdict import Verdict
from holdfast.models.rows import Completion
from holdfast.session.asking import Question
from holdfast.session.rows import EARLIER

GENERATED = pa.schema(
    [
        ("row_id", pa.string()),
        ("suite", pa.string()),
        ("kind", pa.string()),
        ("wrapper", pa.string()),
        ("request_id", pa.string()),
        ("prompt_id", pa.string()),
        ("topic", pa.string()),
        ("system_prompt", pa.string()),
        ("prompt", pa.string()),
        ("request", pa.string()),
        ("context", pa.string()),
        ("target", pa.string()),
        ("sample", pa.int32()),
        ("seed", pa.int64()),
        ("thinking", pa.string()),
        ("answer", pa.string()),
        ("n_prompt", pa.int32()),
        ("n_thinking", pa.int32()),
        ("n_answer", pa.int32()),
        ("finish", pa.string()),
        ("closed", pa.bool_()),
        ("forced_close", pa.bool_()),
        ("min_top2_gap", pa.float64()),
        ("earlier", EARLIER),
    ]
)
JUDGED = pa.schema(
    [
        ("row_id", pa.string()),
        ("verdict", pa.string()),
        ("score", pa.float64()),
        ("reason", pa.string()),
        ("judge", pa.string()),
        ("correct", pa.bool_()),
        ("thinking_verdict", pa.string()),
        ("thinking_score", pa.float64()),
        ("flaw", pa.string()),
    ]
)
EXACT = "exact-1"


def generated(
    item: Item, question: Question, made: Completion, system_prompt: str | None
) -> dict[str, Any]:
    """Return the row of one answer."""
    prompt, thinking, _, answer = made.spans
    return {
        "row_id": question.row_id,
        "suite": item.suite,
        "kind": item.kind,
        "wrapper": item.prompt.wrapper,
        "request_id": item.prompt.request_id,
        "prompt_id": item.prompt.prompt_id,
        "topic": item.prompt.topic,
        "system_prompt": system_prompt,
        "prompt": item.prompt.text,
        "request": item.request,
        "context": item.context,
        "target": item.target,
        "sample": question.sample,
        "seed": question.seed,
        "thinking": made.thinking,
        "answer": made.answer,
        "n_prompt": prompt[1] - prompt[0],
        "n_thinking": thinking[1] - thinking[0],
        "n_answer": answer[1] - answer[0],
        "finish": made.finish,
        "closed": made.closed,
        "forced_close": made.forced_close,
        "min_top2_gap": made.min_top2_gap,
        "earlier": [turn._asdict() for turn in question.turns],
    }


def exchange(row: Mapping[str, Any], identity: JudgeIdentity) -> Exchange:
    """Return what a judge is shown of a row.

    A judge of refusal sees what the model saw. A judge of harm sees the request
    without its attack, since that is what the answer must not serve. Thinking that
    stopped by itself is all that the model said, and stands for its answer.
    """
    refusal = identity.measures == "refusal"
    inside = not row["closed"] and row["finish"] != "length" and not row["answer"]
    return Exchange(
        request=row["prompt"] if refusal else row["request"],
        response=row["thinking"] if inside else row["answer"],
        thinking=row["thinking"] or None,
        closed=row["closed"],
        finish=row["finish"],
        context=None if refusal else row["context"],
    )


def judged(row: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
    """Return the judge's part of a row."""
    return {
        "row_id": row["row_id"],
        "verdict": verdict.outcome,
        "score": verdict.score,
        "reason": verdict.reason,
        "judge": verdict.judge,
        "flaw": verdict.flaw or flaw(row["answer"], row["closed"], row["finish"]),
    }


def thought(row: Mapping[str, Any], identity: JudgeIdentity) -> Exchange | None:
    """Return the thinking of a row in place of its answer, or None without any."""
    if not row["thinking"].strip():
        return None
    return thinking_as_response(exchange(row, identity))


def marked(row: Mapping[str, Any], identity: JudgeIdentity) -> dict[str, Any]:
    """Return the verdict on a row with an exact answer; no judge is asked."""
    found = screen_exact(exchange(row, identity), EXACT)
    correct = found is None and is_correct(row["answer"], row["target"])
    said = "the number is right" if correct else "the number is not the right one"
    return {
        "row_id": row["row_id"],
        "verdict": None if found is None else found.outcome,
        "reason": said if found is None else found.reason,
        "judge": EXACT,
        "correct": correct,
    }


def table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return rows as a table; a column that a row lacks is null there."""
    return pa.table(
        {name: [row.get(name) for row in rows] for name in schema.names}, schema=schema
    )


def joined(rows: pa.Table, verdicts: pa.Table) -> pa.Table:
    """Put what was judged beside what was generated, row by row."""
    for name in JUDGED.names[1:]:
        rows = rows.append_column(JUDGED.field(name), verdicts.column(name))
    return rows
