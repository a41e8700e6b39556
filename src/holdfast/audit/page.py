"""The page a person reads: one file, nothing fetched from anywhere.

It runs no script but one of ours, which draws the table of answers, and which its
content policy names by hash.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import Any

import jinja2

from holdfast.audit import words
from holdfast.audit.browse import BrowsedAnswer, browse_context, policy_hash
from holdfast.audit.compare import compare, table
from holdfast.cliff.panel import template_length, trace_figure, wrapper_figure
from holdfast.dynamics.panel import StepExample, signal_context
from holdfast.evaluate import panel as evaluate_panel
from holdfast.evaluate.panel import PairedRow, paired_table
from holdfast.heads import panel as heads_panel
from holdfast.report import labels, text
from holdfast.report.schema import (
    Curve,
    Example,
    Figure,
    Report,
    Token,
    check_curves,
    check_examples,
    is_audited,
    is_figure,
    validate,
)
from holdfast.report.section import Section
from holdfast.sinks import panel as sinks_panel

_PARTS = {
    "prompt": "Prompt",
    "thinking": "Thinking",
    "end_template": "End of thinking",
    "answer": "Answer",
}
_TONES = 10
PANELS: dict[str, Callable[[Any], Section]] = {
    "heads": heads_panel.section,
    "ablation": heads_panel.ablation,
    "sinks": sinks_panel.section,
}
"""Block of the report to what shows it, in the order of the page."""
ONLY_EVALUATED = "evaluated.html.j2"


def render(
    report: Report,
    curves: Sequence[Curve],
    examples: Sequence[Example],
    steps: Sequence[StepExample] = (),
    answers: Sequence[BrowsedAnswer] = (),
) -> str:
    """Render a report as one self-contained page.

    The page loads nothing, so it opens offline, and it cannot run what a model wrote:
    every text is escaped, and no script runs but that of the table of answers.

    `report`: A report that passes `schema.validate`.
    `curves`: Mean traces around the end of thinking; offset 0 is the first token of the
    end-of-thinking template. May be empty.
    `examples`: Conversations token by token. May be empty.
    `steps`: Single answers with their signal, step by step. May be empty.
    `answers`: Every answer, to browse and filter. May be empty.
    """
    validate(report)
    check_curves(curves)
    check_examples(examples)
    drawn = [curve for curve in curves if curve["points"]]
    context = {
        "page_title": f"Holdfast report: {text.clean(report['model']['id'])}",
        "report": report,
        "headline": labels.headline(report),
        "asked": words.asked(report),
        "answers": words.answers(report),
        "warnings": words.warnings(report),
        "sureness": words.sureness(report),
        "roles": text.ROLES,
        "outcome_names": text.outcome_columns(_outcome_rows(report)),
        "limits": [
            *heads_panel.limits(report, has_examples=bool(examples)),
            *report.get("limits", []),
        ],
        **_wrapper_context(report),
        **_trace_context(report, drawn, template_length(examples)),
        **signal_context(report, steps),
        "panels": sections(report),
        "examples": [_example(example) for example in examples],
        "controls": list(_described(report["controls"], labels.CONTROLS)),
        "no_controls": text.shared_reason(report["controls"]),
        "probe": list(_described(report["probe"], labels.PROBE)),
        "no_probe": text.shared_reason(report["probe"]),
        **_data_context(report),
        "model": list(_pairs(report["model"])),
        "settings": list(_pairs(report["settings"])),
        "run": list(_pairs(report.get("run", {}))),
        "evaluation": _evaluation_context(report.get("evaluation")),
        **_browse_context(answers),
    }
    page = "report.html.j2" if is_audited(report) else ONLY_EVALUATED
    return _environment().get_template(page).render(context)


def sections(report: Report) -> list[Section]:
    """Return the sections of the methods that a report has a block of, in order."""
    return [make(report[key]) for key, make in PANELS.items() if key in report]


def _outcome_rows(report: Report) -> list[Mapping[str, Any]]:
    """Return every row of outcomes that the page shows."""
    asked = (report.get("evaluation") or {}).get("rows", [])
    rows = [*report["outcomes"].values(), *(row["outcomes"] for row in asked)]
    return [row for row in rows if row]


def render_compare(a: Report, b: Report, paired: Sequence[PairedRow] = ()) -> str:
    """Render two studies side by side as one self-contained page."""
    comparison = compare(a, b)
    context = {
        "page_title": "Holdfast comparison",
        **comparison,
        "paired": paired_table(paired),
        "lines": list(zip(comparison["rows"], table(comparison), strict=True)),
    }
    return _environment().get_template("compare.html.j2").render(context)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("holdfast.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {
        "clean": text.clean,
        "count": lambda figure, share: text.count_of(figure, share=share),
        "kind": lambda part: type(part).__name__,
        "scalar": text.scalar,
        "span": lambda figure, share: text.span(figure, share=share),
        "title_of": _title_of,
        "value": lambda figure, share: text.value(figure, share=share),
    }
    return environment


def _browse_context(answers: Sequence[BrowsedAnswer]) -> dict[str, Any]:
    """Prepare the table of answers, and the only script that the page may run."""
    script = _environment().get_template("answers.js").render()
    table = browse_context(answers, script)
    return {"all_answers": table, "allowed": policy_hash(script) if table else ""}


def _evaluation_context(block: dict[str, Any] | None) -> dict[str, Any] | None:
    """Prepare the section on suites, if there was an evaluation."""
    if block is None:
        return None
    several = len({row["suite"] for row in block["rows"]}) > 1
    return {
        "headline": evaluate_panel.headline(block),
        "facts": evaluate_panel.facts(block),
        "rows": [
            (evaluate_panel.name(row, several=several), row) for row in block["rows"]
        ],
        "told": evaluate_panel.told(block),
        "judge": list(_pairs(block["judge"])),
        "generation": list(_pairs(block["generation"])),
        "lm_eval": list(_pairs(block["lm_eval"])),
    }


def _title_of(key: str, kind: str) -> str:
    known = {"group": text.GROUPS, "measure": text.MEASURES}[kind]
    words_for = text.title(key, known)
    return words_for[:1].upper() + words_for[1:]


def _wrapper_context(report: Report) -> dict[str, Any]:
    """Order the wrappers by how often they work, those not measured last."""
    wrappers = report["attack_success"]["by_wrapper"]

    def rank(name: str) -> tuple[bool, float, str]:
        value = wrappers[name]["attack_success"]["value"]
        return value is None, -(value or 0.0), name

    ordered = {name: wrappers[name] for name in sorted(wrappers, key=rank)}
    drawn = wrapper_figure(ordered) if ordered else ""
    return {"wrappers": ordered, "wrapper_svg": drawn}


def _trace_context(
    report: Report, curves: Sequence[Curve], template: int | None
) -> dict[str, Any]:
    """Prepare the trace: its figure, the same as a table, and its measures."""
    plateau: Figure = report["trace"]["harmful_complied"]["plateau"]
    reason = text.clean(plateau.get("reason", "no traces were recorded")).rstrip(".")
    points = [{point["offset"]: point for point in curve["points"]} for curve in curves]
    offsets = sorted({offset for curve in points for offset in curve})
    rows = [
        (
            text.plain(offset, 0),
            [_cell(curve.get(offset)) for curve in points],
        )
        for offset in offsets
    ]
    measures = dict.fromkeys(
        measure for group in report["trace"].values() for measure in group
    )
    return {
        "trace_svg": trace_figure(curves, template) if curves else "",
        "no_trace": reason,
        "is_traced": bool(curves) or any(map(_has_figures, report["trace"].values())),
        "curve_names": [_title_of(curve["group"], "group") for curve in curves],
        "curve_rows": rows,
        "measures": sorted(measures, key=_measure_rank),
    }


def _has_figures(group: Mapping[str, Any]) -> bool:
    cells = (cell for cell in group.values() if isinstance(cell, Mapping))
    return any(cell["value"] is not None for cell in cells)


def _measure_rank(measure: str) -> tuple[int, str]:
    known = list(text.MEASURES)
    return (known.index(measure) if measure in known else len(known), measure)


def _cell(point: Mapping[str, Any] | None) -> tuple[str, str]:
    if point is None:
        return "none", "0"
    if point["mean"] is None:
        return "none", str(point["n"])
    ends = {"value": point["mean"], "low": point["low"], "high": point["high"]}
    return text.score({**ends, "n": point["n"]}), str(point["n"])  # type: ignore[typeddict-item]


def _described(
    rows: Mapping[str, Any], known: Mapping[str, labels.Sentences]
) -> Iterator[dict[str, Any]]:
    """Yield rows with their name and sentence, the known ones first and in order."""
    first = [key for key in known if key in rows]
    for key in [*first, *(key for key in rows if key not in known)]:
        name, sentence = known.get(key, (text.title(key), ""))
        figure = rows[key]
        reading = words.reading(figure, key) if is_figure(figure) else ""
        yield {
            "name": name,
            "sentence": sentence,
            "figure": figure,
            "reading": reading,
        }


def _data_context(report: Report) -> dict[str, Any]:
    data = report["data"]
    notes = [
        f"{source['role']}: {note}"
        for source in data["sources"]
        for note in source["notes"]
    ]
    splits = {
        text.title(role): ", ".join(f"{n} {name}" for name, n in text.flatten(sizes))
        if isinstance(sizes, dict)
        else sizes
        for role, sizes in data["splits"].items()
    }
    return {
        "notes": notes,
        "splits": list(splits.items()),
        "overlap": list(_pairs(data["overlap"])),
    }


def _pairs(block: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for path, leaf in text.flatten(block):
        yield text.title(path.replace(".", ": ")), text.scalar(leaf)


def _example(example: Example) -> dict[str, Any]:
    """Prepare one conversation: its tokens by region, each with its tone."""
    parts = [
        {"region": region, "name": _PARTS[region], "tokens": [*map(_token, tokens)]}
        for region, tokens in groupby(example["tokens"], lambda token: token["region"])
    ]
    return {
        "title": text.clean(example["title"]),
        "group": text.title(example["group"], text.GROUPS),
        "verdict": text.clean(example["verdict"]),
        "parts": parts,
    }


def _token(token: Token) -> dict[str, Any]:
    """Give a token its tone, from 0 (complies) to 10 (refuses); None is no score."""
    score = token["score"]
    return {
        "text": text.shown_token(
            token["text"], one_line=token["region"] == "end_template"
        ),
        "tone": None if score is None else round(score * _TONES),
        "score": "" if score is None else text.plain(score),
    }
