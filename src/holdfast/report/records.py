"""The records that a report is drawn from, and the checks on them.

A report dict is checked by `schema.validate`; curves and examples come beside it,
since they are many numbers that no other program needs, and are checked here.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict, TypeGuard

from holdfast.errors import InputError

__all__ = [
    "REGIONS",
    "Curve",
    "Example",
    "Figure",
    "Point",
    "Region",
    "Report",
    "Token",
    "check_curves",
    "check_examples",
    "is_audited",
    "is_figure",
    "is_finite",
]

Region: TypeAlias = Literal["prompt", "thinking", "end_template", "answer"]
Report: TypeAlias = dict[str, Any]
REGIONS: tuple[Region, ...] = ("prompt", "thinking", "end_template", "answer")


class Figure(TypedDict):
    """One number of the report, with its 95 % interval."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: NotRequired[str]
    bounds: NotRequired[list[float]]
    unjudged: NotRequired[int]


class Point(TypedDict):
    """The mean score at one offset; offset 0 opens the end-of-thinking template."""

    offset: int
    mean: float | None
    low: float | None
    high: float | None
    n: int


class Curve(TypedDict):
    """The mean trace of one group."""

    group: str
    points: Sequence[Point]


class Token(TypedDict):
    """One token with its refusal score; the score is None where none was read."""

    text: str
    score: float | None
    region: Region


class Example(TypedDict):
    """One conversation, shown token by token."""

    title: str
    group: str
    verdict: str
    tokens: Sequence[Token]


def is_figure(value: object) -> TypeGuard[Figure]:
    """Tell a figure from the scalars that may stand beside it in a block."""
    return isinstance(value, dict)


def is_audited(report: Report) -> bool:
    """Tell whether a report is of an audit, not of an evaluation or of sinks alone."""
    asked = any(found["refused"]["n"] for found in report["outcomes"].values())
    return asked or not {"evaluation", "sinks"} & report.keys()


def is_finite(value: object) -> bool:
    """Say whether a value is an ordinary number: no bool, no NaN, no infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def check_curves(curves: Sequence[Curve]) -> None:
    """Refuse a curve that could not be drawn truthfully.

    Args:
        curves: Mean traces, one a group.

    Raises:
        InputError: If an offset or a count is no whole number, a score is not
            finite, or two points of a curve share an offset.
    """
    for index, curve in enumerate(curves):
        seen: set[int] = set()
        for place, point in enumerate(curve["points"]):
            where = f"curves[{index}].points[{place}]"
            _whole(point["offset"], f"{where}.offset")
            _whole(point["n"], f"{where}.n")
            if point["offset"] in seen:
                raise _refuse(f"{where}.offset", "one point an offset", point["offset"])
            seen.add(point["offset"])
            _number_or_none(point["mean"], f"{where}.mean")
            _number_or_none(point["low"], f"{where}.low")
            _number_or_none(point["high"], f"{where}.high")


def check_examples(examples: Sequence[Example]) -> None:
    """Refuse an example whose scores or regions are not what they must be.

    Args:
        examples: Conversations, token by token.

    Raises:
        InputError: If a score is neither None nor within 0 and 1, or a region has
            another name than those of `REGIONS`.
    """
    for index, example in enumerate(examples):
        for place, token in enumerate(example["tokens"]):
            where = f"examples[{index}].tokens[{place}]"
            score = token["score"]
            _number_or_none(score, f"{where}.score")
            if score is not None and not 0 <= score <= 1:
                raise _refuse(f"{where}.score", "a score between 0 and 1", score)
            if token["region"] not in REGIONS:
                names = ", ".join(REGIONS)
                raise _refuse(f"{where}.region", f"one of {names}", token["region"])


def _whole(value: object, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _refuse(where, "a whole number", value)


def _number_or_none(value: object, where: str) -> None:
    if value is not None and not is_finite(value):
        raise _refuse(where, "a finite number or null", value)


def _refuse(where: str, expected: str, found: object) -> InputError:
    return InputError(
        f"{where} to be {expected}",
        repr(found),
        "Mend the stage that wrote this record and run `holdfast report` again.",
    )
