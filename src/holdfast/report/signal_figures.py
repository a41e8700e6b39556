"""The figures of the step-wise signal, and what the page says of it."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import altair as alt

from holdfast.errors import InputError
from holdfast.report import text
from holdfast.report.panels import heading, to_svg
from holdfast.report.records import Report, is_finite
from holdfast.report.signal_words import (
    DETECTORS,
    FEATURES,
    FIGURES,
    GROUPS,
    limits,
    recommendation,
)

__all__ = ["StepExample", "signal_context", "step_figure", "trajectory_figure"]

_COLOURS = {
    "benign_complied": "#009e73",
    "benign_refused": "#7a6a00",
    "attack_complied": "#d55e00",
    "attack_refused": "#0072b2",
}
_DASHES = {
    "benign_complied": [1, 0],
    "benign_refused": [2, 3],
    "attack_complied": [7, 3],
    "attack_refused": [9, 3, 2, 3],
}
_TONES = 10
_LINE, _SAID = "signal", "text so far"
_SETS = {
    "compliance_logit": "Published anchors",
    "matched_logit": "Matched anchors",
    "text": "Text so far",
}


class StepExample(TypedDict):
    """One response with its signal, step by step."""

    title: str
    group: str
    verdict: str
    steps: Sequence[Mapping[str, Any]]


def signal_context(report: Report, examples: Sequence[StepExample]) -> dict[str, Any]:
    """Prepare what the page shows of the signal and of detectors.

    Args:
        report: A report that passes `schema.validate`.
        examples: Single responses, step by step.

    Returns:
        `signal` and `guard`, each None where the report has no such block.

    Raises:
        InputError: If a number of an example is not within 0 and 1.
    """
    signal, guard = report.get("signal"), report.get("guard")
    return {
        "signal": signal and _signal(signal, examples),
        "guard": guard and _guard(guard),
    }


def trajectory_figure(curves: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw the mean signal of every group, with its band, and the text-level one.

    Args:
        curves: Curves of every group, by what they were read from.

    Returns:
        One SVG element, with title and description.
    """
    panels = [
        _trajectories(curves[key]).properties(
            title=heading(name), width=230, height=220
        )
        for key, name in _SETS.items()
        if curves.get(key)
    ]
    groups = ", ".join(GROUPS[group] for group in curves["compliance_logit"])
    return to_svg(
        alt.hconcat(*panels, spacing=28),
        "Mean signal at every step, by outcome",
        f"One line each for: {groups}. 1 complies, 0 refuses. Bands are 95% "
        "intervals. The table below has the numbers of the first panel.",
    )


def step_figure(example: StepExample) -> str:
    """Draw the signal of one response, with the text-level signal beside it.

    Args:
        example: The response.

    Returns:
        One SVG element, with title and description.
    """
    kinds = {"compliance": _LINE, "text_signal": _SAID}
    points = [
        {"step": place + 1, "kind": kind, "value": step[key]}
        for place, step in enumerate(example["steps"])
        for key, kind in kinds.items()
    ]
    scale = alt.Scale(domain=[_LINE, _SAID], range=["#d55e00", "#5c6661"])
    key = alt.Legend(title=None, orient="right")
    chart = (
        alt.Chart(alt.Data(values=points))
        .mark_line(point=True, strokeWidth=2)
        .encode(
            x=_across(len(example["steps"])),
            y=_upwards("value:Q"),
            color=alt.Color("kind:N", scale=scale, legend=key),
            strokeDash=alt.StrokeDash(
                "kind:N",
                scale=alt.Scale(domain=[_LINE, _SAID], range=[[1, 0], [4, 3]]),
                legend=key,
            ),
        )
    )
    return to_svg(
        chart.properties(width=520, height=90),
        f"Signal at every step: {text.clean(example['title'])}",
        "The solid line is the signal, the dashed one falls to 0 where the text so "
        "far is a refusal. The words above have the same numbers.",
    )


def _trajectories(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    points = [
        {**point, "group": GROUPS[group]}
        for group, curve in groups.items()
        for point in curve
    ]
    names = [GROUPS[group] for group in GROUPS]
    key = alt.Legend(title=None, orient="bottom", columns=2, symbolType="stroke")
    colour = alt.Color(
        "group:N",
        scale=alt.Scale(domain=names, range=[_COLOURS[group] for group in GROUPS]),
        legend=key,
    )
    dash = alt.StrokeDash(
        "group:N",
        scale=alt.Scale(domain=names, range=[_DASHES[group] for group in GROUPS]),
        legend=key,
    )
    n_steps = max(point["step"] for point in points)
    across = _across(n_steps)
    base = alt.Chart(alt.Data(values=points))
    band = base.mark_area(opacity=0.16).encode(
        x=across, y=_upwards("low:Q"), y2="high:Q", color=colour
    )
    line = base.mark_line(strokeWidth=2.25).encode(
        x=across, y=_upwards("mean:Q"), color=colour, strokeDash=dash
    )
    return alt.layer(band, line)


def _across(n_steps: int) -> Any:
    scale = alt.Scale(domain=[1, max(2, n_steps)], nice=False)
    return alt.X("step:Q", scale=scale, title="step", axis=alt.Axis(tickMinStep=1))


def _upwards(field: str) -> Any:
    return alt.Y(field, scale=alt.Scale(domain=[0, 1]), title=None).axis(tickCount=5)


def _signal(
    block: Mapping[str, Any], examples: Sequence[StepExample]
) -> dict[str, Any]:
    present = {key: each for key, each in block["groups"].items() if each["rows"]}
    first = block["curves"].get("compliance_logit", {})
    rows = [
        (step, [curve[step - 1] for curve in first.values()])
        for step in range(1, 1 + max((len(c) for c in first.values()), default=0))
    ]
    return {
        "mode": block["mode"],
        "steps": block["identity"]["steps"],
        "svg": trajectory_figure(block["curves"]) if first else "",
        "curve_names": [GROUPS[group] for group in first],
        "curve_rows": [
            (step, [_point(point) for point in points]) for step, points in rows
        ],
        "anchors": block["anchors"],
        "figures": [
            (text.title(key, FIGURES), figure)
            for key, figure in block["figures"].items()
        ],
        "groups": {GROUPS[key]: each for key, each in present.items()},
        "features": {
            key: words
            for key, words in FEATURES.items()
            if any(key in each for each in present.values())
        },
        "notes": limits(block),
        "examples": [_example(each, index) for index, each in enumerate(examples)],
    }


def _point(point: Mapping[str, Any]) -> str:
    ends = {"value": point["mean"], "low": point["low"], "high": point["high"]}
    return text.score({**ends, "n": point["n"]})  # type: ignore[typeddict-item]


def _example(example: StepExample, index: int) -> dict[str, Any]:
    """Prepare one response: its words with their tone, and its figure."""
    tokens = []
    for place, step in enumerate(example["steps"]):
        score = step["compliance"]
        if not is_finite(score) or not 0 <= score <= 1:
            raise InputError(
                f"step_examples[{index}].steps[{place}].compliance within 0 and 1",
                repr(score),
                "Run `holdfast signal` and `holdfast report` again.",
            )
        tokens.append(
            {
                "text": text.shown_token(step["text"], one_line=False),
                "tone": round((1 - score) * _TONES),
                "score": f"step {place + 1}: {text.plain(score)}",
            }
        )
    return {
        "title": text.clean(example["title"]),
        "group": GROUPS.get(example["group"], example["group"]),
        "verdict": text.clean(example["verdict"]),
        "tokens": tokens,
        "svg": step_figure(example),
    }


def _guard(block: Mapping[str, Any]) -> dict[str, Any]:
    within = {row["detector"]: row["auroc"] for row in block["within_wrappers"]}
    levels = block["reported"][0]["levels"] if block["reported"] else []
    return {
        "said": recommendation(block),
        "notes": block["notes"],
        "chosen_on": block["chosen_on"],
        "reported_on": block["reported_on"],
        "requests": block["facts"]["requests"],
        "levels": [level["level"] for level in levels],
        "rows": [
            {**row, "name": _name(row), "within": within.get(row["detector"])}
            for row in block["reported"]
        ],
        "domains": [
            (text.clean(name), each["rows"], _named(each["table"]))
            for name, each in block["by_domain"].items()
        ],
        "families": [
            (text.clean(name), each["rows"], _named(each["table"]))
            for name, each in block["by_family"].items()
        ],
        "detectors": [_name(row) for row in block["reported"]],
        "streaming": {
            "level": block["streaming"]["level"],
            "rows": [
                {**row, "name": _name(row)} for row in block["streaming"]["table"]
            ],
        },
    }


def _named(table: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {_name(row): row for row in table}


def _name(row: Mapping[str, Any]) -> str:
    return DETECTORS.get(row["detector"], str(row["detector"]))
