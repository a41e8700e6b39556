"""The parts that figures are made of, and their way from Altair to SVG.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; dash
and shape repeat what colour says. In the page, the style sheet turns them for dark
screens by their value, so that figures and page use one palette.
"""

import html
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import vl_convert

from holdfast.report.schema import Curve, Figure
from holdfast.report.text import GROUPS, clean, title

INK, MUTED, RULE = "#1c2321", "#5c6661", "#dcdcd4"
THINKING, TEMPLATE, ANSWER = "#f4f2ec", "#e5dfcd", "#f4f2ed"
PALETTE = {
    "harmful_complied": "#d55e00",
    "harmful_refused": "#0072b2",
    "benign": "#009e73",
}
_OTHERS = ("#cc79a7", "#7a6a00", "#56779a")
_DASHES = ([1, 0], [7, 3], [2, 3], [9, 3, 2, 3], [4, 4], [1, 2])
# Widths are measured in Liberation Sans, so fonts of that width come first.
_FONT = "Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif"
_OFFSET = "tokens from the end of thinking (0 is the first token of the end template)"
_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")


def trace_panels(
    curves: Sequence[Curve],
    template: int | None,
    width: int,
    height: int,
    *,
    bare: bool = False,
) -> tuple[Any, Any]:
    """Return the panel of mean scores and the panel of counts beneath it.

    `template`: Tokens in the end-of-thinking template; None if not known.
    """
    points = [
        {**point, "group": title(curve["group"], GROUPS)}
        for curve in curves
        for point in curve["points"]
    ]
    offsets = [point["offset"] for curve in curves for point in curve["points"]]
    first, last = min(offsets), max(offsets)
    domain = [first, max(last, first + 1)]
    colour, dash = _group_scales(curves)
    base = alt.Chart(alt.Data(values=points))
    across = _offset("offset", domain, bare=bare)
    unit = alt.Scale(domain=[0, 1])
    band = base.mark_area(opacity=0.16).encode(
        x=across,
        y=alt.Y("low:Q", scale=unit, title=None),
        y2="high:Q",
        color=colour,
    )
    line = base.mark_line(strokeWidth=2.25).encode(
        x=across,
        y=alt.Y("mean:Q", scale=unit, title=None, axis=alt.Axis(tickCount=5)),
        color=colour,
        strokeDash=dash,
    )
    shade, names = _regions(domain, template, bare=bare)
    main = alt.layer(shade, band, line, names).properties(width=width, height=height)
    count = base.mark_line(strokeWidth=1.75, interpolate="step-after").encode(
        x=_offset("offset", domain),
        y=alt.Y("n:Q", scale=alt.Scale(domainMin=0, nice=True), title=None).axis(
            tickCount=3, tickMinStep=1
        ),
        color=colour,
        strokeDash=dash,
    )
    return main, count.properties(width=width, height=70)


def interval_panel(
    rows: Sequence[tuple[str, str, Figure]],
    colours: Mapping[str, str],
    width: int,
    step: int = 34,
    *,
    legend: bool = True,
) -> Any:
    """Return a panel of shares as dots with their intervals.

    Returns: An Altair chart. A share that was not measured is said so in words.
    """
    values = [
        {"name": name, "kind": kind, "missing": "not measured", **figure}
        for name, kind, figure in rows
    ]
    measured = [row for row in values if row["value"] is not None]
    absent = [row for row in values if row["value"] is None]
    names = list(dict.fromkeys(name for name, _, _ in rows))
    key = alt.Legend(
        title=None, orient="top", symbolSize=110, symbolOpacity=1, columnPadding=22
    )
    shown = key if legend else None
    shapes = ["circle", "diamond", "square"][: len(colours)]
    place = {
        "y": alt.Y("name:N", sort=names, title=None).axis(
            labelLimit=240,
            labelPadding=10,
            domain=False,
            ticks=False,
            grid=True,
            labelFontSize=12,
        ),
        "color": alt.Color(
            "kind:N",
            scale=alt.Scale(domain=list(colours), range=list(colours.values())),
            legend=shown,
        ),
    }
    ticks = [0, 0.25, 0.5, 0.75, 1]
    across = alt.X("value:Q", scale=alt.Scale(domain=[0, 1]), title=None).axis(
        format="%", values=ticks, grid=True, gridDash=[1, 3]
    )
    if len(rows) > len(names):
        place["yOffset"] = alt.YOffset("kind:N", sort=list(colours))
    base = alt.Chart(alt.Data(values=measured))
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(
        x=across,
        shape=alt.Shape(
            "kind:N", scale=alt.Scale(domain=list(colours), range=shapes), legend=shown
        ),
        **place,
    )
    ranges = base.mark_rule(strokeWidth=2.5, opacity=0.5).encode(
        x=alt.X("low:Q", title=None), x2="high:Q", **place
    )
    words = (
        alt.Chart(alt.Data(values=absent))
        .mark_text(align="left", dx=4, fontSize=11, fontStyle="italic")
        .encode(x=alt.datum(0), text="missing:N", **place)
    )
    return alt.layer(ranges, dots, words).properties(
        width=width, height=max(1, len(names)) * step
    )


def interval_lines(
    points: Sequence[Mapping[str, Any]],
    x: Any,
    colours: Mapping[str, str],
    scale: Any,
    *,
    title: str | None = None,
    form: str = "",
) -> Any:
    """Return lines of figures with their intervals, a colour and a dash per kind.

    `points`: Figures, each with its `kind` and the field of the channel `x`; those
    that have no value are left out.
    `colours`: The kinds in their order.
    """
    known = [point for point in points if point["value"] is not None]
    kinds = list(colours)
    legend = alt.Legend(title=None, orient="bottom", labelLimit=300)
    tones = alt.Scale(domain=kinds, range=list(colours.values()))
    colour = alt.Color("kind:N", scale=tones, legend=legend if kinds[1:] else None)
    axis = alt.Axis(format=form, tickCount=5)
    value = alt.Y("value:Q", scale=scale, title=title, axis=axis)
    dash = alt.StrokeDash("kind:N", sort=kinds, legend=None)
    base = alt.Chart(alt.Data(values=known)).encode(x=x, color=colour)
    return alt.layer(
        base.mark_rule(strokeWidth=2, opacity=0.5).encode(
            y=alt.Y("low:Q", scale=scale, title=title), y2="high:Q"
        ),
        base.mark_line(strokeWidth=2).encode(y=value, strokeDash=dash),
        base.mark_point(filled=True, size=60, opacity=1).encode(y=value),
    )


def heading(text: str) -> Any:
    """Return the small title of one panel."""
    return alt.TitleParams(
        text, anchor="start", fontSize=13, fontWeight=600, frame="group", offset=8
    )


def to_svg(chart: Any, name: str, description: str, *, standalone: bool = False) -> str:
    """Turn a chart into SVG with an accessible name, needing no network.

    `standalone`: Whether it stands alone as a document, on white; else it is part of a
    page, which gives the ground and needs no namespace address.
    """
    edge = 20 if standalone else 4
    # Fonts differ in width from machine to machine: labels need room at both sides.
    padding = {"left": 20, "right": 24, "top": edge, "bottom": edge}
    styled = _style(chart, "#ffffff" if standalone else "transparent", padding)
    drawn = str(vl_convert.vegalite_to_svg(styled.to_dict()))
    drawn = _CONTROL_CHARACTERS.sub("\ufffd", drawn)
    label = html.escape(clean(name)), html.escape(clean(description))
    inside = f"<title>{label[0]}</title><desc>{label[1]}</desc>"
    opening, rest = drawn.split(">", 1)
    if not standalone:
        opening = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", opening)
        opening = opening.replace('class="marks"', 'class="figure"')
    return f'{opening} role="img" aria-label="{label[0]}">{inside}{rest}'


def line_legend(**more: Any) -> alt.Legend:
    """Return the legend of lines with bands, whose own faintness it must not take."""
    return alt.Legend(
        title=None,
        symbolType="stroke",
        symbolSize=500,
        symbolOpacity=1,
        symbolStrokeWidth=2.25,
        **more,
    )


def _offset(field: str, domain: Sequence[int], *, bare: bool = False) -> Any:
    """Return the horizontal channel; layers only share an axis if all agree on it."""
    scale = alt.Scale(domain=list(domain), nice=False)
    axis = alt.Axis(grid=False, labels=not bare, ticks=not bare)
    return alt.X(f"{field}:Q", scale=scale, title=None if bare else _OFFSET, axis=axis)


def _group_scales(curves: Sequence[Curve]) -> tuple[Any, Any]:
    """Give every group its colour and its dash; unknown groups get the next ones."""
    others = itertools.cycle(_OTHERS)
    names = [title(curve["group"], GROUPS) for curve in curves]
    colours = [PALETTE.get(curve["group"]) or next(others) for curve in curves]
    dashes = [_DASHES[index % len(_DASHES)] for index in range(len(curves))]
    key = line_legend(orient="top", columnPadding=22, offset=24)
    return (
        alt.Color("group:N", scale=alt.Scale(domain=names, range=colours), legend=key),
        alt.StrokeDash(
            "group:N", scale=alt.Scale(domain=names, range=dashes), legend=key
        ),
    )


def _regions(
    domain: Sequence[int], template: int | None, *, bare: bool
) -> tuple[Any, Any]:
    """Shade thinking, end template and answer, and name them inside the panel."""
    first, last = domain
    edge = last if template is None else max(first, min(template, last))
    closing = "after thinking" if template is None else "end template"
    spans = [
        (first, min(0, last), "thinking", THINKING, first, "left"),
        (max(0, first), edge, closing, TEMPLATE, edge, "right"),
        (edge, last, "answer", ANSWER, edge, "left"),
    ]
    keys = ("from", "to", "name", "fill", "at", "align")
    data = alt.Data(
        values=[dict(zip(keys, row, strict=True)) for row in spans if row[0] < row[1]]
    )
    fills = [THINKING, TEMPLATE, ANSWER]
    tone = alt.Fill("fill:N", scale=alt.Scale(domain=fills, range=fills), legend=None)
    shade = (
        alt.Chart(data)
        .mark_rect()
        .encode(x=_offset("from", domain, bare=bare), x2="to:Q", fill=tone)
    )
    names = [
        alt.Chart(data)
        .transform_filter(f"datum.align == '{align}'")
        .mark_text(align=align, baseline="bottom", dx=dx, fontSize=11, color=MUTED)
        .encode(x=_offset("at", domain, bare=bare), y=alt.value(-5), text="name:N")
        for align, dx in (("left", 3), ("right", -1))
    ]
    return shade, alt.layer(*names)


def _style(chart: Any, background: str, padding: dict[str, int]) -> Any:
    """Dress a chart in the fonts and colours of the page."""
    return (
        chart.configure(background=background, font=_FONT, padding=padding)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=MUTED,
            titleColor=MUTED,
            domainColor=RULE,
            tickColor=RULE,
            gridColor=RULE,
            labelFontSize=11,
            titleFontSize=11,
            titleFontWeight="normal",
            titlePadding=8,
        )
        .configure_legend(labelColor=INK, labelFontSize=12, labelLimit=300, offset=6)
        .configure_title(color=INK, subtitleColor=MUTED)
    )
