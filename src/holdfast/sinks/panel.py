"""The sink on the page and on the terminal: heads, curves and sentences."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import altair as alt

from holdfast.report.charts import MUTED, heading, interval_lines, to_svg
from holdfast.report.schema import Figure
from holdfast.report.section import (
    Chart,
    Fold,
    Heading,
    Paragraph,
    Part,
    Scale,
    Section,
    Sentences,
    head_grid,
    table_of,
)
from holdfast.report.text import clean, missing, plain
from holdfast.study import Study

SHOWN = 16
CHANCE = 0.05
"""Share of heads that do not diverge whose 95 % interval still misses 0."""
STAGE, MASSES = "sinks", "sinks.json"
PAIRING = {
    "prompt": "two texts on one prompt, over equal positions",
    "none": "all harmful with all reference texts, as published",
}
POSITIONS = {
    "all": "all tokens after the first",
    "response": "tokens after the prompt",
}
_HARMFUL, _REFERENCE = "#d55e00", "#0072b2"


CHECKPOINT: dict[str, Callable[[Any], str]] = {
    "Model": lambda each: step_name(each),
    "Positive heads": lambda each: f"{count(each['positive'])} of {each['measured']}",
    "If none diverged": lambda each: count(each["by_chance"]),
    "Surely above / below 0": lambda each: f"{each['above']} / {each['below']}",
    "Mean divergence, points": lambda each: points(each["mean_divergence"]),
    "Mean mass, harmful": lambda each: mass(each["harmful"]),
    "Mean mass, reference": lambda each: mass(each["reference"]),
    "Mean of what is positive, points": lambda each: points(each["penalty"]),
}
HEAD: dict[str, Callable[[Any], str]] = {
    "Layer : head": lambda each: f"{each['layer']} : {each['head']}",
    "Divergence, points": lambda each: points(each["divergence"]),
    "Mass, harmful": lambda each: mass(each["harmful"]),
    "Mass, reference": lambda each: mass(each["reference"]),
}


def section(block: Mapping[str, Any]) -> Section:
    """Return what page and terminal show of the sink.

    `block`: The block `sinks` of a report.
    """
    title = "Attention to the first token"
    return Section(title, [*_parts(block)], key="sinks", link="First token")


def _parts(block: Mapping[str, Any]) -> Iterator[Part]:
    checkpoints, rows = block["checkpoints"], block["rows"]
    texts = (
        f"{rows['harmful']} harmful and {rows['reference']} reference texts on "
        f"{block['requests']} prompts"
    )
    yield Paragraph(
        "Heads with nothing to do look at the first token, their sink. The divergence "
        "of a head is how much more of its attention goes there on harmful than on "
        "reference text, in percentage points. Compared: "
        f"{PAIRING[block['pairing']]} ({texts}; {POSITIONS[block['positions']]}). "
        "A divergence says that a head treats the two differently, not why."
    )
    yield Sentences(block["evidence"])
    yield Sentences(block["notes"], "note")
    if len(checkpoints) > 1:
        yield Chart(
            "Plot of positive heads over the checkpoints",
            lambda: curve_figure(checkpoints),
            "Bars are 95% intervals. The grey band holds the positive heads that "
            "prompts alone would make if no head diverged.",
        )
    title = f"Attention to the first token, {texts}"
    yield table_of(title, checkpoints, CHECKPOINT, brief=range(7))
    yield Heading(f"Divergence of every head, {step_name(checkpoints[-1])}")
    yield Paragraph(
        "Each square is one head. Hold the pointer over a square to see its numbers; "
        "a ring marks heads whose interval does not hold 0."
    )
    yield Scale("more on harmful text", "more on reference text")
    # Orange looks at the first token more on harmful text, blue less.
    yield head_grid(
        "Divergence of every head",
        block,
        lambda each: -(each["divergence"]["value"] or 0.0),
        _numbers,
        _is_sure,
    )
    masses = head_grid(
        "Attention to the first token of every head",
        block,
        lambda each: each["harmful"]["value"],
        _numbers,
        _is_sure,
    )
    yield Fold(f"{masses.title}, on harmful text", [Scale("none", "most", 5), masses])
    known = [each for each in block["heads"] if each["divergence"]["value"] is not None]
    first = sorted(known, key=lambda each: -abs(each["divergence"]["value"]))[:SHOWN]
    title = f"Heads that differ most (the first {len(first)} of {len(block['heads'])})"
    heads = table_of(title, first, HEAD)
    yield Fold("The heads that differ most, as a table", [heads], brief=True)


def _numbers(each: Mapping[str, Any]) -> str:
    return (
        f"layer {each['layer']}, head {each['head']}; "
        f"divergence {points(each['divergence'])} points; "
        f"harmful {mass(each['harmful'])}; reference {mass(each['reference'])}"
    )


def _is_sure(each: Mapping[str, Any]) -> bool:
    low, high = each["divergence"]["low"], each["divergence"]["high"]
    return low is not None and high is not None and (low > 0 or high < 0)


def curve_figure(checkpoints: Sequence[Mapping[str, Any]]) -> str:
    """Draw positive heads and sink mass over the checkpoints of a run."""
    # Two checkpoints may have one name, and would lie on each other.
    names = [f"{at + 1}. {step_name(each)}" for at, each in enumerate(checkpoints)]
    axis = alt.Axis(labelAngle=-40, labelLimit=150, labelOverlap=True)
    place = alt.X("at:N", sort=names, title=None, axis=axis)

    def points_of(key: str, kind: str) -> list[dict[str, Any]]:
        named = zip(names, checkpoints, strict=True)
        return [{**each[key], "at": name, "kind": kind} for name, each in named]

    total = max(each["measured"] for each in checkpoints)
    heads = alt.Scale(domain=[0, max(1, total)])
    chance = [
        point for point in points_of("by_chance", "") if point["value"] is not None
    ]
    band = (
        alt.Chart(alt.Data(values=chance))
        .mark_bar(opacity=0.25, color=MUTED, width={"band": 0.7})
        .encode(x=place, y=alt.Y("low:Q", scale=heads), y2="high:Q")
    )
    counted = interval_lines(
        points_of("positive", "positive heads"),
        place,
        {"positive heads": _HARMFUL},
        heads,
        title=f"heads, of {total}",
    )
    masses = interval_lines(
        points_of("harmful", "harmful text") + points_of("reference", "reference text"),
        place,
        {"harmful text": _HARMFUL, "reference text": _REFERENCE},
        alt.Scale(domain=[0, 1]),
        form="%",
    )
    size = {"width": 270, "height": 220}
    left = alt.layer(band, counted).properties(title=heading("Positive heads"), **size)
    right = masses.properties(title=heading("Attention to the first token"), **size)
    return to_svg(
        alt.hconcat(left, right),
        "Sink divergence over the checkpoints",
        "On the left how many heads look at the first token more on harmful text, and "
        "as a grey band how many would if none diverged. On the right the mean "
        "attention to the first token on harmful and on reference text. Bars are 95% "
        "intervals. The table below has the numbers.",
    )


def mass(figure: Figure) -> str:
    """Write a sink mass as a share of attention, as `12.30% (11.02 to 13.61%)`."""
    return _written(figure, "%")


def points(figure: Figure) -> str:
    """Write a divergence in percentage points with its sign: `+0.35 (0.10 to 0.61)`."""
    return "+" * ((figure["value"] or 0) > 0) + _written(figure)


def _written(figure: Figure, unit: str = "") -> str:
    """Write a share in percent, with digits that show two of the largest end."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    if value is None:
        return missing(figure)
    largest = 100 * max(abs(end or 0.0) for end in (value, low, high))
    fits = (n for n in (2, 3) if not largest or largest >= 10.0 ** (1 - n))
    digits = next(fits, 4)
    ends = "no interval"
    if low is not None and high is not None:
        ends = f"{plain(100 * low, digits)} to {plain(100 * high, digits)}"
    return f"{plain(100 * value, digits)}{unit} ({ends}{unit})"


def count(figure: Figure) -> str:
    """Write a number of heads with its interval, as `41 (30 to 52)`."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    if value is None:
        return missing(figure)
    if low is None or high is None:
        return plain(value, 0)
    return f"{plain(value, 0)} ({plain(low, 0)} to {plain(high, 0)})"


def step_name(checkpoint: Mapping[str, Any]) -> str:
    """Return what a checkpoint is called: its step, else the end of its name."""
    if checkpoint["step"] is not None:
        return f"step {checkpoint['step']}"
    return clean(str(checkpoint["name"]).rstrip("/").rsplit("/", 1)[-1])


def is_measured(study: Study) -> bool:
    """Return whether a study holds a comparison that is done."""
    record = study.record(STAGE)
    return record.get("state") == "done" and study.path(MASSES).exists()


def sink_sources(study: Study) -> list[dict[str, Any]]:
    """Return the records of the texts, as the block `data` wants them."""
    if not is_measured(study):
        return []
    return [
        {
            "role": f"sinks: {name}",
            "source": source["source"],
            "column": None,
            "rows": source["rows"],
            "duplicates": 0,
            "sha256": source["sha256"],
            "notes": [],
        }
        for name, source in study.read_json(MASSES)["sources"].items()
    ]


def summary_sentences(block: Mapping[str, Any]) -> list[str]:
    """Say what was found of the last checkpoint, and what it may rest on.

    `block`: The block `sinks` of the report.
    """
    last = block["checkpoints"][-1]
    total, uniform = last["measured"], last["uniform"]
    said = [
        _counted(last["positive"], last["by_chance"], total),
        f"The intervals of {last['above']} heads lie above 0 and of {last['below']} "
        f"below; of {total} heads that do not diverge about {CHANCE * total:.0f} "
        "would miss 0 by chance.",
    ]
    masses = [last[group]["value"] for group in ("harmful", "reference")]
    if None in masses:
        return said
    said.append(
        f"A head gives the first token {100 * masses[0]:.1f}% of its attention on "
        f"harmful and {100 * masses[1]:.1f}% on reference text on average; looking "
        f"at all tokens alike would give {100 * uniform:.1f}%."
    )
    if max(masses) < 2 * uniform:
        said.append(
            "That is less than twice as much: the model hardly has a sink, and its "
            "divergences are differences of small numbers."
        )
    return said


def _counted(positive: Mapping[str, Any], chance: Mapping[str, Any], total: int) -> str:
    """Say how many heads are positive and how many would be by chance, in one go."""
    if positive["value"] is None:
        return f"Positive heads could not be counted: {positive['reason']}."
    counted = (
        f"{positive['value']:.0f} of {total} heads ({positive['low']:.0f} to "
        f"{positive['high']:.0f}) give more of their attention to the first token on "
        "harmful text"
    )
    if chance["value"] is None:
        return f"{counted}; how many would by chance is unknown: {chance['reason']}."
    low, high = chance["low"], chance["high"]
    more = positive["value"] - min(max(positive["value"], low), high)
    place = ("fewer than", "as many as", "more than")[(more > 0) - (more < 0) + 1]
    return (
        f"{counted}, {place} chance makes: {low:.0f} to {high:.0f} on prompts that "
        "differ as these do, if no head diverged."
    )
