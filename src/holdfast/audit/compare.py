"""Two studies side by side, and what makes them hard to compare."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple, NotRequired, TypedDict

from holdfast.audit.words import answers
from holdfast.cliff.commitment.panel import ACCOUNTS
from holdfast.errors import InputError
from holdfast.evaluate.panel import PairedRow
from holdfast.evaluate.panel import name as condition
from holdfast.report.labels import CONTROLS, PROBE, headline
from holdfast.report.schema import Figure, Report, is_audited, is_figure, validate
from holdfast.report.text import (
    GROUPS,
    MEASURES,
    OUTCOMES,
    ROLES,
    WORDS,
    count_of,
    flatten,
    interval,
    plain,
    title,
)

NOTE = (
    "Whether intervals overlap is not a test. Two studies can differ although their "
    "intervals overlap, and intervals that do not overlap may differ because the "
    "settings do."
)


STAGES = ("probe", "trace", "heads", "ablate", "decide")
"""Stages whose settings are those of a report, where they have run."""


DRAWN = ("draws", "cheap", "temperature", "judge")
"""What accounts depend on beside the answers."""
UNDECIDED = {
    "value": None,
    "low": None,
    "high": None,
    "n": 0,
    "reason": "`holdfast decide` was not run",
}
"""An account of a study that was not asked for any."""


class Comparison(TypedDict):
    """Two studies side by side; JSON can hold it."""

    schema: str
    a: dict[str, Any]
    b: dict[str, Any]
    caution: str
    settings: list[dict[str, Any]]  # What differs, and why that matters.
    rows: list[dict[str, Any]]  # A figure of both, their difference and overlap.
    note: str
    paired: NotRequired[list[PairedRow]]


def compare(a: Report, b: Report) -> Comparison:
    """Lay two reports side by side.

    Returns: Settings that differ, those that bear on the figures first; then every
    figure of either, with the difference `b - a` and whether the intervals overlap. The
    difference is None where either has no value, or has answers that could not be
    judged.
    """
    _same_schema(a, b)
    validate(a)
    validate(b)
    settings = _settings(a, b)
    mattering = sum(row["matters"] for row in settings)
    caution = ""
    if mattering:
        noun = "setting that bears" if mattering == 1 else "settings that bear"
        caution = (
            f"The two studies differ in {mattering} {noun} on the figures. Read "
            "differences below as those of the whole set-up, not of the model alone."
        )
    return {
        "schema": a["schema"],
        "a": _side(a),
        "b": _side(b),
        "caution": caution,
        "settings": settings,
        "rows": _rows(a, b),
        "note": NOTE,
    }


def table(comparison: Comparison) -> list[list[str]]:
    """Put the rows of a comparison into words, for the page and the terminal.

    Returns: One row per figure; a row of one cell opens each section. A reason why
    there is no figure is given once a study.
    """
    rows = []
    told: dict[str, set[str]] = {"a": set(), "b": set()}
    overlap = {None: "", True: "overlap", False: "do not overlap"}
    for section, found in groupby(comparison["rows"], key=lambda row: row["section"]):
        rows.append([section])
        for row in found:
            sides = [_cell(row[side], row["share"], told[side]) for side in "ab"]
            rows.append(
                [row["metric"], *sides, _difference(row), overlap[row["overlap"]]]
            )
    return rows


def _same_schema(a: Report, b: Report) -> None:
    versions = a.get("schema"), b.get("schema")
    if versions[0] != versions[1]:
        raise InputError(
            "two reports of one schema version",
            f"{versions[0]!r} and {versions[1]!r}",
            "Make the older report anew with `holdfast report`.",
        )


def _side(report: Report) -> dict[str, Any]:
    return {
        "id": report["model"]["id"],
        "revision": report["model"]["revision"],
        "headline": headline(report),
        "answers": {answer.question: answer.word for answer in answers(report)},
    }


def _settings(a: Report, b: Report) -> list[dict[str, Any]]:
    """List what differs; settings that bear on the figures come first."""
    left, right = _resolved(a), _resolved(b)
    alone = [stage for stage in STAGES if _ran(a, stage) != _ran(b, stage)]
    rows: list[dict[str, Any]] = [
        {"setting": stage, "a": _ran(a, stage), "b": _ran(b, stage)}
        | {"matters": False, "why": "One study alone has its figures."}
        for stage in alone
    ]
    for path in dict.fromkeys([*left, *right]):
        one, two = left.get(path, "not set"), right.get(path, "not set")
        if one == two or path.partition(".")[0] in alone:
            continue
        # A setting counts if it changes what was asked, sampled or judged; the
        # first word that a path contains decides.
        known = WORDS["settings"].items()
        why = next((why for key, why in known if key in path), "")
        matters = bool(why)
        if path.startswith("data.") and _follows(one, two, left, right):
            matters, why = False, "Follows from the number of requests."
        rows.append(
            {"setting": path, "a": one, "b": two, "matters": matters, "why": why}
        )
    return sorted(rows, key=lambda row: not row["matters"])


def _ran(report: Report, stage: str) -> str:
    found = report if stage == "decide" else report["settings"]
    return "run" if found.get(stage) else "not run"


def _follows(one: Any, two: Any, left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Return whether requests differ because another number of them was asked for.

    Of authored requests the hash is of those that were taken, not of a file.
    """
    limit = "rollout.limit"
    named = [[each.rpartition(" ")[0] for each in side] for side in (one, two)]
    authored = all(name.startswith("authored") for name in named[0])
    return left.get(limit) != right.get(limit) and named[0] == named[1] and authored


def _resolved(report: Report) -> dict[str, Any]:
    blocks = {"model": report["model"], **report["settings"]}
    if "judge" in report:
        judge = report["judge"]
        blocks["judge"] = {key: judge[key] for key in judge if key != "calibration"}
    if "evaluation" in report:
        known = report["evaluation"]
        blocks["evaluation"] = {key: known[key] for key in ("judge", "generation")}
    if curve := report.get("decide", {}).get("curve"):
        blocks["decide"] = {key: curve[key] for key in DRAWN}
    found = dict(flatten(blocks))
    for source in report["data"]["sources"]:
        path = f"data.{source['role']}"
        found.setdefault(path, []).append(f"{source['source']} {source['sha256'][:12]}")
    return found


def _rows(a: Report, b: Report) -> list[dict[str, Any]]:
    left, right = (
        {e[:2]: e for e in (*entries(report), *_accounts(report, (a, b)))}
        for report in (a, b)
    )
    known = left | right
    order = list(dict.fromkeys(section for section, _ in [*left, *right]))
    rows = []
    for key in sorted(known, key=lambda key: order.index(key[0])):
        sides = [found[key].figure if key in found else None for found in (left, right)]
        one, two = sides
        rows.append(
            {
                "section": known[key].section,
                "metric": known[key].metric,
                "share": known[key].share,
                "a": one,
                "b": two,
                "difference": _minus(two, one),
                "overlap": _overlap(one, two),
            }
        )
    return rows


def _minus(b: Figure | None, a: Figure | None) -> float | None:
    """Return a difference, None where answers that were not judged could make it."""
    if a is None or b is None or a["value"] is None or b["value"] is None:
        return None
    if a.get("unjudged") or b.get("unjudged"):
        return None
    return b["value"] - a["value"]


def _overlap(a: Figure | None, b: Figure | None) -> bool | None:
    if a is None or b is None:
        return None
    if a["low"] is None or a["high"] is None or b["low"] is None or b["high"] is None:
        return None
    return a["low"] <= b["high"] and b["low"] <= a["high"]


def _cell(figure: Figure | None, share: bool, told: set[str]) -> str:
    if figure is None:
        return "not in this study"
    written = interval(figure, share=share)
    if figure["value"] is None:
        if written in told:
            return "not measured, as above"
        told.add(written)
        return written
    return f"{written}, {count_of(figure, share=share)}"


def _difference(row: dict[str, Any]) -> str:
    if row["difference"] is None:
        return ""
    if row["share"]:
        points = 100 * row["difference"]
        return f"{'+' * (points > 0)}{plain(points, 0)} points"
    return f"{'+' * (row['difference'] > 0)}{plain(row['difference'])}"


class Entry(NamedTuple):
    """One figure of a report."""

    section: str
    metric: str
    share: bool
    figure: Figure


def entries(report: Report) -> Iterator[Entry]:
    """Yield every figure of a report with its section and its name."""
    yield from _suites(report)
    yield from _sinks(report)
    if not is_audited(report):
        return
    success = report["attack_success"]
    section = "Attack success"
    yield Entry(section, ROLES["harmful"], True, success["harmful"])
    yield Entry(section, ROLES["wrapped"], True, success["wrapped"])
    for name, shares in success["by_wrapper"].items():
        yield Entry("By wrapper", f"{name}: harmful", True, shares["attack_success"])
        benign = shares["benign_compliance"]
        yield Entry("By wrapper", f"{name}: harmless", True, benign)
    for role, outcomes in report["outcomes"].items():
        name = f"Answers: {ROLES[role]}"
        for key, figure in outcomes.items():
            if is_figure(figure):
                yield Entry(name, OUTCOMES[key], True, figure)
    yield from _scores(report)


def _scores(report: Report) -> Iterator[Entry]:
    """Yield the figures of trace, controls and probe."""
    for group, measures in report["trace"].items():
        for key, figure in measures.items():
            if is_figure(figure):
                name = f"End of thinking: {title(group, GROUPS)}"
                yield Entry(name, title(key, MEASURES), False, figure)
    for block, known in (("controls", CONTROLS), ("probe", PROBE)):
        for key, figure in report[block].items():
            if is_figure(figure):
                name = known[key].name if key in known else title(key)
                yield Entry(block.capitalize(), name, False, figure)


def _accounts(report: Report, both: Iterable[Report]) -> Iterator[Entry]:
    """Yield the shares of accounts, or why there are none where only another has."""
    if not any("account" in each["verdict"] for each in both):
        return
    unread = report.get("decide", {}).get("curve", {}).get("unread")
    known = report["verdict"].get("account", dict.fromkeys(ACCOUNTS, UNDECIDED))
    for name, words in ACCOUNTS.items():
        figure = known[name]
        if unread and name == "fell_at_template":
            # None was seen to fall, since nothing was read that could have shown it.
            figure = figure | dict.fromkeys(("value", "low", "high"))
            figure |= {"reason": unread}
        yield Entry("Accounts of complied harmful answers", words, True, figure)


def _suites(report: Report) -> Iterator[Entry]:
    """Yield the figures of an evaluation, if there was one."""
    for row in report.get("evaluation", {}).get("rows", ()):
        name = f"{condition(row)}: {title(row['measure'])}"
        yield Entry(f"Suite {row['suite']}", name, True, row["figure"])


def _sinks(report: Report) -> Iterator[Entry]:
    """Yield the figures of the last model whose sink was looked at, if one was."""
    for each in report.get("sinks", {}).get("checkpoints", ())[-1:]:
        section = "Attention to the first token"
        yield Entry(section, "Heads that diverge", False, each["positive"])
        yield Entry(section, "Harmful text", True, each["harmful"])
        yield Entry(section, "Reference text", True, each["reference"])
