"""The sink on the page and on the terminal: heads, curves and sentences."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import altair as alt

from holdfast.report.charts import MUTED, heading, to_svg
from holdfast.report.schema import Figure, Report
from holdfast.report.terminal import print_lines, print_table
from holdfast.report.text import clean, missing, plain
from holdfast.study import Study

_MIDDLE = 5
_SHOWN = 16
_WIDTH, _HEIGHT = 270, 220
_HARMFUL, _REFERENCE = "#d55e00", "#0072b2"


def sink_context(report: Report) -> dict[str, Any] | None:
    """Prepare what the page shows of the sink.

    `report`: A report that passes `schema.validate`.
    Returns: None where the report has no such block.
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
    """Draw positive heads and sink mass over the checkpoints of a run."""
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


PAIRING = {
    "prompt": "two texts on one prompt, over equal positions",
    "none": "all harmful with all reference texts, as published",
}
POSITIONS = {
    "all": "all tokens after the first",
    "response": "tokens after the prompt",
}


def mass(figure: Figure) -> str:
    """Write a sink mass as a share of attention, as `12.30% (11.02 to 13.61%)`."""
    if figure["value"] is None:
        return missing(figure)
    digits = _digits(figure)
    return f"{_hundredfold(figure['value'], digits)}% ({_ends(figure, digits)}%)"


def share(figure: Figure) -> str:
    """Write a sink mass alone, as `12.30%`."""
    if figure["value"] is None:
        return missing(figure)
    return f"{_hundredfold(figure['value'], _digits(figure))}%"


def points(figure: Figure) -> str:
    """Write a divergence in percentage points with its sign: `+0.35 (0.10 to 0.61)`."""
    if figure["value"] is None:
        return missing(figure)
    sign, digits = "+" if figure["value"] > 0 else "", _digits(figure)
    return f"{sign}{_hundredfold(figure['value'], digits)} ({_ends(figure, digits)})"


def count(figure: Figure) -> str:
    """Write a number of heads with its interval, as `41 (30 to 52)`."""
    if figure["value"] is None:
        return missing(figure)
    ends = [figure["low"], figure["high"]]
    if None in ends:
        return plain(figure["value"], 0)
    return f"{plain(figure['value'], 0)} ({_plain(ends[0])} to {_plain(ends[1])})"


def step_name(checkpoint: Mapping[str, Any]) -> str:
    """Return what a checkpoint is called: its step, else the end of its name."""
    if checkpoint["step"] is not None:
        return f"step {checkpoint['step']}"
    return clean(str(checkpoint["name"]).rstrip("/").rsplit("/", 1)[-1])


def _digits(figure: Figure) -> int:
    """Return as many digits as show the two first of the largest end."""
    ends = [abs(figure[key] or 0.0) for key in ("value", "low", "high")]
    largest = 100 * max(ends)
    fits = (n for n in (2, 3) if not largest or largest >= 10.0 ** (1 - n))
    return next(fits, 4)


def _ends(figure: Figure, digits: int) -> str:
    low, high = figure["low"], figure["high"]
    if low is None or high is None:
        return "no interval"
    return f"{_hundredfold(low, digits)} to {_hundredfold(high, digits)}"


def _hundredfold(number: float, digits: int) -> str:
    return plain(100 * number, digits)


def _plain(number: float | None) -> str:
    return plain(number or 0.0, 0)


STAGE = "sinks"
MASSES = "sinks.json"


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


SHOWN = 12


def print_sinks(block: Mapping[str, Any]) -> None:
    """Print what was found of each checkpoint, and of the heads that differ most."""
    rows = [
        [
            step_name(each),
            f"{count(each['positive'])} of {each['measured']}",
            count(each["by_chance"]),
            f"{each['above']} / {each['below']}",
            points(each["mean_divergence"]),
            f"{share(each['harmful'])} / {share(each['reference'])}",
        ]
        for each in block["checkpoints"]
    ]
    columns = (
        "",
        "positive heads",
        "if none diverged",
        "surely + / −",
        "mean divergence, points",
        "mass, harmful / reference",
    )
    n = block["rows"]
    print_table(
        f"Attention to the first token, {n['harmful']} harmful and {n['reference']} "
        f"reference texts on {block['requests']} prompts",
        columns,
        rows,
    )
    known = [each for each in block["heads"] if each["divergence"]["value"] is not None]
    known.sort(key=lambda each: -abs(each["divergence"]["value"]))
    heads = [
        [
            f"{each['layer']}:{each['head']}",
            points(each["divergence"]),
            mass(each["harmful"]),
            mass(each["reference"]),
        ]
        for each in known[:SHOWN]
    ]
    print_table(
        f"Heads that differ most (the first {len(heads)} of {len(block['heads'])})",
        ("layer:head", "divergence, points", "mass, harmful", "mass, reference"),
        heads,
    )
    print_lines(*block["evidence"], *(f"note: {note}" for note in block["notes"]))


CHANCE = 0.05


def found_in_words(block: Mapping[str, Any]) -> list[str]:
    """Say what was found of the last checkpoint, and what it may rest on.

    `block`: The block `sinks` of the report.
    """
    last = block["checkpoints"][-1]
    total, positive, chance = last["measured"], last["positive"], last["by_chance"]
    said = [_counted(positive, chance, total)]
    said.append(
        f"The intervals of {last['above']} heads lie above 0 and of {last['below']} "
        f"below; of {total} heads that do not diverge about {CHANCE * total:.0f} "
        "would miss 0 by chance."
    )
    masses = [last[group]["value"] for group in ("harmful", "reference")]
    if None not in masses:
        said.append(
            f"A head gives the first token {100 * masses[0]:.1f}% of its attention on "
            f"harmful and {100 * masses[1]:.1f}% on reference text on average; looking "
            f"at all tokens alike would give {100 * last['uniform']:.1f}%."
        )
        if max(masses) < 2 * last["uniform"]:
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
    if low <= positive["value"] <= high:
        place = "as many as chance makes"
    else:
        more = positive["value"] > high
        place = f"{'more' if more else 'fewer'} than chance makes"
    return (
        f"{counted}, {place}: {low:.0f} to {high:.0f} on prompts that differ as these "
        "do, if no head diverged."
    )
