"""What the page shows of the sink: the grid of heads, and the curve of a run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import altair as alt

from holdfast.report.panels import MUTED, heading, to_svg
from holdfast.report.records import Figure, Report
from holdfast.report.sink_words import (
    PAIRING,
    POSITIONS,
    count,
    mass,
    points,
    step_name,
)
from holdfast.report.text import clean

__all__ = ["curve_figure", "sink_context"]

_MIDDLE = 5
_SHOWN = 16
_WIDTH, _HEIGHT = 270, 220
_HARMFUL, _REFERENCE = "#d55e00", "#0072b2"


def sink_context(report: Report) -> dict[str, Any] | None:
    """Prepare what the page shows of the sink.

    Args:
        report: A report that passes `schema.validate`.

    Returns:
        None where the report has no such block.
    """
    block = report.get("sinks")
    if block is None:
        return None
    checkpoints = block["checkpoints"]
    known = [each for each in block["heads"] if each["divergence"]["value"] is not None]
    first = sorted(known, key=lambda each: -abs(each["divergence"]["value"]))
    return {
        "svg": curve_figure(checkpoints) if len(checkpoints) > 1 else "",
        "last": step_name(checkpoints[-1]),
        "checkpoints": [_line(each) for each in checkpoints],
        "width": range(block["n_heads"]),
        "divergence_grid": _grid(block, "divergence", _signed),
        "mass_grid": _grid(block, "harmful", _unsigned),
        "top": [_head(each) for each in first[:_SHOWN]],
        "evidence": block["evidence"],
        "notes": block["notes"],
        "rows": block["rows"],
        "requests": block["requests"],
        "pairing": PAIRING[block["pairing"]],
        "positions": POSITIONS[block["positions"]],
    }


def curve_figure(checkpoints: Sequence[Mapping[str, Any]]) -> str:
    """Draw positive heads and sink mass over the checkpoints of a run.

    Args:
        checkpoints: Records of the checkpoints, in order.

    Returns:
        One SVG element, with title and description.
    """
    # Two checkpoints may have one name, and would lie on each other.
    names = [f"{at + 1}. {step_name(each)}" for at, each in enumerate(checkpoints)]
    return to_svg(
        alt.hconcat(_counts(checkpoints, names), _masses(checkpoints, names)),
        "Sink divergence over the checkpoints",
        "On the left how many heads look at the first token more on harmful text, and "
        "as a grey band how many would if none diverged. On the right the mean "
        "attention to the first token on harmful and on reference text. Bars are 95% "
        "intervals. The table below has the numbers.",
    )


def _counts(checkpoints: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Any:
    positive = _points(checkpoints, names, "positive", "positive heads")
    chance = _points(checkpoints, names, "by_chance", "if no head diverged")
    total = max(each["measured"] for each in checkpoints)
    scale = alt.Scale(domain=[0, max(1, total)])
    band = (
        alt.Chart(alt.Data(values=chance))
        .mark_bar(opacity=0.25, color=MUTED, width={"band": 0.7})
        .encode(x=_place(names), y=alt.Y("low:Q", scale=scale), y2="high:Q")
    )
    drawn = _series(positive, names, [_HARMFUL], scale, f"heads, of {total}")
    return alt.layer(band, drawn).properties(
        width=_WIDTH, height=_HEIGHT, title=heading("Positive heads")
    )


def _masses(checkpoints: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Any:
    both = [
        *_points(checkpoints, names, "harmful", "harmful text"),
        *_points(checkpoints, names, "reference", "reference text"),
    ]
    scale = alt.Scale(domain=[0, 1])
    drawn = _series(both, names, [_HARMFUL, _REFERENCE], scale, None, "%")
    return drawn.properties(
        width=_WIDTH, height=_HEIGHT, title=heading("Attention to the first token")
    )


def _points(
    checkpoints: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    key: str,
    kind: str,
) -> list[dict[str, Any]]:
    found = zip(names, checkpoints, strict=True)
    return [
        {**each[key], "at": name, "kind": kind}
        for name, each in found
        if each[key]["value"] is not None
    ]


def _place(names: Sequence[str]) -> Any:
    axis = alt.Axis(labelAngle=-40, labelLimit=150, labelOverlap=True)
    return alt.X("at:N", sort=list(names), title=None, axis=axis)


def _series(
    values: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    colours: Sequence[str],
    scale: Any,
    title: str | None,
    form: str = "",
) -> Any:
    kinds = list(dict.fromkeys(each["kind"] for each in values))
    legend = alt.Legend(title=None, orient="bottom") if len(kinds) > 1 else None
    base = alt.Chart(alt.Data(values=list(values)))
    shared = {
        "x": _place(names),
        "color": alt.Color(
            "kind:N", scale=alt.Scale(domain=kinds, range=list(colours)), legend=legend
        ),
    }
    axis = alt.Axis(format=form, tickCount=5)
    height = alt.Y("value:Q", scale=scale, title=title, axis=axis)
    rules = base.mark_rule(strokeWidth=2, opacity=0.5).encode(
        y=alt.Y("low:Q", scale=scale, title=title), y2="high:Q", **shared
    )
    dash = alt.StrokeDash("kind:N", sort=kinds, legend=None)
    line = base.mark_line(strokeWidth=2).encode(y=height, strokeDash=dash, **shared)
    dots = base.mark_point(filled=True, size=60, opacity=1).encode(y=height, **shared)
    return alt.layer(rules, line, dots)


def _grid(
    block: Mapping[str, Any], key: str, tone: Callable[[float], int]
) -> list[tuple[int, list[dict[str, Any]]]]:
    found = {(each["layer"], each["head"]): each for each in block["heads"]}
    values = [each[key]["value"] or 0.0 for each in block["heads"]]
    largest = max((abs(value) for value in values), default=0.0) or 1.0
    return [
        (
            layer,
            [
                _cell(found[layer, head], key, largest, tone)
                for head in range(block["n_heads"])
            ],
        )
        for layer in range(block["n_layers"])
    ]


def _cell(
    each: Mapping[str, Any], key: str, largest: float, tone: Callable[[float], int]
) -> dict[str, Any]:
    """Colour a head: orange looks at the sink more on harmful text, blue less."""
    value = each[key]["value"]
    said = (
        f"layer {each['layer']}, head {each['head']}; "
        f"divergence {points(each['divergence'])} points; "
        f"harmful {mass(each['harmful'])}; reference {mass(each['reference'])}"
    )
    return {
        "tone": _MIDDLE if value is None else tone(value / largest),
        "title": clean(said),
        "sure": _is_sure(each["divergence"]),
    }


def _signed(share: float) -> int:
    return _MIDDLE - round(_MIDDLE * share)


def _unsigned(share: float) -> int:
    return _MIDDLE + round(_MIDDLE * share)


def _is_sure(figure: Figure) -> bool:
    low, high = figure["low"], figure["high"]
    return low is not None and high is not None and (low > 0 or high < 0)


def _line(each: Mapping[str, Any]) -> dict[str, str]:
    return {
        "name": step_name(each),
        "positive": f"{count(each['positive'])} of {each['measured']}",
        "by_chance": count(each["by_chance"]),
        "sure": f"{each['above']} / {each['below']}",
        "divergence": points(each["mean_divergence"]),
        "harmful": mass(each["harmful"]),
        "reference": mass(each["reference"]),
        "penalty": points(each["penalty"]),
    }


def _head(each: Mapping[str, Any]) -> dict[str, str]:
    return {
        "name": f"{each['layer']} : {each['head']}",
        "divergence": points(each["divergence"]),
        "harmful": mass(each["harmful"]),
        "reference": mass(each["reference"]),
    }
