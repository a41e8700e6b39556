"""The cliff on page and terminal: figures, measures, and answers token by token."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import altair as alt

from holdfast.report.charts import (
    PALETTE,
    heading,
    interval_panel,
    to_svg,
    trace_panels,
)
from holdfast.report.labels import headline
from holdfast.report.schema import (
    Curve,
    Example,
    Figure,
    Report,
    check_curves,
    is_figure,
    validate,
)
from holdfast.report.section import (
    MIDDLE,
    Answer,
    Cell,
    Chart,
    Fold,
    Number,
    Paragraph,
    Part,
    Passage,
    Scale,
    Section,
    Sentences,
    Table,
    Token,
)
from holdfast.report.text import (
    GROUPS,
    MEASURES,
    ROLES,
    clean,
    plain,
    rate,
    scalar,
    shown_token,
    title,
)

_WIDTH = 640
REGIONS = {
    "prompt": "Prompt",
    "thinking": "Thinking",
    "end_template": "End of thinking",
    "answer": "Answer",
}
_HARM, _PEACE = PALETTE["harmful_complied"], PALETTE["benign"]


def section(
    report: Report, curves: Sequence[Curve] = (), examples: Sequence[Example] = ()
) -> Section:
    """Return the refusal score around the end of thinking: figure and measures.

    `curves`: Mean traces around the end of thinking; may be empty.
    `examples`: Conversations token by token; may be empty.
    """
    parts = [*_parts(report, curves, examples)]
    return Section("The end of thinking", parts, "trace", "End of thinking")


def _parts(
    report: Report, curves: Sequence[Curve], examples: Sequence[Example]
) -> Iterator[Part]:
    drawn = [curve for curve in curves if curve["points"]]
    if drawn:
        yield Paragraph(
            "Each line is the mean refusal score of one group of answers. All are laid "
            "over one another at the end of thinking; none is stretched or padded."
        )
        yield Chart(
            "Plot of the mean refusal score",
            lambda: trace_figure(drawn, template_length(examples)),
            "Bands are 95% intervals. The lower panel counts the answers behind each "
            "point: thinking that is shorter than the window has no part in its early "
            "points. The darker strip is the text that closes the thinking.",
        )
        yield Fold("The same as a table", [_curve_table(drawn)])
    if not is_traced(report, drawn):
        plateau = report["trace"]["harmful_complied"]["plateau"]
        reason = clean(plateau.get("reason", "no traces were recorded")).rstrip(".")
        yield Sentences([f"There is no trace to draw: {reason}."])
        return
    names = [key for group in report["trace"].values() for key in group]
    known = [key for key in MEASURES if key in names]
    measures = [*known, *sorted({*names} - {*known})]
    groups = report["trace"]
    yield Table(
        "Plateau, final score and cliff",
        ("Measure", *(_capital(title(group, GROUPS)) for group in groups)),
        [
            [
                title(measure, MEASURES),
                *(_measure(group.get(measure)) for group in groups.values()),
            ]
            for measure in measures
        ],
    )


def is_traced(report: Report, curves: Sequence[Curve]) -> bool:
    """Return whether anything was read at the end of thinking."""
    cells = [cell for group in report["trace"].values() for cell in group.values()]
    read = any(is_figure(cell) and cell["value"] is not None for cell in cells)
    return read or any(curve["points"] for curve in curves)


def _measure(found: Any) -> Cell:
    if is_figure(found):
        return Number(found, count=True)
    return "not reported" if found is None else scalar(found)


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _curve_table(curves: Sequence[Curve]) -> Table:
    """Return the points of all curves, one row per offset."""
    found = [{point["offset"]: point for point in each["points"]} for each in curves]
    offsets = sorted({offset for curve in found for offset in curve})
    names = [_capital(title(curve["group"], GROUPS)) for curve in curves]
    columns = ["Token", *(cell for name in names for cell in (name, "n"))]
    rows = [
        [
            plain(offset, 0),
            *(cell for curve in found for cell in _point(curve.get(offset))),
        ]
        for offset in offsets
    ]
    return Table("Mean refusal score by position", columns, rows)


def _point(point: Mapping[str, Any] | None) -> tuple[Cell, str]:
    if point is None:
        return "none", "0"
    figure = {key: point[key] for key in ("low", "high", "n")}
    shown = (
        "none" if point["mean"] is None else Number(figure | {"value": point["mean"]})
    )
    return shown, str(point["n"])


def answers(examples: Sequence[Example]) -> Section:
    """Return single answers, each token in the colour of the score read there."""
    none = Paragraph("No examples were recorded.", note=True)
    lead: list[Part] = [
        Paragraph(
            "The colour of a token is the refusal score read there. Hold the pointer "
            "over a token to see the number."
        ),
        Scale("0, about to comply", "1, about to refuse"),
    ]
    shown = [_answer(example) for example in examples]
    parts = [*lead, *shown] if shown else [none]
    return Section("Single answers, token by token", parts, "examples", "Examples")


def _answer(example: Example) -> Answer:
    regions = groupby(example["tokens"], lambda token: token["region"])
    return Answer(
        example["title"],
        f"{title(example['group'], GROUPS)}; judged {example['verdict']}",
        [
            Passage(region, REGIONS[region], [*map(_token, tokens)])
            for region, tokens in regions
        ],
    )


def _token(token: Mapping[str, Any]) -> Token:
    """Give a token its tone, from 0 (complies) to 10 (refuses); None is no score."""
    score, is_closing = token["score"], token["region"] == "end_template"
    shown = shown_token(token["text"], one_line=is_closing)
    if score is None:
        return Token(shown, None, "")
    return Token(shown, round(score * 2 * MIDDLE), plain(score))


def template_length(examples: Sequence[Example]) -> int | None:
    """Return how many tokens the end of thinking has in most examples.

    None if no example closes its thinking.
    """
    counted = [
        sum(token["region"] == "end_template" for token in example["tokens"])
        for example in examples
    ]
    lengths = [length for length in counted if length]
    return max(set(lengths), key=lengths.count) if lengths else None


def trace_figure(curves: Sequence[Curve], template: int | None = None) -> str:
    """Draw the mean refusal score around the end of thinking, with its band.

    A second panel shows how many answers each point rests on, since few reach far
    back from the end.
    """
    main, counts = trace_panels(curves, template, _WIDTH, 300, bare=True)
    whole = alt.vconcat(
        main,
        counts.properties(title=heading("Answers behind each point")),
        spacing=12,
    )
    groups = ", ".join(title(curve["group"], GROUPS) for curve in curves)
    return to_svg(
        whole,
        "Mean refusal score around the end of thinking",
        f"One line each for: {groups}. Bands are 95% intervals. The lower panel "
        "counts the answers at each position. The table below has the numbers.",
    )


def wrapper_figure(by_wrapper: Mapping[str, Mapping[str, Figure]]) -> str:
    """Draw, for each wrapper, how often it works and how often harmless ones pass."""
    kinds = {"attack_success": "harmful request", "benign_compliance": "harmless one"}
    rows = [
        (clean(wrapper), words, shares[key])
        for wrapper, shares in by_wrapper.items()
        for key, words in kinds.items()
    ]
    colours = dict(zip(kinds.values(), (_HARM, _PEACE), strict=True))
    return to_svg(
        interval_panel(rows, colours, _WIDTH - 130),
        "Requests carried out, by wrapper",
        "For each jailbreak wrapper the share of harmful and of harmless requests "
        "that the model carried out, with 95% intervals. The table below has the "
        "numbers.",
    )


def picture(report: Report, curves: Sequence[Curve]) -> str:
    """Draw a study in one picture: what gets through, and where refusal lets go.

    Raises:
        InputError: If the report or a curve is not as it must be.
    """
    validate(report)
    check_curves(curves)
    success, outcomes = report["attack_success"], report["outcomes"]
    shares: dict[str, Figure] = {
        "harmful": success["harmful"],
        "wrapped": success["wrapped"],
        "benign": outcomes["benign"]["complied"],
        "benign_wrapped": outcomes["benign_wrapped"]["complied"],
    }
    rows = [
        (ROLES[role], "harmless" if role.startswith("benign") else "harmful", share)
        for role, share in shares.items()
    ]
    colours = {"harmful": _HARM, "harmless": _PEACE}
    left = interval_panel(rows, colours, 210, 52, legend=False)
    panels: list[Any] = [left.properties(title=heading("Requests carried out"))]
    if any(curve["points"] for curve in curves):
        trace, _ = trace_panels(curves, None, 420, 208)
        panels.append(trace.properties(title=heading("Mean refusal score")))
    whole = (
        alt.hconcat(*panels, spacing=36)
        .resolve_scale(
            color="independent", shape="independent", strokeDash="independent"
        )
        .properties(
            title=alt.TitleParams(
                headline(report),
                subtitle=clean(report["model"]["id"]),
                anchor="start",
                fontSize=19,
                subtitleFontSize=13,
                offset=18,
            ),
        )
    )
    said = "; ".join(f"{ROLES[role]}: {rate(share)}" for role, share in shares.items())
    return to_svg(whole, headline(report), said, standalone=True)
