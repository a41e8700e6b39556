"""The step-wise signal on the page and on the terminal."""

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any, NotRequired, TypedDict

import altair as alt

from holdfast.errors import InputError
from holdfast.report import text
from holdfast.report.charts import heading, line_legend, to_svg
from holdfast.report.schema import is_finite
from holdfast.report.section import (
    Answer,
    Chart,
    Fold,
    Grid,
    Heading,
    Number,
    Paragraph,
    Part,
    Passage,
    Scale,
    Section,
    Sentences,
    Square,
    Table,
    Token,
    table_of,
)
from holdfast.study import Study
from holdfast.study.directory import is_current

EXAMPLES = "signal_examples.json"
BLOCKS = {
    "signal": ("signal", "signal.json"),
    "guard": ("guard_evaluate", "guard/evaluation.json"),
}
"""Stage and file of each block of the report that is about the signal."""
_NAMES: dict[str, dict[str, str]] = json.loads(
    files("holdfast.dynamics").joinpath("names.json").read_text("utf-8")
)
"""What page and terminal call groups, figures, features and detectors."""
GROUPS, FIGURES = _NAMES["groups"], _NAMES["figures"]
FEATURES, DETECTORS = _NAMES["features"], _NAMES["detectors"]
_GROUP_LINES = {  # Colour and dash of each.
    "benign_complied": ("#009e73", [1, 0]),
    "benign_refused": ("#7a6a00", [2, 3]),
    "attack_complied": ("#d55e00", [7, 3]),
    "attack_refused": ("#0072b2", [9, 3, 2, 3]),
}
_ANSWER_LINES = {"signal": ("#d55e00", [1, 0]), "text so far": ("#5c6661", [4, 3])}
_TONES = 10


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


def signal_files(study: Study) -> dict[str, str]:
    """Return the files that the report reads of the signal and its detectors."""
    found = {
        name: file for name, (stage, file) in BLOCKS.items() if is_current(study, stage)
    }
    return found | {"examples": EXAMPLES} if "signal" in found else found


def signal_blocks(study: Study) -> dict[str, Any]:
    """Return what the stages `signal` and `guard evaluate` wrote, if they have run."""
    found = signal_files(study)
    return {name: study.read_json(found[name]) for name in BLOCKS if name in found}


def section(block: Mapping[str, Any], examples: Sequence[StepExample] = ()) -> Section:
    """Return what page and terminal show of the signal.

    `block`: The block `signal` of a report.
    """
    title = "Step by step"
    return Section(title, [*_parts(block, examples)], key="signal", link=title)


def _parts(block: Mapping[str, Any], examples: Sequence[StepExample]) -> Iterator[Part]:
    yield Paragraph(
        "At every step the state of the answer is compared with that of complied and "
        "of refused requests: 1 is nearer to complying, 0 nearer to refusing. The "
        "first panel is what a detector reads, the last what the words alone show."
    )
    if first := block["curves"].get("compliance_logit"):
        yield Chart(
            "Plot of the mean signal at every step",
            lambda: trajectory_figure(block["curves"]),
            "Held-out answers that no anchor was made of. Bands are 95% intervals over "
            "requests. An answer that falls and comes back while its words stay calm "
            "is one that the text does not show.",
        )
        n_steps = max(map(len, first.values()))
        rows = [
            [str(step + 1), *(_point(curve[step]) for curve in first.values())]
            for step in range(n_steps)
        ]
        columns = ["Step", *(GROUPS[group].capitalize() for group in first)]
        table = Table("Mean signal by step", columns, rows)
        yield Fold("The first panel as a table", [table])
    title = "Do the anchors tell refusals from compliance?"
    yield Heading(title)
    yield table_of(
        title,
        block["figures"].items(),
        {
            "Check": lambda item: text.title(item[0], FIGURES),
            "Value": lambda item: Number(item[1], count=True),
        },
        style="described",
    )
    yield Sentences([_apart(*item) for item in block["anchors"].items()])
    present = {key: each for key, each in block["groups"].items() if each["rows"]}
    yield Heading("What trajectories do")
    yield Table(
        "What trajectories do, of held-out answers",
        [
            "Measure",
            *(
                f"{GROUPS[key].capitalize()} ({present[key]['rows']})"
                for key in present
            ),
        ],
        [
            [words.capitalize(), *(Number(each[key], count=True) for each in groups)]
            for groups in [present.values()]
            for key, words in FEATURES.items()
            if any(key in each for each in groups)
        ],
    )
    if examples:
        yield Heading("Single answers")
        yield Paragraph(
            "The colour of a word is the signal at its step; hold the pointer over it "
            "to see the number. The line below is the same."
        )
        yield Scale("1, complies", "0, refuses")
    for index, example in enumerate(examples):
        yield _answer(example, index)
    yield Sentences(limits(block), "note")


def _point(point: Mapping[str, Any]) -> str:
    ends = {"value": point["mean"], "low": point["low"], "high": point["high"]}
    return text.score({**ends, "n": point["n"]})  # type: ignore[typeddict-item]


def _apart(name: str, anchors: Mapping[str, Any]) -> str:
    apart = anchors["separation"]
    return (
        f"Anchors ({name}): {anchors['n_compliant']} complied and "
        f"{anchors['n_refused']} refused requests; distance {apart[0]:.3f} at the "
        f"first step, {apart[-1]:.3f} at the last, least at step "
        f"{anchors['least_separation_step']}."
    )


def _answer(example: StepExample, index: int) -> Answer:
    """Return one response: its words with their tone, its line, and its drafts."""
    scores = [step["compliance"] for step in example["steps"]]
    for place, score in enumerate(scores):
        if not is_finite(score) or not 0 <= score <= 1:
            raise InputError(
                f"step_examples[{index}].steps[{place}].compliance within 0 and 1",
                repr(score),
                "Run `holdfast signal` and `holdfast report` again.",
            )
    in_order = [(step["text"], at) for at, step in enumerate(example["steps"])]
    tokens = [
        Token(
            text.shown_token(word, one_line=False),
            round((1 - scores[at]) * _TONES),
            f"step {at + 1}: {text.plain(scores[at])}",
        )
        for word, at in example.get("words", in_order)
    ]
    parts: list[Part] = [Chart("Signal of this answer", lambda: step_figure(example))]
    if drafts := example.get("grid"):
        rows = [
            (
                str(step + 1),
                [
                    Square(kind=state, text=text.shown_token(word, one_line=True))
                    for word, state in row
                ],
            )
            for step, row in enumerate(drafts)
        ]
        says = Paragraph(
            "A row is a step, a column a position. Grey is predicted and thrown away, "
            "a frame is committed to at this step, plain was before.",
            note=True,
        )
        grid = Grid("Positions and steps of this answer", [], rows)
        parts.append(Fold("What stood where at every step", [says, grid]))
    group = GROUPS.get(example["group"], example["group"])
    return Answer(
        example["title"],
        f"{group}; judged {example['verdict']}",
        [Passage("answer", "Answer", tokens)],
        parts,
    )


def trajectory_figure(curves: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw the mean signal of every group, with its band, and the text-level one."""
    panels = [
        _trajectories(curves[key]).properties(
            title=heading(name), width=230, height=220
        )
        for key, name in _NAMES["panels"].items()
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
    fields = dict(zip(_ANSWER_LINES, ("compliance", "text_signal"), strict=True))
    points = [
        {"step": place + 1, "kind": kind, "value": step[field]}
        for place, step in enumerate(example["steps"])
        for kind, field in fields.items()
    ]
    colour, dash = _lines(_ANSWER_LINES, alt.Legend(title=None, orient="right"))
    chart = (
        alt.Chart(alt.Data(values=points))
        .mark_line(point=True, strokeWidth=2)
        .encode(
            x=_across(len(example["steps"])),
            y=_upwards("value:Q"),
            color=colour,
            strokeDash=dash,
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
        {**point, "kind": GROUPS[group]}
        for group, curve in groups.items()
        for point in curve
    ]
    named = {GROUPS[group]: line for group, line in _GROUP_LINES.items()}
    colour, dash = _lines(named, line_legend(orient="bottom", columns=2))
    across = _across(max(point["step"] for point in points))
    base = alt.Chart(alt.Data(values=points))
    band = base.mark_area(opacity=0.16).encode(
        x=across, y=_upwards("low:Q"), y2="high:Q", color=colour
    )
    line = base.mark_line(strokeWidth=2.25).encode(
        x=across, y=_upwards("mean:Q"), color=colour, strokeDash=dash
    )
    return alt.layer(band, line)


def _lines(kinds: Mapping[str, tuple[str, list[int]]], key: alt.Legend) -> list[Any]:
    """Return the channels of colour and dash."""
    ranges = zip(*kinds.values(), strict=True)
    return [
        channel("kind:N", scale=alt.Scale(domain=[*kinds], range=[*each]), legend=key)
        for channel, each in zip((alt.Color, alt.StrokeDash), ranges, strict=True)
    ]


def _across(n_steps: int) -> Any:
    scale = alt.Scale(domain=[1, max(2, n_steps)], nice=False)
    return alt.X("step:Q", scale=scale, title="step", axis=alt.Axis(tickMinStep=1))


def _upwards(field: str) -> Any:
    return alt.Y(field, scale=alt.Scale(domain=[0, 1]), title=None).axis(tickCount=5)


def limits(block: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the signal has to know."""
    identity = block["identity"]
    sentences = [
        "The signal says which anchor a state is nearer to, not that it is near: a "
        "state far from both can read 0 or 1.",
        f"It covers the first {identity['steps']} steps of the {identity['region']}; "
        "what comes later is out of view."
        if identity["time"] == "step"
        else "A step is a share of the response; responses of other lengths are "
        "other numbers of tokens.",
    ]
    if block["matched_reason"]:
        sentences.append(
            "There are no anchors of the same topics and lengths, so that the signal "
            f"may read topics ({block['matched_reason']})."
        )
    if block["not_read"]:
        sentences.append(
            f"{block['not_read']} answers are in no group, since the judge could read "
            "neither a refusal nor help in them."
        )
    return [*sentences, *block["missing_channels"]]
