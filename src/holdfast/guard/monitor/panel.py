"""Bundles and what the monitor caught, on the terminal."""

from collections.abc import Mapping
from typing import Any

from holdfast.report.section import Section, Sentences, table_of


def bundled(facts: Mapping[str, Any]) -> Section:
    """Return the promise of every live detector."""
    calibration, serving = facts["calibration"], facts["serving"]
    rows = [
        each | {"detector": name}
        for name, by in facts["thresholds"].items()
        for each in by
    ]
    table = table_of(
        "Thresholds",
        rows,
        {
            "Detector": lambda each: str(each["detector"]),
            "False stops": lambda each: f"{each['level']:g}",
            "Threshold": lambda each: f"{each['value']:.4g}",
            "Of this one threshold": lambda each: (
                f"{each['low']:.4f} to {each['high']:.4f}"
            ),
            "Requests": lambda each: f"{each['n_requests']:,}",
        },
    )
    counts = ", ".join(f"{n:,} {name}" for name, n in calibration["requests"].items())
    said = [
        f"Thresholds were set on benign requests that nothing was fitted on: {counts}.",
        f"They hold with engine {serving['engine']}, {serving['dtype']}, temperature "
        f"{serving['temperature']:g}, and are stale with another.",
        f"A policy acts on `{facts['acts_on']}`.",
    ]
    return Section("", [Sentences(said), table])
