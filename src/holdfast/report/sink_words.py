"""Sink masses and divergences as a person reads them: in percent of attention."""

from collections.abc import Mapping
from typing import Any

from holdfast.report.records import Figure
from holdfast.report.text import clean, missing, plain

__all__ = ["PAIRING", "POSITIONS", "count", "mass", "points", "share", "step_name"]

PAIRING = {
    "prompt": "two texts on one prompt, over equal positions",
    "none": "all harmful with all reference texts, as published",
}
POSITIONS = {
    "all": "all tokens after the first",
    "response": "tokens after the prompt",
}


def mass(figure: Figure) -> str:
    """Write a sink mass as a share of attention, as `12.30% (11.02 to 13.61%)`."""
    if figure["value"] is None:
        return missing(figure)
    digits = _digits(figure)
    return f"{_hundredfold(figure['value'], digits)}% ({_ends(figure, digits)}%)"


def share(figure: Figure) -> str:
    """Write a sink mass alone, as `12.30%`."""
    if figure["value"] is None:
        return missing(figure)
    return f"{_hundredfold(figure['value'], _digits(figure))}%"


def points(figure: Figure) -> str:
    """Write a divergence in percentage points with its sign: `+0.35 (0.10 to 0.61)`."""
    if figure["value"] is None:
        return missing(figure)
    sign, digits = "+" if figure["value"] > 0 else "", _digits(figure)
    return f"{sign}{_hundredfold(figure['value'], digits)} ({_ends(figure, digits)})"


def count(figure: Figure) -> str:
    """Write a number of heads with its interval, as `41 (30 to 52)`."""
    if figure["value"] is None:
        return missing(figure)
    ends = [figure["low"], figure["high"]]
    if None in ends:
        return plain(figure["value"], 0)
    return f"{plain(figure['value'], 0)} ({_plain(ends[0])} to {_plain(ends[1])})"


def step_name(checkpoint: Mapping[str, Any]) -> str:
    """Return what a checkpoint is called: its step, else the end of its name."""
    if checkpoint["step"] is not None:
        return f"step {checkpoint['step']}"
    return clean(str(checkpoint["name"]).rstrip("/").rsplit("/", 1)[-1])


def _digits(figure: Figure) -> int:
    """Return as many digits as show the two first of the largest end."""
    ends = [abs(figure[key] or 0.0) for key in ("value", "low", "high")]
    largest = 100 * max(ends)
    fits = (n for n in (2, 3) if not largest or largest >= 10.0 ** (1 - n))
    return next(fits, 4)


def _ends(figure: Figure, digits: int) -> str:
    low, high = figure["low"], figure["high"]
    if low is None or high is None:
        return "no interval"
    return f"{_hundredfold(low, digits)} to {_hundredfold(high, digits)}"


def _hundredfold(number: float, digits: int) -> str:
    return plain(100 * number, digits)


def _plain(number: float | None) -> str:
    return plain(number or 0.0, 0)
