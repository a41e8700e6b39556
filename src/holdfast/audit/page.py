"""The page a person reads: one file, nothing fetched from anywhere.

It runs no script but one of ours, which draws the table of answers, and which its
content policy names by hash.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jinja2

from holdfast.audit import panel, words
from holdfast.audit.browse import BrowsedAnswer, browse_context, policy_hash
from holdfast.audit.compare import compare
from holdfast.cliff import panel as cliff_panel
from holdfast.cliff.commitment import panel as decide_panel
from holdfast.dynamics import panel as dynamics_panel
from holdfast.dynamics.panel import StepExample
from holdfast.evaluate import panel as evaluate_panel
from holdfast.evaluate.panel import PairedRow
from holdfast.guard import panel as guard_panel
from holdfast.heads import panel as heads_panel
from holdfast.report import labels, text
from holdfast.report.schema import (
    Curve,
    Example,
    Report,
    check_curves,
    check_examples,
    is_audited,
    validate,
)
from holdfast.report.section import Raw, Section, Sentences
from holdfast.sinks import panel as sinks_panel

PANELS: dict[str, Callable[..., Section]] = {
    "decide": decide_panel.section,
    "heads": heads_panel.section,
    "ablation": heads_panel.ablation,
    "sinks": sinks_panel.section,
    "signal": dynamics_panel.section,
    "guard": guard_panel.section,
}
"""Block of the report to what shows it, in the order of the page."""
FOOTER = (
    "Every figure on this page is in report.json (holdfast-report/1), with its "
    "interval and its count{}."
)


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
    methods = sections(report, steps)
    browser, allowed = _browser(answers)
    asked = report.get("evaluation")
    suites = [evaluate_panel.section(asked)] if asked else []
    if is_audited(report):
        head = _audit_head(report, is_traced=cliff_panel.is_traced(report, curves))
        shown = [
            panel.evidence(report),
            panel.outcomes(report),
            *suites,
            cliff_panel.section(report, curves, examples),
            *methods,
            cliff_panel.answers(examples),
            *browser,
            panel.described(report, "controls"),
            panel.described(report, "probe"),
            panel.data(report),
            panel.run(report),
            Section(
                "Limits",
                [
                    Sentences(
                        [
                            *heads_panel.limits(report, has_examples=bool(examples)),
                            *report.get("limits", []),
                        ]
                    )
                ],
                "limits",
                "Limits",
            ),
        ]
    else:
        head = _measured_head(report)
        rest = [panel.data(report), panel.run(report)]
        shown = [*suites, *methods, *browser, *rest]
    return _page(
        shown,
        title=f"Holdfast report: {report['model']['id']}",
        allowed=allowed,
        **head,
    )


def render_compare(a: Report, b: Report, paired: Sequence[PairedRow] = ()) -> str:
    """Render two studies side by side as one self-contained page."""
    found = compare(a, b) | {"paired": list(paired)}
    sides = [
        words.Answer(f"{side.upper()}: {each['id']}", "", each["headline"], "open")
        for side, each in (("a", found["a"]), ("b", found["b"]))
    ]
    return _page(
        panel.comparison(found),
        title="Holdfast comparison",
        kicker="Holdfast comparison",
        headline=f"{found['a']['id']} and {found['b']['id']}",
        answers=sides,
    )


def sections(report: Report, steps: Sequence[StepExample]) -> list[Section]:
    """Return the sections of the methods that a report has a block of, in order."""
    more = {"signal": {"examples": steps}}
    return [
        make(report[key], **more.get(key, {}))
        for key, make in PANELS.items()
        if key in report
    ]


def _audit_head(report: Report, *, is_traced: bool) -> dict[str, Any]:
    """Return what stands above the sections of an audit."""
    read = (
        " At every token a linear probe also read a refusal score: from 0, about to "
        "comply, to 1, about to refuse."
    )
    sorted_by = " An automatic judge sorted each answer."
    return {
        "kicker": "Holdfast report on",
        "subject": report["model"]["id"],
        "headline": labels.headline(report),
        "lead": words.asked(report) + sorted_by + read * is_traced,
        "answers": words.answers(report),
        "warnings": words.warnings(report),
        "footer": FOOTER.format(""),
    }


def _measured_head(report: Report) -> dict[str, Any]:
    """Return what stands above an evaluation, or sinks, alone."""
    evaluated = report.get("evaluation")
    files = {"evaluation": "every answer", "sinks": "every head of every checkpoint"}
    kept = [
        f"; {what} is in {name}.parquet"
        for name, what in files.items()
        if name in report
    ]
    asked = "Every prompt was asked, every answer kept, and a judge sorted it. "
    return {
        "kicker": f"Holdfast {'evaluation' if evaluated else 'measurement'} of",
        "subject": report["model"]["id"],
        "headline": (
            evaluate_panel.headline(evaluated)
            if evaluated
            else report["sinks"]["evidence"][0]
        ),
        "lead": (asked if evaluated else "")
        + "The range in brackets after a figure is its 95% interval; "
        + ("answers to one request" if evaluated else "texts on one prompt")
        + " are kept together when ranges are made.",
        "footer": FOOTER.format("".join(kept)),
    }


def _page(shown: Sequence[Section], **head: Any) -> str:
    """Return a page of sections below its head."""
    return _environment().get_template("page.html.j2").render(sections=shown, **head)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("holdfast.report"),
        autoescape=True,
        trim_blocks=True,
    )
    environment.filters |= {
        "clean": text.clean,
        "count": lambda figure, share: text.count_of(figure, share=share),
        "kind": lambda part: type(part).__name__,
        "scalar": text.scalar,
        "span": lambda figure, share: text.span(figure, share=share),
        "value": lambda figure, share: text.value(figure, share=share),
    }
    return environment


def _browser(answers: Sequence[BrowsedAnswer]) -> tuple[list[Section], str]:
    """Return the table of answers, and the policy for the one script that it runs."""
    script = _environment().get_template("answers.js").render()
    table = browse_context(answers, script)
    if table is None:
        return [], ""
    made = _environment().get_template("answers.html.j2").render(all_answers=table)
    browser = Section("", [Raw(made)], "all-answers", "Every answer")
    return [browser], policy_hash(script)
