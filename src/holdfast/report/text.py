"""Figures and names as a person reads them; the one place that formats numbers.

Every number is written by these functions, so that the page, the figures and the
command line say the same thing in the same way.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from typing import Any

from holdfast.report.schema import Figure, is_figure
from holdfast.stats.percent import percent

WORDS: dict[str, Any] = json.loads(
    resources.files("holdfast.report").joinpath("labels.json").read_text("utf-8")
)
"""Names of figures and what they tell, by kind and key of the report."""
ROLES: dict[str, str] = WORDS["roles"]
OUTCOMES: dict[str, str] = WORDS["outcomes"]
GROUPS: dict[str, str] = WORDS["groups"]
MEASURES: dict[str, str] = WORDS["measures"]
RARE = ("ended_inside", "flag_loop", "flag_ended_inside")
"""Columns of a table of outcomes that are shown where any row has them."""
_WORDS = {"auroc": "AUROC", "l2": "L2", "id": "ID", "sha256": "SHA-256"}
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def title(key: str, known: Mapping[str, str] | None = None) -> str:
    """Return the words for a key, the known ones first.

    `key`: A key of the report, as `second_source_auroc`.
    """
    if known and key in known:
        return known[key]
    words = [_WORDS.get(word, word) for word in re.split(r"[_\s]+", key) if word]
    joined = clean(" ".join(words))
    return joined[:1].upper() + joined[1:]


def clean(text: str) -> str:
    """Replace what neither HTML nor SVG may hold: control characters, surrogates."""
    return _CONTROL.sub("\ufffd", text)


def plain(number: int | float, digits: int = 2) -> str:
    """Write a number with a true minus sign and no negative zero."""
    written = f"{number:.{digits}f}"
    if float(written) == 0:
        written = written.removeprefix("-")
    return written.replace("-", "−")


def _hundredths(number: int | float) -> str:
    """Write two digits, and a third where two would read as 0 or 1 and it is not."""
    written = plain(number)
    if written in ("0.00", "1.00", "−1.00") and number not in (0, 1, -1):
        return plain(number, 3)
    return written


def span(figure: Figure, *, share: bool = False) -> str:
    """Write the interval of a figure, as `30 to 61%` or `0.65 to 0.78`."""
    low, high = figure["low"], figure["high"]
    if low is None or high is None:
        return "no interval"
    if share:
        return f"{percent(low)} to {percent(high)}%"
    return f"{_hundredths(low)} to {_hundredths(high)}"


def value(figure: Figure, *, share: bool = False) -> str:
    """Write the value of a figure alone, as `45%` or `0.72`, or why it is missing.

    A figure over answers that could not all be judged is written as its bounds.
    """
    number = figure["value"]
    known = bounds(figure, share=share) if figure.get("bounds") else ""
    if number is None:
        return f"{known}, {missing(figure)}" if known else missing(figure)
    if known:
        return known
    return f"{percent(number)}%" if share else _hundredths(number)


def interval(figure: Figure, *, share: bool = False) -> str:
    """Write a figure as `45% (30 to 61%)` or `0.72 (0.65 to 0.78)`, or why not."""
    if figure["value"] is None:
        return value(figure, share=share)
    return f"{value(figure, share=share)} ({span(figure, share=share)})"


def rate(figure: Figure) -> str:
    """Write a share with its interval, or the reason why there is none."""
    return interval(figure, share=True)


def score(figure: Figure) -> str:
    """Write a score with its interval, or the reason why there is none."""
    return interval(figure)


def missing(figure: Figure) -> str:
    """Say why a figure has no value."""
    return f"not measured: {clean(figure.get('reason', 'no reason was given'))}"


def shared_reason(block: Mapping[str, Any]) -> str | None:
    """Return why a whole block has no figure, where one reason says it for all.

    Returns: The reason; None where a figure has a value, reasons differ, or there is
    one figure at most.
    """
    found = [each for each in block.values() if is_figure(each)]
    reasons = {each.get("reason") for each in found}
    measured = any(each["value"] is not None for each in found)
    if len(found) < 2 or len(reasons) != 1 or measured:
        return None
    return clean(str(reasons.pop())).rstrip(".")


def bounds(figure: Figure, *, share: bool = False) -> str:
    """Write the bounds of a figure, as `20 to 60%`; they must be there."""
    low, high = figure["bounds"]
    if share:
        return f"{percent(low)} to {percent(high)}%"
    return f"{_hundredths(low)} to {_hundredths(high)}"


def count_of(figure: Figure, *, share: bool = False) -> str:
    """Write `18 of 40` for a share, `n = 40` for anything else.

    Returns: The count of a share only where it is a whole number: a share that was
    averaged over requests has none.
    """
    number, n = figure["value"], figure["n"]
    if figure.get("unjudged"):
        return f"{figure['unjudged']} of {n} not judged"
    if number is not None and share and n:
        count = round(number * n)
        if abs(number * n - count) < 1e-6 * n:
            return f"{count} of {n}"
    return f"n = {n}"


def scalar(leaf: object) -> str:
    """Write a setting as text that a person can read."""
    if leaf is None:
        return "none"
    if isinstance(leaf, bool):
        return "yes" if leaf else "no"
    if isinstance(leaf, float):
        return f"{leaf:g}".replace("-", "−")
    if isinstance(leaf, list):
        return ", ".join(scalar(item) for item in leaf) or "none"
    return visible(clean(str(leaf)))


def visible(text: str) -> str:
    """Show line breaks as signs, so that a template is readable on one line."""
    return text.replace("\n", "↵").replace("\t", "→")


def flatten(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of nested dicts with its dotted path, in order."""
    for key, inner in block.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(inner, dict) and inner:
            yield from flatten(inner, path)
        else:
            yield path, None if inner == {} else inner


def shown_token(text: str, *, one_line: bool = False) -> str:
    """Prepare a token's text: nothing invisible, nothing that turns the page around.

    `one_line`: Whether a line break is shown as a sign only.
    Returns: The text, with a sign before each line break.
    """
    return still(text).replace("\n", "↵" if one_line else "↵\n")


def still(text: str) -> str:
    """Replace what a page may not hold, and what would turn the text around it."""
    return "".join(
        "\ufffd" if unicodedata.bidirectional(char) in _TURNING else char
        for char in clean(text)
    )


_TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def closed_by_force(forced: int, n: int) -> str:
    """Return the sentence on answers whose thinking was closed by force."""
    return (
        f"The thinking of {forced} of {n} answers ran out of its budget and was closed "
        "by force."
    )


def cut_at_limit(cut: int, n: int) -> str:
    """Return the sentence on answers that the token limit cut."""
    return (
        f"{cut:,} of {n:,} answers were cut at the token limit and judged by what was "
        "written until then; a higher --max-answer lets them end."
    )


def outcome_columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the columns of a table of outcomes, and their names."""
    given = list(rows)
    shown = {
        key for key in RARE if any(key in row and row[key]["value"] for row in given)
    }
    return {
        key: name for key, name in OUTCOMES.items() if key not in RARE or key in shown
    }


def cascade(record: Mapping[str, Any]) -> str:
    """Say what a cascade left to the rules, and what that is worth."""
    figure = record["differ"]
    said = (
        f"Cascade: the rules decided {record['taken']} of {record['judged']} answers, "
        "of which they were sure; "
    )
    if figure["value"] is None:
        return f"{said}none of them was checked, so that nothing is known of the error."
    worst = record["taken"] / record["judged"] * figure["high"]
    return (
        f"{said}of {figure['n']} that were checked the judge differs on "
        f"{value(figure, share=True)} ({span(figure, share=True)}), so that "
        f"a rate over all answers is at most {worst:.3f} from that of the judge alone."
    )
