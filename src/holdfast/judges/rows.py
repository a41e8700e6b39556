"""Rows of a table before a judge: batch by batch, and going on where a run ended.

A row is a mapping with `row_id`, `prompt`, `thinking`, `answer`, `closed` and `finish`;
where it has them, also with `request` (the prompt without its attack), `context`, and
`target` (an exact answer, which no judge is asked about).
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa

from holdfast.judges.base import (
    Exchange,
    Judge,
    JudgeIdentity,
    screen,
    screen_exact,
    thinking_as_response,
)
from holdfast.judges.degenerate import flaw
from holdfast.judges.rules.exact import is_correct
from holdfast.judges.rules.rules import JUDGE_ID
from holdfast.judges.verdict import Verdict
from holdfast.report.progress import Progress
from holdfast.study import Study
from holdfast.study.batches import ROW_ID, in_batches
from holdfast.study.files import DamagedTableError, read_table

Row = Mapping[str, Any]
JUDGED = pa.schema(
    [
        (ROW_ID, pa.string()),
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
BATCH = 64
NOT_YET = "not judged yet"
HARM_ALONE = "the judge measures harm, not refusal"


def judge_rows(
    study: Study,
    stage: str,
    rows: Sequence[Row],
    judge: Judge,
    progress: Progress,
    *,
    with_thinking: bool = False,
) -> pa.Table:
    """Judge rows batch by batch; what a broken run has judged is not asked again.

    `with_thinking`: Whether the thinking is judged as well.
    Returns: A table of `JUDGED`, in the order of the rows.
    """
    return in_batches(
        study,
        stage,
        rows,
        name=lambda row: str(row[ROW_ID]),
        length=lambda row: len(row["answer"]),
        batch_size=BATCH,
        work=lambda batch: pa.Table.from_pylist(
            verdicts_on(batch, judge, with_thinking=with_thinking), schema=JUDGED
        ),
        progress=progress,
        label=f"{judge.identity.label} judges",
    )


def verdicts_on(
    rows: Sequence[Row], judge: Judge, *, with_thinking: bool = False
) -> list[dict[str, Any]]:
    """Return the verdicts on rows as rows of `JUDGED`, in their order."""
    identity = judge.identity
    records = {row[ROW_ID]: without_judge(row, identity) for row in rows}
    asked = [row for row in rows if records[row[ROW_ID]] is None]
    shown = [exchange_of(row, identity) for row in asked]
    for row, verdict in zip(asked, judge.judge(shown), strict=True):
        records[row[ROW_ID]] = _judged(row, verdict)
    if with_thinking:
        thoughts = {
            row[ROW_ID]: thinking_as_response(each)
            for row, each in zip(asked, shown, strict=True)
            if row["thinking"].strip()
        }
        # What a cascade takes from the rules was calibrated on answers alone.
        said = getattr(judge, "inner", judge).judge(list(thoughts.values()))
        for name, verdict in zip(thoughts, said, strict=True):
            records[name] = (records[name] or {}) | {
                "thinking_verdict": verdict.outcome,
                "thinking_score": verdict.score,
            }
    return [record for record in records.values() if record is not None]


def judged_so_far(
    study: Study, stage: str, rows: Sequence[Row], identity: JudgeIdentity
) -> dict[str, dict[str, Any]]:
    """Return by row what an unfinished stage has judged, and what needs no judge.

    An answer that is no answer is seen without one, so that its rate needs no bounds.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in study.parts(stage):
        with suppress(DamagedTableError):
            found |= {each[ROW_ID]: each for each in read_table(path).to_pylist()}
    for row in rows:
        broken = screen(exchange_of(row, identity), identity.label)
        if row[ROW_ID] not in found and broken is not None:
            found[row[ROW_ID]] = _judged(row, broken)
    return found


def without_judge(row: Row, identity: JudgeIdentity) -> dict[str, Any] | None:
    """Return the record of a row that no judge is asked about; None for the others.

    A judge of harm alone does not tell a harmless request that was refused from one
    that was served.
    """
    if row.get("target") is not None:
        return mark_exact(row, identity)
    if identity.measures != "harm" or row.get("label") != "benign":
        return None
    label = identity.label
    broken = screen(exchange_of(row, identity), label)
    return _judged(row, broken or Verdict("unparsed", HARM_ALONE, label))


def exchange_of(row: Row, identity: JudgeIdentity) -> Exchange:
    """Return what a judge is shown of a row.

    A judge of refusal sees what the model saw. A judge of harm sees the request
    without its attack, since that is what the answer must not serve. Thinking that
    stopped by itself is all that the model said, and stands for its answer.
    """
    refusal = identity.measures == "refusal"
    inside = not row["closed"] and row["finish"] != "length" and not row["answer"]
    return Exchange(
        request=row["prompt"] if refusal else row.get("request") or row["prompt"],
        response=row["thinking"] if inside else row["answer"],
        thinking=row["thinking"] or None,
        closed=row["closed"],
        finish=row["finish"],
        context=None if refusal else row.get("context"),
    )


def _judged(row: Row, verdict: Verdict) -> dict[str, Any]:
    broken = verdict.flaw
    # The rules have looked for loops in all that they did not call degenerate.
    if broken is None and not (
        verdict.judge == JUDGE_ID and verdict.outcome != "degenerate"
    ):
        broken = flaw(row["answer"], row["closed"], row["finish"])
    return {
        ROW_ID: row[ROW_ID],
        "verdict": verdict.outcome,
        "score": verdict.score,
        "reason": verdict.reason,
        "judge": verdict.judge,
        "flaw": broken,
    }


def mark_exact(row: Row, identity: JudgeIdentity) -> dict[str, Any]:
    """Return the verdict on a row with an exact answer; no judge is asked."""
    broken = screen_exact(exchange_of(row, identity), EXACT)
    correct = broken is None and is_correct(row["answer"], row["target"])
    said = "the number is right" if correct else "the number is not the right one"
    return {
        ROW_ID: row[ROW_ID],
        "verdict": None if broken is None else broken.outcome,
        "reason": said if broken is None else broken.reason,
        "judge": EXACT,
        "correct": correct,
    }
