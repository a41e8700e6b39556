"""Reports, figures, comparisons and proofs on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.report.terminal import print_figures, print_lines, print_table

MOST_SETTINGS = 20
"""Settings that the terminal lists; the page has them all."""


def print_report(report: Mapping[str, Any]) -> None:
    """Print what a report says: an audit, an evaluation and sinks, those it holds.

    Args:
        report: A report that is valid.
    """
    from holdfast.evaluate.panel import print_evaluation
    from holdfast.report.schema import is_audited
    from holdfast.report.terminal import print_section
    from holdfast.sinks import panel as sinks_panel

    if is_audited(dict(report)):
        _print_audit(report)
    if "evaluation" in report:
        print_evaluation(report["evaluation"])
    if "sinks" in report:
        print_section(sinks_panel.section(report["sinks"]))


def _print_audit(report: Mapping[str, Any]) -> None:
    """Print verdict, evidence, outcomes, trace and controls."""
    from holdfast.audit import words
    from holdfast.report import labels, text

    given = dict(report)
    print_lines("", labels.headline(given), "")
    print_lines(*(f"warning: {sentence}" for sentence in words.warnings(given)))
    print_lines(*(f"  {sentence}" for sentence in given["verdict"]["evidence"]), "")
    columns = text.outcome_columns(given["outcomes"].values())
    rows = [
        [
            text.title(role, text.ROLES),
            str(found["refused"]["n"]),
            *(text.rate(found[key]) for key in columns),
        ]
        for role, found in given["outcomes"].items()
        if found["refused"]["n"]
    ]
    print_table("Outcomes", ("", "n", *columns.values()), rows)
    named = ("plateau", "final", "cliff", "scaled_cliff")
    traced = [
        [text.title(group, text.GROUPS), *(text.score(found[key]) for key in named)]
        for group, found in given["trace"].items()
        if found["plateau"]["value"] is not None
    ]
    if traced:
        print_table("Refusal score", ("", *(text.title(key) for key in named)), traced)
    print_figures("Probe", given["probe"])
    print_figures("Controls", given["controls"])


def print_counts(summary: Mapping[str, Any]) -> None:
    """Print how many answers of each role got which verdict."""
    rows = [
        [role, verdict, str(count)]
        for role, counts in summary["verdicts"].items()
        for verdict, count in counts.items()
    ]
    print_table(f"{summary['rows']} answers", ("role", "verdict", "rows"), rows)
    from holdfast.report.text import closed_by_force, cut_at_limit

    if summary["cut"]:
        print_lines("warning: " + cut_at_limit(summary["cut"], summary["rows"]))
    if summary["forced_close"]:
        print_lines(closed_by_force(summary["forced_close"], summary["rows"]))


def print_trace(found: Mapping[str, Any]) -> None:
    """Print the figures of every group, and the controls."""
    for group, block in found.get("trace", {}).items():
        print_figures(group, block)
    print_figures("Controls", found.get("controls", {}))


def print_comparison(found: Any) -> None:
    """Print two studies side by side."""
    from holdfast.audit.compare import table
    from holdfast.evaluate.panel import paired_table

    rows = [
        [
            line.section if line.opens else "",
            line.metric,
            line.a,
            line.b,
            line.difference,
        ]
        for line in table(found)
    ]
    print_lines(found["caution"])
    _print_settings(found["settings"])
    names = (found["a"]["id"], found["b"]["id"])
    print_table("Comparison", ("", "", *names, "difference"), rows)
    if found.get("paired"):
        header, *lines = paired_table(found["paired"])
        print_table("The same prompts in both", tuple(header), lines)


def _print_settings(differing: Sequence[Mapping[str, Any]]) -> None:
    """Print the settings that differ, and how many more of them the page has."""
    from holdfast.report.text import clean, scalar

    if not differing:
        print_lines("Model, data and settings are the same.")
        return
    rows = [
        [clean(row["setting"]), scalar(row["a"]), scalar(row["b"]), row["why"]]
        for row in differing[:MOST_SETTINGS]
    ]
    print_table("Settings that differ", ("", "A", "B", "why it matters"), rows)
    if len(differing) > MOST_SETTINGS:
        print_lines(f"and {len(differing) - MOST_SETTINGS} more, see -o FILE")


def print_proofs(found: Mapping[str, Any]) -> None:
    """Print what was proved about a model, and what did not hold."""
    rows = [
        [
            each["name"],
            "yes" if each["passed"] else "NO",
            "not finite" if each["value"] is None else f"{each['value']:.1e}",
            "" if each["limit"] is None else f"{each['limit']:.0e}",
        ]
        for each in found["proofs"]
    ]
    model = found["model"]
    family = f" ({model['type']})" if "type" in model else ""
    print_table(model["id"] + family, ("proved", "holds", "found", "limit"), rows)
    if "thinking" not in model:
        return
    thinking = model["thinking"]
    style = repr(thinking["end_template"]) if thinking else "none"
    print_lines(f"End-of-thinking template: {style}")
    print_lines(*(f"warning: {note}" for note in found["notes"]))
