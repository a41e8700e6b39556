"""The answers of a study as the lines of the table that its page shows."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from holdfast.report.browse import BrowsedAnswer
from holdfast.session.evaluation_sources import TABLE
from holdfast.session.rows import Rollout

ROLLOUTS = "rollouts.parquet"
CUT = "cut at its limit"
FORCED = "thinking closed by force"


def browsed(
    rollouts: Sequence[Rollout], evaluated: Sequence[Mapping[str, Any]]
) -> list[BrowsedAnswer]:
    """Return every answer of a study.

    Args:
        rollouts: Rows of `rollouts.parquet`.
        evaluated: Rows of `evaluation.parquet`.
    """
    return [
        *(_of_rollout(row) for row in rollouts),
        *(_of_evaluation(row) for row in evaluated),
    ]


def _of_rollout(row: Rollout) -> BrowsedAnswer:
    return BrowsedAnswer(
        group=row.role,
        wrapper=row.wrapper,
        outcome=row.verdict,
        prompt=row.prompt,
        thinking=row.thinking,
        answer=row.answer,
        note=_note(row.reason, row.finish, forced_close=row.forced_close),
        file=ROLLOUTS,
    )


def _of_evaluation(row: Mapping[str, Any]) -> BrowsedAnswer:
    correct = {True: "correct", False: "wrong", None: "not judged"}[row["correct"]]
    return BrowsedAnswer(
        group=f"{row['suite']}: {row['kind']}",
        wrapper=row["wrapper"],
        outcome=row["verdict"] or correct,
        prompt=row["prompt"],
        thinking=row["thinking"],
        answer=row["answer"],
        note=_note(row["reason"], row["finish"], forced_close=row["forced_close"]),
        file=TABLE,
    )


def _note(reason: str | None, finish: str | None, *, forced_close: bool) -> str:
    """Return the judge's reason and what befell the answer."""
    parts: Iterable[str | None] = (
        reason,
        CUT if finish == "length" else None,
        FORCED if forced_close else None,
    )
    return "; ".join(part for part in parts if part)
