"""Bundles and what the monitor caught, on the terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from holdfast.report.section import Part, Section, Sentences, Table, table_of


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
            "Rate": lambda each: f"{each['level']:g}",
            "Threshold": lambda each: f"{each['value']:.4g}",
            "95 % interval": lambda each: f"{each['low']:.4f} to {each['high']:.4f}",
            "Requests": lambda each: f"{each['n_requests']:,}",
        },
    )
    counts = ", ".join(f"{n:,} {name}" for name, n in calibration["requests"].items())
    said = [
        f"Thresholds were set on benign requests that nothing was fitted on: {counts}.",
        f"They hold with engine {serving['engine']}, {serving['dtype']}, temperature "
        f"{serving['temperature']:g}, and are stale with another.",
        f"A policy acts on `{facts['acts_on']}`.",
        "Rate is the promised chance to flag a further benign request, over draws of "
        "calibration sets; the interval is that of this one draw.",
    ]
    return Section("", [Sentences(said), table])


def live_section(block: Mapping[str, Any]) -> Section:
    """Return what each policy did, and how often each detector fired."""
    # A figure with its interval and n takes a third of a terminal, and there are many
    # groups: each is a row, and the detector opens them.
    rows: list[Sequence[str]] = []
    for each in block["detectors"]:
        rows.append((f"{each['detector']} at {each['rate']:g}",))
        rows += [(f"  {name}", _shown(each[name])) for name in block["facts"]["rows"]]
    detectors = Table("Share that fires", ("Group", "Share"), rows)
    policies = [
        {"policy": policy, "where": where} | pair
        for policy, each in block["policies"].items()
        for where, pair in each["attack_success"].items()
    ]
    success = table_of(
        "Attack success",
        policies,
        {
            "Policy": lambda each: str(each["policy"]),
            "Where": lambda each: str(each["where"]),
            "Before": _cell("before"),
            "After": _cell("after"),
        },
    )
    said = [
        f"Under `{policy}` {name}: false stops {_shown(figure)}."
        for policy, each in block["policies"].items()
        for name, figure in each["false_stops"].items()
    ]
    parts: list[Part] = [
        Sentences(said),
        success,
        detectors,
        Sentences(block["notes"], "warning"),
    ]
    return Section("", parts)


def _cell(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda each: _shown(each[name])


def _shown(figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return "none"
    bounds = f"{figure['low']:.3f} to {figure['high']:.3f}"
    return f"{figure['value']:.3f} ({bounds}; n = {figure['n']:,})"
