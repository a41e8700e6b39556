"""Detectors on the terminal."""

from collections.abc import Mapping
from typing import Any

from holdfast.report.terminal import print_lines, print_table


def print_fitted(found: Mapping[str, Any]) -> None:
    """Print how many requests were fitted on, and the thresholds."""
    from holdfast.dynamics.panel import DETECTORS

    counts = found["requests"]
    print_lines(
        f"Fitted on {counts['train']} benign requests, calibrated on "
        f"{counts['calibration']} others."
    )
    rows = [
        [
            DETECTORS.get(name, name),
            f"{threshold['level']:g}",
            f"{threshold['value']:.4g}",
            f"{threshold['low']:.4f} to {threshold['high']:.4f}",
        ]
        for name, each in found["detectors"].items()
        for threshold in each["thresholds"]
    ]
    columns = ("detector", "false positives", "threshold", "of this one threshold")
    print_table("Thresholds", columns, rows)


def print_evaluated(found: Mapping[str, Any]) -> None:
    """Print the table on attack families that no choice was made on."""
    from holdfast.dynamics.panel import DETECTORS, recommendation
    from holdfast.report import text

    print_lines(*(f"warning: {note}" for note in found["notes"]))
    print_lines(recommendation(found))
    reported = ", ".join(found["reported_on"]) or "none"
    rows = []
    for each in found["reported"]:
        levels = each["levels"]
        rows.append(
            [
                DETECTORS.get(each["detector"], each["detector"]),
                text.score(each["auroc"]),
                *(text.rate(level["attack_complied"]) for level in levels),
                *(text.rate(level["false_positives"]) for level in levels),
            ]
        )
    rates = [f"{level['level']:g}" for level in found["reported"][0]["levels"]]
    columns = (
        "detector",
        "AUROC",
        *(f"detected at {rate}" for rate in rates),
        *(f"false positives at {rate}" for rate in rates),
    )
    print_table(f"Detectors on attack families: {reported}", columns, rows)
