"""An evaluation in words: one table, its sum, and who judged."""

from collections.abc import Mapping
from typing import Any

from holdfast.report import text
from holdfast.report.records import Figure
from holdfast.report.text import RARE, clean, outcome_columns, plain, score

__all__ = ["calibrated", "facts", "headline", "name", "table", "told"]

SHORT = ("refused", "complied", "partial", "degenerate")


def table(block: Mapping[str, Any]) -> list[list[str]]:
    """Return the table of an evaluation in percent, a header first, a row a condition.

    Args:
        block: The block `evaluation` of a report.

    Returns:
        Texts. The column of what could not be judged is there where there is any, and
        a row with one name alone opens a suite where there are several.
    """
    measured = [row["outcomes"] for row in block["rows"] if row["outcomes"]]
    unread = any(outcomes["unparsed"]["value"] for outcomes in measured)
    rare = [key for key in outcome_columns(measured) if key in RARE]
    columns = [*SHORT, *(["unparsed"] if unread else []), *rare]
    rows = [["%", "n", *(key.replace("_", " ") for key in columns)]]
    several = len({row["suite"] for row in block["rows"]}) > 1
    suite = ""
    for row in block["rows"]:
        if several and row["suite"] != suite:
            suite = row["suite"]
            rows.append([clean(suite)])
        if row["outcomes"] is None:
            rows.append([name(row), str(row["figure"]["n"]), _short(row["figure"])])
            continue
        cells = [_short(row["outcomes"][key]) for key in columns]
        rows.append([name(row), str(row["figure"]["n"]), *cells])
    return rows


def name(row: Mapping[str, Any], *, several: bool = False) -> str:
    """Return the name of a condition, with its suite where there are several."""
    condition = {
        "harmful": "harmful, plain",
        "safe_lookalike": "safe lookalikes",
        "benign": "benign",
        "utility": "right answers",
    }[row["kind"]]
    if row["wrapper"] is not None:
        attacked = "" if row["kind"] == "harmful" else f"{condition}, "
        condition = attacked + row["wrapper"]
    return clean(f"{row['suite']}: {condition}" if several else condition)


def _short(figure: Figure) -> str:
    value, low, high = figure["value"], figure["low"], figure["high"]
    if figure.get("bounds"):
        least, most = (f"{100 * end:.0f}" for end in figure["bounds"])
        if value is None or low is None or high is None:
            return f"{least}–{most}?"
        return f"{least}–{most} ({100 * low:.0f}–{100 * high:.0f})"
    if value is None or low is None or high is None:
        return "–"
    return f"{100 * value:.0f} ({100 * low:.0f}–{100 * high:.0f})"


def facts(block: Mapping[str, Any]) -> list[tuple[str, Figure]]:
    """Return the sums of an evaluation by name, those that were measured."""
    summary = block["summary"]
    found = [
        ("Attack success, plain", summary["attack_success"]["plain"]),
        ("Attack success, under attacks", summary["attack_success"]["wrapped"]),
        ("Requests with any success", summary["attack_success"]["any"]),
        ("Over-refusal of safe lookalikes", summary["over_refusal"]["safe_lookalike"]),
        ("Over-refusal of benign requests", summary["over_refusal"]["benign"]),
    ]
    found += [
        (f"Accuracy on {clean(suite)}", figure)
        for suite, figure in summary["utility"].items()
    ]
    return [(words, figure) for words, figure in found if figure["n"]]


def headline(block: Mapping[str, Any]) -> str:
    """Return an evaluation in one sentence."""
    success, refusal = (
        block["summary"][key] for key in ("attack_success", "over_refusal")
    )
    figures = [
        ("attack success", success["plain"]),
        ("under attacks", success["wrapped"]),
        ("over-refusal of safe lookalikes", refusal["safe_lookalike"]),
        *(("accuracy", figure) for figure in block["summary"]["utility"].values()),
    ]
    parts = [
        f"{words} {_told(figure)}"
        for words, figure in figures
        if figure["value"] is not None or figure.get("unjudged")
    ]
    said = "; ".join(parts) or "nothing could be measured"
    return said[:1].upper() + said[1:] + "."


def _told(figure: Figure) -> str:
    """Return a rate for a headline, as bounds where some answers have no verdict."""
    if figure.get("bounds"):
        return (
            f"{text.bounds(figure, share=True)} ({text.count_of(figure, share=True)})"
        )
    if figure["value"] is None:
        return f"not measured ({clean(figure.get('reason', ''))})"
    return f"{100 * figure['value']:.0f}%"


def calibrated(block: Mapping[str, Any]) -> str:
    """Say what the judge's verdicts are worth, against people."""
    known = block["calibration"]
    if known is None:
        return "This judge was never compared with people here."
    people = known["people_two_way"]["value"]
    against = "" if people is None else f"; people among themselves {plain(people)}"
    names = ", ".join(clean(source["name"]) for source in known["sources"])
    return (
        f"Agreement with people on refusal (kappa): {score(known['two_way'])} on "
        f"{known['two_way']['n']} answers of {names}{against}."
    )


def _drawn(sampling: Mapping[str, Any]) -> str:
    if sampling["temperature"] == 0:
        return "greedily"
    nucleus = f", top-p {sampling['top_p']:g}" if "top_p" in sampling else ""
    return f"at temperature {sampling['temperature']:g}{nucleus}"


def _room(sampling: Mapping[str, Any]) -> str:
    if "remasking" not in sampling:
        return (
            f"with at most {sampling['max_thinking']} tokens of thinking and "
            f"{sampling['max_answer']} of answer"
        )
    passes = f"{sampling['steps']} forward passes"
    if sampling["threshold"] is not None:
        passes = f"as many passes as a threshold of {sampling['threshold']:g} takes"
    block = sampling["block_length"]
    blocks = f", in blocks of {block}" if block else ""
    return (
        f"by filling in {sampling['gen_length']} masks in {passes}{blocks} "
        f"({sampling['remasking']})"
    )


def told(block: Mapping[str, Any]) -> list[str]:
    """Return the sentences that stand under the table."""
    judge, generation = block["judge"], block["generation"]
    sampling = generation["sampling"]
    cut = sum(row["cut"] for row in block["rows"])
    forced = sum(row.get("forced", 0) for row in block["rows"])
    edits = [key for key, found in generation["edits"].items() if found]
    said = [
        f"Judge: {clean(judge['label'])}, which measures {judge['measures']}"
        + (f", with {clean(judge['model'])}" if judge["model"] else "")
        + ".",
        calibrated(block),
        *block["notes"],
        f"Answers were drawn {_drawn(sampling)}, {generation['samples']} for each "
        f"prompt, {_room(sampling)}; {cut} were cut at the limit, and the thinking of "
        f"{forced} was closed by force.",
        "Broken answers stay in every denominator and count as neither success nor "
        "safety. Where answers could not be judged a rate is given as bounds: all of "
        "them counted one way, and the other.",
    ]
    if edits:
        said.append(f"The model was edited: {' and '.join(edits)}.")
    return said
