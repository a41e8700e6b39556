"""Reports, counts, comparisons and proofs on the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from holdfast.audit import words
from holdfast.audit.compare import table
from holdfast.evaluate.panel import paired_table, print_evaluation
from holdfast.report import labels, text
from holdfast.report.schema import is_audited
from holdfast.report.section import (
    Cell,
    Number,
    Part,
    Section,
    Sentences,
    Table,
    figures,
    table_of,
)
from holdfast.report.terminal import print_section
from holdfast.sinks import panel as sinks_panel

MOST_SETTINGS = 20
"""Settings that the terminal lists; the page has them all."""
SCORES = ("plateau", "final", "cliff", "scaled_cliff")


def print_report(found: Mapping[str, Any]) -> None:
    """Print what a report says: an audit, an evaluation and sinks, those it holds."""
    if is_audited(dict(found)):
        print_section(Section("", [*_audit(found)]))
    if "evaluation" in found:
        print_evaluation(found["evaluation"])
    if "sinks" in found:
        print_section(sinks_panel.section(found["sinks"]))


def _audit(found: Mapping[str, Any]) -> Iterator[Part]:
    """Yield verdict, evidence, outcomes, trace and controls."""
    given = dict(found)
    yield Sentences(["", labels.headline(given), ""])
    yield Sentences(words.warnings(given), "warning")
    yield Sentences([f"  {line}" for line in given["verdict"]["evidence"]] + [""])
    columns = text.outcome_columns(given["outcomes"].values())
    rows: list[list[Cell]] = [
        [
            text.title(role, text.ROLES),
            str(outcomes["refused"]["n"]),
            *(Number(outcomes[key], share=True) for key in columns),
        ]
        for role, outcomes in given["outcomes"].items()
        if outcomes["refused"]["n"]
    ]
    yield Table("Outcomes", ("", "n", *columns.values()), rows)
    traced: list[list[Cell]] = [
        [text.title(group, text.GROUPS), *(Number(scores[key]) for key in SCORES)]
        for group, scores in given["trace"].items()
        if scores["plateau"]["value"] is not None
    ]
    yield Table("Refusal score", ("", *map(text.title, SCORES)), traced)
    yield figures("Probe", given["probe"])
    yield figures("Controls", given["controls"])


def probe(found: Mapping[str, Any]) -> Section:
    """Return what was found of a probe."""
    return Section("", [figures("Probe", found)])


def trace(found: Mapping[str, Any]) -> Section:
    """Return the figures of every group, and the controls."""
    groups = [figures(group, block) for group, block in found.get("trace", {}).items()]
    return Section("", [*groups, figures("Controls", found.get("controls", {}))])


def counts(summary: Mapping[str, Any]) -> Section:
    """Return how many answers of each role got which verdict."""
    rows = [
        [role, verdict, str(count)]
        for role, found in summary["verdicts"].items()
        for verdict, count in found.items()
    ]
    n, cut, forced = (summary[key] for key in ("rows", "cut", "forced_close"))
    parts: list[Part] = [
        Table(f"{n} answers", ("role", "verdict", "rows"), rows),
        Sentences([text.cut_at_limit(cut, n)] if cut else [], "warning"),
        Sentences([text.closed_by_force(forced, n)] if forced else []),
    ]
    return Section("", parts)


def comparison(found: Any) -> Section:
    """Return two studies side by side."""
    settings = table_of(
        "Settings that differ",
        found["settings"],
        {
            "": lambda row: text.clean(row["setting"]),
            "A": lambda row: text.scalar(row["a"]),
            "B": lambda row: text.scalar(row["b"]),
            "why it matters": lambda row: row["why"],
        },
        most=MOST_SETTINGS,
    )
    figures = table_of(
        "Comparison",
        table(found),
        {
            "": lambda line: line.section if line.opens else "",
            " ": lambda line: line.metric,
            f"A: {found['a']['id']}": lambda line: line.a,
            f"B: {found['b']['id']}": lambda line: line.b,
            "difference": lambda line: line.difference,
        },
    )
    header, *lines = paired_table(found.get("paired", []))
    same = ["Model, data and settings are the same."] if not found["settings"] else []
    return Section(
        "",
        [
            Sentences([found["caution"], *same]),
            settings,
            figures,
            Table("The same prompts in both", header, lines),
        ],
    )


def proofs(found: Mapping[str, Any]) -> Section:
    """Return what was proved about a model, and what did not hold."""
    model = found["model"]
    rows = table_of(
        model["id"] + (f" ({model['type']})" if "type" in model else ""),
        found["proofs"],
        {
            "proved": lambda each: each["name"],
            "holds": lambda each: "yes" if each["passed"] else "NO",
            "found": lambda each: (
                "not finite" if each["value"] is None else f"{each['value']:.1e}"
            ),
            "limit": lambda each: (
                "" if each["limit"] is None else f"{each['limit']:.0e}"
            ),
        },
    )
    if "thinking" not in model:
        return Section("", [rows])
    thinking = model["thinking"]
    style = repr(thinking["end_template"]) if thinking else "none"
    told = Sentences([f"End-of-thinking template: {style}"])
    return Section("", [rows, told, Sentences(found["notes"], "warning")])


def organisms(cards: Sequence[Mapping[str, Any]]) -> Section:
    """Return the organisms by name."""
    columns = {
        "name": lambda card: f"organism:{card['name']}",
        "what is planted": lambda card: card["planted"],
        "a correct audit says": lambda card: card["expected"],
    }
    return Section("", [table_of("Organisms", cards, columns)])


def planted(found: Mapping[str, Any]) -> Section:
    """Return the card of an organism, and what is planted in it."""
    facts = {key: value for key, value in found.items() if key != "truth"}
    rows = [[key, str(value)] for key, value in (facts | found["truth"]).items()]
    return Section("", [Table(f"organism:{found['name']}", ("", ""), rows)])


def written(found: Mapping[str, Any]) -> Section:
    """Return where something was written."""
    return Section("", [Sentences([f"Written to {found['directory']}"])])


def files(found: Mapping[str, Any]) -> Section:
    """Return the files that were written."""
    return Section("", [Sentences(found["files"])])
