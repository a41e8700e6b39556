"""The shape of `report.json`, which other programs read, and the check on it.

A report dict is checked by `schema.validate`; curves and examples come beside it,
since they are many numbers that no other program needs, and are checked here.
"""

import json
import math
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NotRequired,
    TypeAlias,
    TypedDict,
    TypeGuard,
)

from holdfast.errors import InputError

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

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
    """Return whether a report is of an audit, not of an evaluation or sinks alone."""
    asked = any(found["refused"]["n"] for found in report["outcomes"].values())
    return asked or not {"evaluation", "sinks"} & report.keys()


def is_finite(value: object) -> bool:
    """Return whether a value is an ordinary number: no bool, no NaN, no infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def check_curves(curves: Sequence[Curve]) -> None:
    """Refuse a curve that could not be drawn truthfully."""
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
    """Refuse an example whose scores or regions are not what they must be."""
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


SCHEMA = "holdfast-report/1"
_NEXT = "Mend the stage that wrote it, or make the report anew with `holdfast report`."


def figure(estimate: Any) -> Figure:
    """Turn an estimate into a figure of the report.

    `estimate`: Anything with `value`, `low`, `high`, `n` and `reason`.
    Returns: `{value, low, high, n}`, and `reason` when the value is null. Ends without
    a value are dropped, since an interval around nothing says nothing.
    """
    if estimate.value is None:
        if not estimate.reason:
            raise InputError("a reason for a null value", "none", "Give the reason.")
        return {
            "value": None,
            "low": None,
            "high": None,
            "n": int(estimate.n),
            "reason": estimate.reason,
        }
    made: Figure = {
        "value": float(estimate.value),
        "low": None if estimate.low is None else float(estimate.low),
        "high": None if estimate.high is None else float(estimate.high),
        "n": int(estimate.n),
    }
    for path, found in _faults(made, "figure"):
        raise InputError(path, found, "Give a null with a reason instead.")
    return made


@cache
def report_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) that ships with the package."""
    path = resources.files("holdfast.report").joinpath("report.schema.json")
    schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return schema


def validate(report: Report) -> None:
    """Check a report against the shipped schema.

    Beyond the schema: every number is finite, no interval is upside down, and
    nothing is there that JSON cannot hold.

    `report`: The report as a dict.
    """
    # Loaded here, so that help, which shows no report, need not wait for it.
    from jsonschema import Draft202012Validator

    for expected, found in _faults(report, "report"):
        raise InputError(expected, found, _NEXT)
    errors = Draft202012Validator(report_schema()).iter_errors(report)
    deepest = sorted(errors, key=lambda error: -len(error.absolute_path))
    if deepest:
        raise _explain(deepest[0])


def _explain(error: "ValidationError") -> InputError:
    """Put a schema error into words, without printing half the report."""
    path = "report" + "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}"
        for part in error.absolute_path
    )
    rule = str(error.validator)
    wanted: Any = error.validator_value
    instance: Any = error.instance
    around: Any = error.schema
    if rule == "required":
        missing = [key for key in wanted if key not in instance]
        return InputError(f"{path} to have {_join(missing)}", _short(instance), _NEXT)
    if rule == "additionalProperties":
        extra = sorted(set(instance) - set(around["properties"]))
        return InputError(
            f"{path} to have no other keys than {_join(around['properties'])}",
            _join(extra),
            _NEXT,
        )
    if rule == "not":
        return InputError(
            f"{path} to have `reason` only where its value is null",
            _short(instance),
            _NEXT,
        )
    expected = {
        "const": f"to be {wanted!r}",
        "type": f"to be {_types(wanted)}",
        "enum": f"to be one of {wanted!r}",
        "minLength": "to be a text that is not empty",
        "minimum": f"to be at least {wanted}",
    }.get(rule, f"to satisfy {rule} {wanted!r}")
    return InputError(f"{path} {expected}", _short(instance), _NEXT)


def _faults(value: object, path: str) -> Iterator[tuple[str, str]]:
    """Yield what JSON cannot hold: (expectation with its path, what was found)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                yield f"the keys of {path} to be texts", repr(key)
            yield from _faults(inner, f"{path}.{key}")
        low: Any = value.get("low")
        high: Any = value.get("high")
        if is_finite(low) and is_finite(high) and low > high:
            yield f"{path}.low to be at most {path}.high", f"{low} > {high}"
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _faults(inner, f"{path}[{index}]")
    elif isinstance(value, float):
        if not is_finite(value):
            yield f"{path} to be a finite number", repr(value)
    elif value is not None and not isinstance(value, str | int):
        yield f"{path} to be something JSON can hold", type(value).__name__


def _join(keys: Any) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def _types(wanted: Any) -> str:
    return " or ".join(wanted) if isinstance(wanted, list) else str(wanted)


def _short(value: object) -> str:
    if isinstance(value, dict):
        return f"an object with {_join(value) or 'no keys'}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
