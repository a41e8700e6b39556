"""Heads and their ablation on the page and on the terminal."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import altair as alt

from holdfast.heads.interchange import panel as interchange
from holdfast.report import text
from holdfast.report.charts import heading, interval_lines, to_svg
from holdfast.report.labels import (
    ATTACKS_LIMIT,
    CAUSE_LIMIT,
    JUDGE_LIMIT,
    PROBE_LIMIT,
)
from holdfast.report.schema import Report, is_figure
from holdfast.report.section import (
    Cell,
    Chart,
    Fold,
    Heading,
    Number,
    Paragraph,
    Part,
    Scale,
    Section,
    Sentences,
    Table,
    figures,
    head_grid,
    table_of,
)

_COLOURS = {
    "top": "#d55e00",
    "random": "#7a6a00",
    "positive": "#0072b2",
    "none": "#5c6661",
}
SHOWN, BRIEF = 16, 12
"""Heads in the table of the page, and of the terminal."""


def section(block: Mapping[str, Any]) -> Section:
    """Return what page and terminal show of the block `heads` of a report."""
    return Section("Which heads let go", [*_heads(block)], key="heads", link="Heads")


def _heads(block: Mapping[str, Any]) -> Iterator[Part]:
    is_exchanged = "interchange" in block
    yield Paragraph(INTRODUCED + (EXCHANGED if is_exchanged else CONTRIBUTED))
    yield Sentences(block["evidence"])
    if is_exchanged:
        yield from interchange.grids(block)
        yield from interchange.details(block["interchange"])
    else:
        yield Scale("takes refusal away", "holds it up")
        yield head_grid(
            "Contribution of every head",
            block,
            lambda each: -(each["contribution"]["value"] or 0.0),
            _words,
            lambda each: "end_template" in each,
        )
    yield Sentences(
        [
            f"Ranked {RANKED[block['by']]} on {block['ranked_on']['rows']} complied "
            "harmful answers to training requests; checked on "
            f"{block['checked_on']['rows']} held-out ones."
        ],
        "note",
    )
    checked = [each for each in block["heads"] if "beyond_controls" in each][:SHOWN]
    total = len(block["heads"])
    title = f"Heads (the first {len(checked)} of {total})"
    yield table_of(title, checked, HEAD, brief=(0, 1, 3, 4), most=BRIEF)
    yield Heading("Do both ways of looking agree?")
    yield Sentences([each["words"] for each in block["agreement"].values()])
    if "removal_gap" in block:
        gap = text.interval(block["removal_gap"], share=True)
        yield Sentences(
            [
                "A norm follows the attention, and changes when a head is taken away: "
                f"what removal does differs from the contribution by {gap} of itself."
            ]
        )
    parts: dict[str, Callable[[str], Cell]] = {
        "Part": lambda key: PARTS[key],
        "Takes from the logit": lambda key: Number(block["parts"][key], count=True),
    }
    by_part = table_of(
        "The fall by kind of part",
        [key for key in PARTS if key in block["parts"]],
        parts,
        style="narrow",
    )
    yield Fold("The fall, by kind of part", [by_part])


INTRODUCED = (
    "Every token's refusal score is a sum over the parts of the model. Each square is "
    "one attention head; "
)
CONTRIBUTED = (
    "the colour is what it takes from the score, in logits, between the thinking and "
    "the last token before the answer. Hold the pointer over a square to see its "
    "numbers; a ring marks heads that were ablated as a check."
)
EXCHANGED = (
    "the colour is what it does by the way of looking that is chosen, and the numbers "
    "are the first nine heads by it. Hold the pointer over a square to see all "
    "figures; the tables below have those of the first heads."
)
RANKED = {
    "drop": "by the fall from plateau to final token",
    "published": "as published, by the projection at the final token",
    "interchange": "by interchange; contributions were read",
}
HEAD: dict[str, Callable[[Any], Cell]] = {
    "Layer : head": lambda each: f"{each['layer']} : {each['head']}",
    "Contribution": lambda each: Number(each["contribution"]),
    "Ablated at the final token": lambda each: Number(each["final_token"]),
    "Ablated over the end template": lambda each: Number(each["end_template"]),
    "Beyond every random head of its layer": (
        lambda each: Number(each["beyond_controls"])
    ),
}


def _words(each: Mapping[str, Any]) -> str:
    named = {
        "contribution": "contribution",
        "end_template": "ablated over the end template",
        "final_token": "ablated at the final token",
        "beyond_controls": "beyond random heads of its layer",
    }
    place = f"layer {each['layer']}, head {each['head']}, rank {each['rank']}"
    values = (f"{named[k]} {text.score(each[k])}" for k in named if k in each)
    return "; ".join((place, *values))


def ablation(block: Mapping[str, Any]) -> Section:
    """Return what page and terminal show of the block `ablation` of a report."""
    title, parts = "With heads switched off", [*_ablation(block)]
    return Section(title, parts, key="ablation", link="Heads off")


def _ablation(block: Mapping[str, Any]) -> Iterator[Part]:
    conditions, repair = block["conditions"], block.get("self_repair")
    first = [each for each in conditions if each["scope"] == conditions[0]["scope"]]
    yield Sentences([_setting(block)])
    if len(first) > 1:
        yield Chart(
            "Plot of requests carried out by heads switched off",
            lambda: ablation_figure(first, block["sparse"]["n_total"]),
            "Bars are 95% intervals. If few heads do it, the top heads bring attack "
            "success down and random heads of the same layers do not.",
        )
    measures = [key for key in MEASURES if key in conditions[0]]
    columns = (
        *(_capital(MEASURES[key]) for key in measures),
        "Change of attack success",
    )
    for scope, words in SCOPES.items():
        rows = [each for each in conditions if each["scope"] == scope]
        if rows:
            yield Heading(_capital(words))
            yield Table(
                f"Heads off, {words}",
                ("Switched off", "Heads", *columns),
                [_condition(each, measures) for each in rows],
                brief=range(2 + len(measures)),
            )
    if repair:
        yield from _repair(repair)
    yield Sentences(block["notes"])


def _setting(block: Mapping[str, Any]) -> str:
    """Return on what all conditions ran, and what was done to heads."""
    prompts = block["prompts"]
    also = ""
    if prompts.get("lookalikes"):
        also += f", and on {prompts['lookalikes']} harmless ones that sound dangerous"
    if "utility" in prompts:
        asked = prompts["utility"]
        also += f", and {asked['rows']} questions from {asked['source']}"
    norm = block["renormalise"]
    restored = "" if norm == "none" else f", and the norm restored by {norm}"
    return (
        f"All conditions ran on the same {prompts['harmful']} harmful and "
        f"{prompts['benign']} harmless held-out prompts{also}. Harmful ones are of the "
        "kinds that work on training requests. Heads were multiplied by "
        f"{text.scalar(block['factor'])}{restored}."
    )


def _condition(each: Mapping[str, Any], measures: Sequence[str]) -> list[Cell]:
    """Return the row of a condition: its rates, and the change of attack success."""
    draws = f" ({each['draws']} draws)" if each["draws"] > 1 else ""
    name = _capital(CONDITIONS[each["condition"]]) + draws
    rates = [Number(each[key], share=True) for key in measures]
    change = each.get("change")
    cells: list[Cell] = [name, str(each["n_heads"]), *rates]
    return [*cells, Number(change["attack_success"], share=True) if change else ""]


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _repair(repair: Mapping[str, Any]) -> Iterator[Part]:
    yield Heading("Self-repair")
    yield Sentences(repair["evidence"])
    yield Chart(
        "Plot of self-repair",
        lambda: repair_figure(repair),
        "Bars are 95% intervals. If the model repairs itself, the gain before the "
        "answer is gone at its end, or other heads take more than they did.",
    )
    rows: list[tuple[Cell, Cell]] = [
        (words, Number(repair[key], count=True)) for key, words in REPAIR.items()
    ]
    for each in repair["new_heads"]:
        name = f"Next head {each['layer']} : {each['head']}, before"
        rows += [
            (name, Number(each["before"])),
            ("The same, after", Number(each["after"])),
        ]
    heads = f"With the top {repair['n_heads']} heads off"
    yield Table("Self-repair", (heads, "Logits"), rows, style="narrow")


def baked(found: Mapping[str, Any]) -> Section:
    """Return the figures of base and baked model, and where it lies."""
    words = MEASURES | OTHER
    columns: dict[str, Callable[[Any], Cell]] = {
        "": lambda key: words[key],
        "base": lambda key: Number(found["before"][key], share=True),
        "baked": lambda key: Number(found["after"][key], share=True),
    }
    measured = [key for key in words if key in found["before"]]
    rates = table_of("Before and after", measured, columns)
    said = [f"Written to {found['directory']}"]
    if found["serving"] is not None:
        said.append(found["serving"])
    return Section("", [rates, Sentences(said)])


def transfer(found: Mapping[str, Any]) -> Section:
    """Return how two probes do on the same answers."""
    cosine = f"Cosine of their directions: {found['cosine']:.2f}"
    table = figures("Two probes, one model", found["figures"])
    return Section("", [table, Sentences([cosine, found["words"]])])


def limits(report: Report, *, has_examples: bool) -> list[str]:
    """Return what no report can say, and what this one cannot.

    `report`: A report that passes `schema.validate`.
    """
    seen = "; the examples show some of what it saw." if has_examples else "."
    said = [ATTACKS_LIMIT, JUDGE_LIMIT + seen]
    if _is_measured(report["probe"]):
        said.append(PROBE_LIMIT)
    if "ablation" in report:
        said.append(LIMIT)
    elif report["verdict"]["cliff"]:
        said.append(CAUSE_LIMIT)
    return said


def _is_measured(block: Mapping[str, Any]) -> bool:
    """Return whether any figure of a block has a value."""
    return any(is_figure(each) and each["value"] is not None for each in block.values())


def ablation_figure(conditions: Sequence[Mapping[str, Any]], n_total: int) -> str:
    """Draw attack success and harmless compliance against the share of heads off."""
    colours = {CONDITIONS[key]: _COLOURS[key] for key in ("top", "random", "positive")}
    sizes = {0, *(each["n_heads"] for each in conditions)}
    place = alt.X("heads:Q", title=f"heads switched off, of {n_total}").axis(
        values=sorted(sizes),
        labelExpr=f"datum.value + ' = ' + format(datum.value / {n_total}, '.1%')",
        labelOverlap=True,
    )
    unit = alt.Scale(domain=[0, 1])
    panels = []
    for measure in ("attack_success", "benign_compliance"):
        points = [
            {**each[measure], "kind": kind, "heads": each["n_heads"]}
            for kind in colours
            for each in conditions
            if CONDITIONS[each["condition"]] == kind or each["condition"] == "none"
        ]
        lines = interval_lines(points, place, colours, unit, form="%")
        title = heading(MEASURES[measure])
        panels.append(lines.properties(title=title, width=270, height=220))
    return to_svg(
        alt.hconcat(*panels, spacing=40),
        "Requests carried out, by share of heads switched off",
        "The top heads of the ranking, random heads of the same layers and the heads "
        "at the bottom, with 95% intervals. The table below has the numbers.",
    )


def repair_figure(repair: Mapping[str, Any]) -> str:
    """Draw whether the score comes back along the answer, and who takes over.

    `repair`: The block `self_repair` of a report.
    """
    sides = {"plain": "nothing off", "edited": f"top {repair['n_heads']} heads off"}
    moments = {"final": "before the answer", "late": "at its end"}
    score = [
        {"side": words, "at": when, **repair[f"{moment}_{side}"]}
        for side, words in sides.items()
        for moment, when in moments.items()
    ]
    others = [("all other heads", repair["others_before"], repair["others_after"])]
    others += [
        (f"next head {each['layer']}:{each['head']}", each["before"], each["after"])
        for each in repair["new_heads"]
    ]
    names = list(sides.values())
    taken = [
        {"side": side, "at": name, **figure}
        for name, *pair in others
        for side, figure in zip(names, pair, strict=True)
    ]
    along = _sides(score, names, "y", list(moments.values()), joined=True)
    over = _sides(taken, names, "x", [name for name, _, _ in others])
    panels = (
        along.properties(
            title=heading("Refusal logit along the answer"), width=230, height=220
        ),
        over.properties(
            title=heading("What heads take from it"),
            width=270,
            height=max(60, 34 * len(others)),
        ),
    )
    return to_svg(
        alt.hconcat(*panels, spacing=40),
        "Self-repair with the top heads switched off",
        "On the left the refusal logit before the answer and at its end, without and "
        "with the top heads. On the right what all other heads, and the next heads, "
        "take from the logit before and after. Bars are 95% intervals.",
    )


def _sides(
    points: Sequence[Mapping[str, Any]],
    sides: Sequence[str],
    value_on: str,
    order: Sequence[str],
    *,
    joined: bool = False,
) -> Any:
    """Return intervals of two sides at named places, on an axis of logits."""
    known = [point for point in points if point["value"] is not None]
    base = alt.Chart(alt.Data(values=known))
    scale = alt.Scale(domain=list(sides), range=[_COLOURS["none"], _COLOURS["top"]])
    legend = alt.Legend(title=None, orient="bottom", labelLimit=300)
    colour = alt.Color("side:N", scale=scale, legend=legend)
    shape = alt.Shape("side:N", legend=None, sort=list(sides))
    place_on = "x" if value_on == "y" else "y"
    channel = {"x": alt.X, "y": alt.Y}
    axis = alt.Axis(labelAngle=0, labelLimit=200)
    place = channel[place_on]("at:N", sort=list(order), title=None, axis=axis)
    # Both sides stand at one place, and would lie on each other.
    shift = alt.XOffset if place_on == "x" else alt.YOffset
    apart = shift("side:N", sort=list(sides)).scale(paddingInner=0.4, paddingOuter=0.4)
    shared = {place_on: place, f"{place_on}Offset": apart, "color": colour}
    title = "logits"
    rule = base.mark_rule(strokeWidth=2, opacity=0.6).encode(
        **{value_on: channel[value_on]("low:Q", title=title).scale(zero=False)},
        **{f"{value_on}2": "high:Q"},
        **shared,
    )
    value = channel[value_on]("value:Q", title=title).scale(zero=False)
    dots = base.mark_point(filled=True, size=80, opacity=1).encode(
        **{value_on: value}, **shared, shape=shape
    )
    layers = [rule, dots]
    if joined:
        layers.insert(
            0, base.mark_line(opacity=0.5).encode(**{value_on: value}, **shared)
        )
    return alt.layer(*layers)


SCOPES = {
    "everywhere": "at every token, thinking drawn anew",
    "end_template": "end template only, thinking fixed",
    "answer": "answer only, thinking fixed",
}
CONDITIONS = {
    "none": "nothing",
    "top": "top of the ranking",
    "random": "random, same layers",
    "positive": "bottom of the ranking",
    "second_round": "top, and top of a second round",
}
MEASURES = {
    "attack_success": "harmful, carried out",
    "over_refusal": "harmless, refused",
    "lookalike_refusal": "sounds dangerous, refused",
    "benign_compliance": "harmless, carried out",
    "utility": "questions, right",
    "degenerate": "broken text",
}
REPAIR = {
    "others_before": "What all other heads take from the logit, before",
    "others_after": "The same with the top heads off",
    "others_change": "The difference",
    "final_plain": "Refusal logit before the answer",
    "final_edited": "The same with the top heads off",
    "late_plain": "Refusal logit over the end of the answer",
    "late_edited": "The same with the top heads off",
    "lost_again": "How much of the gain is lost along the answer",
}
PARTS = {
    "heads": "All attention heads",
    "mlps": "All MLPs",
    "mixers": "Linear attention, convolutions and state-space layers",
    "biases": "Attention biases",
    "embedding": "Token embedding",
    "plateau_logit": "Logit on the plateau",
    "final_logit": "Logit at the final token",
}
LIMIT = (
    "Heads were switched off one set at a time, chosen by one ranking. That few of "
    "them do not restore refusal does not show that no few heads would."
)
OTHER = {"other_attack_success": "other harmful, carried out"}
