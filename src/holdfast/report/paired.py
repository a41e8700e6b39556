"""Two evaluations on the same prompts, in words."""

from collections.abc import Sequence
from typing import TypedDict

from holdfast.report.evaluation import name
from holdfast.report.records import Figure
from holdfast.report.text import missing, plain, title

__all__ = ["PairedRow", "paired_table"]


class PairedRow(TypedDict):
    """One condition of two evaluations, on the prompts that both have."""

    suite: str
    kind: str
    wrapper: str | None
    measure: str
    rows: int
    requests: int
    unjudged: int
    gained: int
    lost: int
    a: float | None
    b: float | None
    difference: Figure
    test: str
    p_value: float | None


def paired_table(rows: Sequence[PairedRow]) -> list[list[str]]:
    """Put paired differences into words, a header first.

    Args:
        rows: What `stages.compare` adds to a comparison of two evaluations.
    """
    made = [["", "requests", "A", "B", "B minus A", "p", "test"]]
    several = len({row["suite"] for row in rows}) > 1
    for row in rows:
        chance = row["p_value"]
        made.append(
            [
                f"{name(row, several=several)}: {title(row['measure'])}",
                str(row["requests"]),
                _percent(row["a"]),
                _percent(row["b"]),
                _points(row["difference"]),
                "" if chance is None else f"{chance:.2g}",
                row["test"],
            ]
        )
    return made


def _percent(share: float | None) -> str:
    return "not all judged" if share is None else f"{100 * share:.0f}%"


def _points(difference: Figure) -> str:
    """Write a difference in points with its interval, as bounds where it has them."""
    known = difference.get("bounds")
    said = "" if known is None else _range(*known)
    if difference["value"] is None:
        return f"{said} points: {missing(difference)}" if said else missing(difference)
    ends = [end for end in (difference["low"], difference["high"]) if end is not None]
    return f"{said or plain(100 * difference['value'], 0)} ({_range(*ends)}) points"


def _range(*ends: float) -> str:
    return " to ".join(plain(100 * end, 0) for end in ends)
