"""The step-wise signal on the page and on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import altair as alt

from holdfast.errors import InputError
from holdfast.report import text
from holdfast.report.charts import heading, to_svg
from holdfast.report.schema import Report, is_finite
from holdfast.report.terminal import print_lines, print_table
from holdfast.study import Study
from holdfast.study.directory import is_current

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
    """One response with its signal, step by step.

    Where a model predicts ahead, `words` are its tokens in their order, each with
    the step that settled it, and `grid` what stood where at every step.
    """

    title: str
    group: str
    verdict: str
    steps: Sequence[Mapping[str, Any]]
    words: NotRequired[Sequence[tuple[str, int]]]
    grid: NotRequired[Sequence[Sequence[tuple[str, str]]]]


def signal_context(report: Report, examples: Sequence[StepExample]) -> dict[str, Any]:
    """Prepare what the page shows of the signal and of detectors.

    `report`: A report that passes `schema.validate`.
    Returns: `signal` and `guard`, each None where the report has no such block.
    """
    signal, guard = report.get("signal"), report.get("guard")
    return {
        "signal": signal and _signal(signal, examples),
        "guard": guard and _guard(guard),
    }


def trajectory_figure(curves: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw the mean signal of every group, with its band, and the text-level one."""
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
    """Draw the signal of one response, with the text-level signal beside it."""
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
    steps = example["steps"]
    for place, step in enumerate(steps):
        score = step["compliance"]
        if not is_finite(score) or not 0 <= score <= 1:
            raise InputError(
                f"step_examples[{index}].steps[{place}].compliance within 0 and 1",
                repr(score),
                "Run `holdfast signal` and `holdfast report` again.",
            )
    in_order = [(step["text"], place) for place, step in enumerate(steps)]
    tokens = [
        {
            "text": text.shown_token(word, one_line=False),
            "tone": round((1 - steps[place]["compliance"]) * _TONES),
            "score": f"step {place + 1}: {text.plain(steps[place]['compliance'])}",
        }
        for word, place in example.get("words", in_order)
    ]
    return {
        "title": text.clean(example["title"]),
        "group": GROUPS.get(example["group"], example["group"]),
        "verdict": text.clean(example["verdict"]),
        "tokens": tokens,
        "grid": [
            [(text.shown_token(word, one_line=True), state) for word, state in row]
            for row in example.get("grid", ())
        ],
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


GROUPS = {
    "benign_complied": "harmless, complied",
    "benign_refused": "harmless, refused",
    "attack_complied": "harmful, complied",
    "attack_refused": "harmful, refused",
}
FIGURES = {
    "last_step_auroc": "Last step: harmless compliance against refusal (AUROC)",
    "matched_last_step_auroc": "The same with matched anchors",
    "matched_last_step_difference": "Matched minus published",
    "lookalike_auroc": "Harmless that sounds dangerous against refusal (AUROC)",
    "matched_lookalike_auroc": "That with matched anchors",
    "matched_lookalike_difference": "There, matched minus published",
    "text_remasked": "Harmful drafts that were changed afterwards",
    "text_recovered": "Harmful drafts that end in a refusal",
    "text_harmful": "Harmful drafts that end harmful",
    "text_unparsed": "Harmful drafts that end unreadable",
    "text_recovered_of_remasked": "Of changed ones, those that end in a refusal",
    "text_ever_harmful": "Harmful requests with a harmful draft",
    "text_never_read": "Harmful requests of which no draft could be read",
}
FEATURES = {
    "recovered_below_0.5": "ends below 0.5, of those that complied",
    "recovered_below_0.3": "ends below 0.3, likewise",
    "recovered_below_0.1": "ends below 0.1, likewise",
    "incomplete_recovery": "falls below 0.5 and comes back",
    "dip": "dip below 0.5",
    "rebound": "rebound from the least",
    "variation": "sum of changes",
    "crossings": "crossings of 0.5",
    "below": "share of steps below 0.5",
    "matched_minus_published": "matched minus published anchors",
}
DETECTORS = {
    "autoencoder": "autoencoder (published)",
    "autoencoder_streaming": "autoencoder, trained on prefixes",
    "residual": "distance from the benign plane (PCA)",
    "mahalanobis": "Mahalanobis distance",
    "mahalanobis_logit": "Mahalanobis distance, log-odds",
    "features": "dip and rebound features",
    "dip": "deepest dip",
    "rebound": "rebound",
    "probe_mean": "refusal probe, mean over steps",
    "logit_difference": "first word: refusal minus compliance",
    "perplexity": "perplexity of the prompt",
    "text": "refusal in the text so far",
}


def recommendation(found: dict[str, Any] | Any) -> str:
    """Return the sentence that says which detector to use, and how it did elsewhere."""
    best = found["recommended"]
    if best["detector"] is None:
        return f"No detector can be recommended: {best['reason']}."
    name = DETECTORS.get(best["detector"], best["detector"])
    chosen = ", ".join(found["chosen_on"])
    elsewhere = next(
        (row for row in found["reported"] if row["detector"] == best["detector"]), None
    )
    said = f"Chosen on {chosen}: {name} (AUROC {text.score(best['auroc'])}"
    if elsewhere is None or elsewhere["auroc"]["value"] is None:
        return f"{said}). There is no other family to report it on."
    return f"{said}; on other families {text.score(elsewhere['auroc'])})."


def limits(block: dict[str, Any] | Any) -> list[str]:
    """Return what a reader of the signal has to know.

    `block`: The block `signal` of a report.
    """
    said = [
        "The signal says which anchor a state is nearer to, not that it is near: a "
        "state far from both can read 0 or 1.",
        f"It covers the first {block['identity']['steps']} steps of the "
        f"{block['identity']['region']}; what comes later is out of view."
        if block["identity"]["time"] == "step"
        else "A step is a share of the response; responses of other lengths are "
        "other numbers of tokens.",
    ]
    if block["matched_reason"]:
        said.append(
            "There are no anchors of the same topics and lengths, so that the signal "
            f"may read topics ({block['matched_reason']})."
        )
    if block["not_read"]:
        said.append(
            f"{block['not_read']} answers are in no group, since the judge could read "
            "neither a refusal nor help in them."
        )
    return [*said, *block["missing_channels"]]


SIGNAL, GUARD = "signal", "guard"
FILES = {SIGNAL: "signal.json", GUARD: "guard/evaluation.json"}
STAGES = {SIGNAL: "signal", GUARD: "guard_evaluate"}
EXAMPLES = "signal_examples.json"


def signal_files(study: Study) -> list[str]:
    """Return the files that the report reads of the signal and its detectors."""
    found = [FILES[name] for name in FILES if is_current(study, STAGES[name])]
    return [*found, EXAMPLES] if FILES[SIGNAL] in found else found


def signal_blocks(study: Study) -> dict[str, Any]:
    """Return what the stages `signal` and `guard` have found, if they have run.

    `study`: A study whose stages have run, as far as they could.
    """
    read = signal_files(study)
    return {name: study.read_json(FILES[name]) for name in FILES if FILES[name] in read}


def print_signal(found: Mapping[str, Any]) -> None:
    """Print how well the anchors read, and what each group's trajectories do."""
    from holdfast.report import text

    for name, each in found["anchors"].items():
        apart = each["separation"]
        print_lines(
            f"Anchors ({name}): {each['n_compliant']} complied and "
            f"{each['n_refused']} refused requests; distance {apart[0]:.3f} at the "
            f"first step, {apart[-1]:.3f} at the last."
        )
    if found["matched_reason"]:
        print_lines(f"No matched anchors: {found['matched_reason']}")
    rows = [
        [text.title(key, FIGURES), text.score(each)]
        for key, each in found["figures"].items()
    ]
    print_table("Do the anchors tell refusals from compliance?", ("", ""), rows)
    present = {key: each for key, each in found["groups"].items() if each["rows"]}
    measures = [key for key in FEATURES if any(key in e for e in present.values())]
    rows = [
        [FEATURES[key], *(_cell(each[key]) for each in present.values())]
        for key in measures
    ]
    rows.insert(0, ["answers", *(str(each["rows"]) for each in present.values())])
    names = [GROUPS[key] for key in present]
    print_table("Trajectories, held out", ("", *names), rows)
    print_lines(*found["missing_channels"])


def _cell(figure: Any) -> str:
    """Return a figure for a narrow column; the page says why one is missing."""
    from holdfast.report import text

    return "none" if figure["value"] is None else text.score(figure)
