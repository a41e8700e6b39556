"""Detectors on the signal, on the page and on the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from holdfast.dynamics.panel import DETECTORS
from holdfast.report import text
from holdfast.report.section import (
    Cell,
    Heading,
    Number,
    Paragraph,
    Part,
    Section,
    Sentences,
    Table,
    table_of,
)


def fitted_section(facts: Mapping[str, Any]) -> Section:
    """Return how many requests were fitted on, and the thresholds."""
    counts = facts["requests"]
    thresholds = [
        each | {"detector": name}
        for name, found in facts["detectors"].items()
        for each in found["thresholds"]
    ]
    table = table_of(
        "Thresholds",
        thresholds,
        {
            "Detector": _name,
            "False positives": lambda each: f"{each['level']:g}",
            "Threshold": lambda each: f"{each['value']:.4g}",
            "95 % interval": lambda each: f"{each['low']:.4f} to {each['high']:.4f}",
        },
    )
    fitted = (
        f"Fitted on {counts['train']} benign requests, calibrated on "
        f"{counts['calibration']} others."
    )
    return Section("", [Sentences([fitted]), table])


def section(block: Mapping[str, Any]) -> Section:
    """Return what page and terminal show of detectors.

    `block`: The block `guard` of a report.
    """
    title = "Detectors on the signal"
    return Section(title, [*_parts(block)], key="guard", link="Detectors")


def _parts(block: Mapping[str, Any]) -> Iterator[Part]:
    requests, reported = block["facts"]["requests"], block["reported"]
    within = {row["detector"]: row["auroc"] for row in block["within_wrappers"]}
    yield Sentences([recommendation(block)])
    yield Paragraph(
        f"All were fitted on {requests['train']} benign requests alone, and their "
        f"thresholds set on {requests['calibration']} others. The detector was chosen "
        "on some attack families and is reported on others."
    )
    yield Sentences(block["notes"], "warning")
    shares = {
        "Detected": "attack_complied",
        "Benign compliance flagged": "benign_complied",
        "Refused attacks flagged": "attack_refused",
    }
    levels = reported[0]["levels"] if reported else []
    columns = [f"{name} at {level['level']:g}" for level in levels for name in shares]
    rows = [
        [
            _name(row),
            _number(row["auroc"], count=True),
            _number(row.get("auroc_minus_published")),
            _number(within.get(row["detector"])),
            *(
                _number(level[group], share=True)
                for level in row["levels"]
                for group in shares.values()
            ),
        ]
        for row in reported
    ]
    first = ["Detector", "AUROC", "Minus published", "AUROC within wrappers"]
    families = ", ".join(block["reported_on"]) or "none"
    yield Table(
        f"Detectors on attack families that no choice was made on: {families}",
        [*first, *columns],
        rows,
        # A terminal has room for what was detected and flagged of benign answers.
        brief=[0, 1, *(4 + i for i in range(len(columns)) if i % 3 < 2)],
    )
    yield Paragraph(
        "AUROC is over attacks that succeeded against all benign answers. A refusal "
        "that is flagged costs nobody anything and is counted apart. Within wrappers, "
        "a detector that sees the wrapper and not the failure has 0.5.",
        note=True,
    )
    yield Heading("Benign answers flagged, by domain")
    yield _by_part(
        "False positives by domain",
        block["by_domain"],
        reported,
        lambda row: _number(row["levels"][0]["benign_complied"], share=True),
    )
    yield Heading("By attack family")
    yield _by_part(
        "AUROC by attack family",
        block["by_family"],
        reported,
        lambda row: _number(row["auroc"]),
    )
    yield Heading("Asked after every step")
    streaming = block["streaming"]
    yield table_of(
        "Asked after every step",
        streaming["table"],
        {
            "Detector": _name,
            f"Detected, at {streaming['level']:g} over all steps": lambda row: _number(
                row["detected"], share=True
            ),
            "At step, median": lambda row: text.scalar(row.get("detected_median_step")),
            "Benign flagged": lambda row: _number(row["false_positives"], share=True),
        },
    )


def _by_part(
    title: str,
    parts: Mapping[str, Any],
    detectors: Sequence[Mapping[str, Any]],
    write: Any,
) -> Table:
    """Return a table with a column per domain or family."""
    tables = [
        {row["detector"]: row for row in each["table"]} for each in parts.values()
    ]
    rows = [
        [
            _name(row),
            *(
                write(table[row["detector"]]) if row["detector"] in table else ""
                for table in tables
            ),
        ]
        for row in detectors
    ]
    columns = [f"{name} ({each['rows']})" for name, each in parts.items()]
    return Table(title, ["Detector", *columns], rows)


def _number(figure: Mapping[str, Any] | None, **options: bool) -> Cell:
    return "" if figure is None else Number(figure, **options)


def _name(row: Mapping[str, Any]) -> str:
    return DETECTORS.get(row["detector"], str(row["detector"]))


def recommendation(block: Mapping[str, Any]) -> str:
    """Return the sentence that says which detector to use, and how it did elsewhere."""
    best = block["recommended"]
    if best["detector"] is None:
        return f"No detector can be recommended: {best['reason']}."
    chosen = ", ".join(block["chosen_on"])
    sentence = f"Chosen on {chosen}: {_name(best)} (AUROC {text.score(best['auroc'])}"
    for row in block["reported"]:
        if row["detector"] == best["detector"] and row["auroc"]["value"] is not None:
            return f"{sentence}; on other families {text.score(row['auroc'])})."
    return f"{sentence}). There is no other family to report it on."
