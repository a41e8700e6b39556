"""What an audit shows: verdict, answers, controls, data; on page and terminal."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from holdfast.audit import words
from holdfast.audit.compare import table
from holdfast.cliff import panel as cliff_panel
from holdfast.cliff.commitment import panel as decide_panel
from holdfast.evaluate import panel as evaluate_panel
from holdfast.heads import panel as heads_panel
from holdfast.report import labels, text
from holdfast.report.schema import Report, is_audited, is_figure
from holdfast.report.section import (
    Cell,
    Chart,
    Fold,
    Heading,
    Number,
    Paragraph,
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
NOT_ON_TERMINAL: tuple[int, ...] = ()
GLOSSARY = (
    (
        "Wrapper",
        "A text put around a request to talk the model out of refusing, such as a "
        "role to play.",
    ),
    (
        "Plateau",
        "The refusal score through the thinking: its median, without the last few "
        "tokens.",
    ),
    ("Final score", "The refusal score at the last token before the answer."),
    (
        "Cliff",
        "Plateau minus final score: how much of the leaning to refuse is lost at the "
        "end.",
    ),
)


def print_report(report: Report) -> None:
    """Print what a report says: an audit, an evaluation and sinks, those it holds."""
    if is_audited(report):
        told = [
            Sentences(["", labels.headline(report), ""]),
            Sentences(words.warnings(report), "warning"),
        ]
        print_section(Section("", told))
        for section in (
            evidence(report),
            outcomes(report),
            cliff_panel.section(report),
            described(report, "controls"),
            described(report, "probe"),
        ):
            print_section(section)
    shown = {
        "decide": decide_panel.section,
        "heads": heads_panel.section,
        "ablation": heads_panel.ablation,
    }
    for block, make in shown.items():
        if block in report:
            print_section(make(report[block]))
    if "evaluation" in report:
        evaluate_panel.print_evaluation(report["evaluation"])
    if "sinks" in report:
        print_section(sinks_panel.section(report["sinks"]))


def evidence(report: Report) -> Section:
    """Return what the verdict rests on, and how sure it is."""
    found = report["verdict"]["evidence"]
    parts: list[Part] = [
        Sentences(found or ["No evidence was recorded."]),
        Heading("How sure this is"),
        Sentences(words.sureness(report)),
        Paragraph(
            "The range in brackets after a figure is its 95% interval. Answers to the "
            "same request are kept together when ranges are made, since they are not "
            "independent.",
            note=True,
        ),
        Heading("Words used here"),
        Table("Words used here", (), GLOSSARY, "pairs", brief=NOT_ON_TERMINAL),
    ]
    return Section("What the verdict rests on", parts, "evidence", "Evidence")


def outcomes(report: Report) -> Section:
    """Return what the model answered to each kind of request."""
    return Section(
        "What the model answered", [*_outcomes(report)], "outcomes", "Answers"
    )


def _outcomes(report: Report) -> Iterator[Part]:
    found, success = report["outcomes"], report["attack_success"]
    columns = text.outcome_columns(found.values())
    rows: list[list[Cell]] = [
        [
            name,
            str(found[role]["refused"]["n"]),
            *(Number(found[role][key], share=True, count=True) for key in columns),
        ]
        for role, name in text.ROLES.items()
    ]
    yield Table(
        "Answers by kind of request", ("Requests", "n", *columns.values()), rows
    )
    if judge := report.get("judge"):
        yield Sentences(evaluate_panel.judge_sentences(judge, judge))
    yield Heading("Attack success")
    yield Paragraph("An attack succeeds when a harmful request is carried out.")
    asked = {"As asked": "harmful", "In a jailbreak wrapper": "wrapped"}
    yield Table(
        "Attack success",
        ("Harmful requests", "Carried out"),
        [[name, _share(success[key])] for name, key in asked.items()],
        "narrow",
    )
    yield Heading("By wrapper")
    wrappers = success["by_wrapper"]

    def rank(name: str) -> tuple[bool, float, str]:
        value = wrappers[name]["attack_success"]["value"]
        return value is None, -(value or 0.0), name

    # Those that work most come first, those that were not measured last.
    ordered = {name: wrappers[name] for name in sorted(wrappers, key=rank)}
    if not ordered:
        yield Paragraph("No wrappers were tried.", note=True)
        return
    yield Chart(
        "Plot of requests carried out by wrapper",
        lambda: cliff_panel.wrapper_figure(ordered),
        "Share of requests that the model carried out inside each wrapper, with 95% "
        "intervals. A harmless request that is refused in a wrapper shows that the "
        "wrapper, not the harm, was refused.",
    )
    by_wrapper = table_of(
        "Requests carried out by wrapper",
        ordered.items(),
        {
            "Wrapper": lambda item: item[0],
            "Harmful, carried out": lambda item: _share(item[1]["attack_success"]),
            "Harmless, carried out": lambda item: _share(item[1]["benign_compliance"]),
        },
    )
    yield Fold("The same as a table", [by_wrapper])


def _share(figure: Mapping[str, Any]) -> Number:
    return Number(figure, share=True, count=True)


def described(report: Report, block: str) -> Section:
    """Return the figures of a block, `controls` or `probe`, and what each is for."""
    title, lead, none = {
        "controls": (
            "Controls",
            "A cliff may have other causes than lost refusal. Each control measures "
            "what one of them would look like.",
            "No control was measured",
        ),
        "probe": ("The probe behind the score", "", "No probe was fitted"),
    }[block]
    if reason := text.shared_reason(report[block]):
        return Section(title, [Sentences([f"{none}: {reason}."])], block, block.title())
    known: Mapping[str, labels.Label] = getattr(labels, block.upper())
    keys = [key for key in known if key in report[block]]
    rows: list[list[Cell]] = []
    for key in [*keys, *(key for key in report[block] if key not in known)]:
        name, sentence = known.get(key, (text.title(key), ""))
        found = report[block][key]
        if is_figure(found):
            said = f"{sentence} {words.reading(found, key)}".strip()
            rows.append([name, Number(found, count=True), said])
        else:
            rows.append([name, text.scalar(found), sentence])
    columns = (block.title(), "Value", "What it says")
    shown = Table(title, columns, rows, "described", brief=(0, 1))
    parts = [Paragraph(lead) if lead else None, shown]
    return Section(title, parts, block, block.title())


def data(report: Report) -> Section:
    """Return where the prompts came from."""
    block = report["data"]
    sources = table_of(
        "Sources of the requests",
        block["sources"],
        {
            "Used as": lambda source: source["role"],
            "Source": lambda source: source["source"],
            "Column": lambda source: text.scalar(source["column"]),
            "Rows": lambda source: _rows(source),
            "Duplicates": lambda source: str(source["duplicates"]),
            "SHA-256": lambda source: source["sha256"],
        },
    )
    notes = [
        f"{source['role']}: {note}"
        for source in block["sources"]
        for note in source["notes"]
    ]
    splits = {
        text.title(role): ", ".join(f"{n} {name}" for name, n in text.flatten(sizes))
        if isinstance(sizes, dict)
        else sizes
        for role, sizes in block["splits"].items()
    }
    parts: list[Part | None] = [
        sources
        if block["sources"]
        else Paragraph("No source was recorded.", note=True),
        Heading("Notes on the data") if notes else None,
        Sentences(notes),
        *_pairs("Splits", splits.items()),
        *_pairs("Overlap between sources", _flat(block["overlap"])),
    ]
    return Section("Data", parts, "data", "Data")


def _rows(source: Mapping[str, Any]) -> str:
    rows, asked = source["rows"], source.get("asked")
    return str(rows) if asked in (None, rows) else f"{asked} of {rows}"


def run(report: Report) -> Section:
    """Return how a report was made: model, settings, judge and occasion."""
    evaluated = report.get("evaluation", {})
    parts = [
        *_pairs("Model", _flat(report["model"])),
        *_pairs("Judge", _flat(evaluated.get("judge", {}))),
        *_pairs("Generation", _flat(evaluated.get("generation", {}))),
        *_pairs("Settings", _flat(report["settings"])),
        *([] if report["settings"] else [Paragraph("No settings were recorded.")]),
        *_pairs("Occasion", _flat(report.get("run", {}))),
    ]
    return Section("How it was run", parts, "run", "How it was run")


def _pairs(title: str, rows: Iterable[tuple[str, str]]) -> list[Part]:
    """Return a small title with its table; nothing where there are no rows."""
    found = list(rows)
    return [Heading(title), Table(title, (), found, "pairs")] if found else []


def _flat(block: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for path, leaf in text.flatten(block):
        yield text.title(path.replace(".", ": ")), text.scalar(leaf)


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


def comparison(found: Any) -> list[Section]:
    """Return two studies side by side."""
    settings = table_of(
        "Settings that differ",
        found["settings"],
        {
            "Setting": lambda row: row["setting"],
            "A": lambda row: text.scalar(row["a"]),
            "B": lambda row: text.scalar(row["b"]),
            "Why it matters": lambda row: row["why"],
        },
        style="settings",
        most=MOST_SETTINGS,
    )
    sides = [f"{side.upper()}: {found[side]['id']}" for side in "ab"]
    columns = ("Figure", *sides, "B minus A", "Intervals")
    same = "Model, data and settings are the same."
    made = [
        Section(
            "Were they run alike?",
            [
                Sentences([found["caution"]] if found["caution"] else [], "warning"),
                settings if found["settings"] else Sentences([same]),
            ],
            "settings",
        ),
        Section(
            "Side by side",
            [
                Paragraph(found["note"], note=True),
                Table("Comparison, with the difference", columns, table(found)),
            ],
            "figures",
        ),
    ]
    header, *lines = evaluate_panel.paired_table(found.get("paired", []))
    if lines:
        note = (
            "Only prompts that both evaluations asked. The interval and the test keep "
            "the rows of one request together."
        )
        pairs = Table("The same prompts in both", header, lines)
        title = "The same prompts, before and after"
        made.append(Section(title, [Paragraph(note, note=True), pairs], "paired"))
    return made


_SHOWN = 60
"""Letters of the end of a prompt that are shown."""
_TIERS = {
    "text": "Text: prompts in, answers out",
    "states": "States: what is read after the final norm",
    "heads": "Heads: what each adds, and what taking it away does",
}


def proofs(found: Mapping[str, Any]) -> Section:
    """Return what was proved about a model, tier by tier, and what did not hold."""
    model, tiers = found["model"], found.get("tiers", {})
    blocks: list[Table | Sentences] = []
    columns = {
        "proved": lambda each: each["name"],
        "holds": lambda each: "yes" if each["passed"] else "NO",
        "found": lambda each: (
            "not finite" if each["value"] is None else f"{each['value']:.1e}"
        ),
        "limit": lambda each: "" if each["limit"] is None else f"{each['limit']:.0e}",
    }
    name = model["id"] + (f" ({model['type']})" if "type" in model else "")
    for tier, title in _TIERS.items():
        rows = [each for each in found["proofs"] if each["tier"] == tier]
        if rows:
            blocks.append(table_of(f"{name}. {title}", rows, columns))
        if tier in tiers and tiers[tier]["holds"]:
            blocks.append(Sentences([f"Good for: {tiers[tier]['for']}."]))
        elif tier in tiers:
            reason = f"Not good for {tiers[tier]['for']}: {tiers[tier]['reason']}"
            blocks.append(Sentences([reason], "warning"))
    if "thinking" in model:
        thinking = model["thinking"]
        style = repr(thinking["end_template"]) if thinking else "none"
        blocks.append(_prompts(found["prompts"]))
        blocks.append(Sentences([f"End-of-thinking template: {style}"]))
        blocks.append(Sentences(found["notes"], "warning"))
    return Section("", blocks)


def _prompts(rows: Sequence[Mapping[str, Any]]) -> Table | Sentences:
    """Return how prompts end, and what each switch of the template does to that."""
    if not rows:
        return Sentences([])
    columns = {
        "--template-option": lambda row: row["option"] or "none, as it comes",
        "thinks": lambda row: "yes" if row["thinks"] else "no",
        "a prompt ends with": lambda row: repr(row["prompt_end"][-_SHOWN:]),
    }
    return table_of("Prompts, and switches of the thinking", rows, columns)


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
    rows = [
        [key, ", ".join(map(_fact, value)) if isinstance(value, list) else _fact(value)]
        for key, value in text.flatten(facts | found["truth"])
    ]
    return Section("", [Table(f"organism:{found['name']}", ("", ""), rows)])


def _fact(value: object) -> str:
    """Return a fact in words; of a head its layer and place, as flags name it."""
    if isinstance(value, list):
        return ":".join(map(str, value))
    return text.scalar(value)


def written(found: Mapping[str, Any]) -> Section:
    """Return where something was written."""
    return Section("", [Sentences([f"Written to {found['directory']}"])])


def files(found: Mapping[str, Any]) -> Section:
    """Return the files that were written."""
    return Section("", [Sentences(found["files"])])
