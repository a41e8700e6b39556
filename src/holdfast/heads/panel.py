"""Heads and their ablation on the page and on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from holdfast.report import text
from holdfast.report.charts import heading, to_svg
from holdfast.report.labels import (
    ATTACKS_LIMIT,
    CAUSE_LIMIT,
    JUDGE_LIMIT,
    PROBE_LIMIT,
)
from holdfast.report.schema import Report, is_figure
from holdfast.report.section import Section, figures
from holdfast.report.terminal import print_lines, print_section, print_table

_COLOURS = {
    "top": "#d55e00",
    "random": "#7a6a00",
    "positive": "#0072b2",
    "none": "#5c6661",
}
_MIDDLE = 5


def head_context(report: Report) -> dict[str, Any]:
    """Prepare what the page shows of heads and of the ablation.

    `report`: A report that passes `schema.validate`.
    Returns: `heads` and `ablation`, each None where the report has no such block.
    """
    heads, ablation = report.get("heads"), report.get("ablation")
    return {
        "heads": heads and _heads(heads),
        "ablation": ablation and _ablation(ablation),
    }


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
    panels = [
        _panel(conditions, measure, n_total).properties(
            title=heading(MEASURES[measure])
        )
        for measure in ("attack_success", "benign_compliance")
    ]
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


def _panel(conditions: Sequence[Mapping[str, Any]], measure: str, n_total: int) -> Any:
    plain = conditions[0][measure]
    points = []
    for name in ("top", "random", "positive"):
        # A figure has an `n` of its own, that of its rows.
        points.append({**plain, "off": CONDITIONS[name], "heads": 0})
        points += [
            {**each[measure], "off": CONDITIONS[name], "heads": each["n_heads"]}
            for each in conditions
            if each["condition"] == name
        ]
    named = [CONDITIONS[name] for name in ("top", "random", "positive")]
    colours = [_COLOURS[name] for name in ("top", "random", "positive")]
    base = alt.Chart(alt.Data(values=[p for p in points if p["value"] is not None]))
    shared = {
        "x": alt.X("heads:Q", title=f"heads switched off, of {n_total}").axis(
            values=sorted({point["heads"] for point in points}),
            labelExpr=f"datum.value + ' = ' + format(datum.value / {n_total}, '.1%')",
            labelOverlap=True,
        ),
        "color": alt.Color(
            "off:N",
            scale=alt.Scale(domain=named, range=colours),
            legend=alt.Legend(title=None, orient="bottom", labelLimit=300),
        ),
    }
    unit = alt.Scale(domain=[0, 1])
    line = base.mark_line(strokeWidth=2.25).encode(
        y=alt.Y("value:Q", scale=unit, title=None).axis(format="%", tickCount=5),
        strokeDash=alt.StrokeDash("off:N", legend=None, sort=named),
        **shared,
    )
    ends = base.mark_rule(strokeWidth=2, opacity=0.5).encode(
        y=alt.Y("low:Q", scale=unit, title=None), y2="high:Q", **shared
    )
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(
        y=alt.Y("value:Q", scale=unit, title=None), **shared
    )
    return alt.layer(ends, line, dots).properties(width=270, height=220)


def _heads(block: Mapping[str, Any]) -> dict[str, Any]:
    """Lay heads out as a grid, and the first of them as a table."""
    found = {(each["layer"], each["head"]): each for each in block["heads"]}
    values = [each["contribution"]["value"] or 0.0 for each in block["heads"]]
    largest = max((abs(value) for value in values), default=0.0) or 1.0
    grid = [
        [_cell(found[layer, head], largest) for head in range(block["n_heads"])]
        for layer in range(block["n_layers"])
    ]
    checked = [each for each in block["heads"] if "beyond_controls" in each]
    return {
        "grid": list(enumerate(grid)),
        "width": range(block["n_heads"]),
        "top": checked[:16],
        "parts": [(PARTS[key], block["parts"][key]) for key in PARTS],
        "agreement": [each["words"] for each in block["agreement"].values()],
        "evidence": block["evidence"],
        "ranked_on": block["ranked_on"],
        "checked_on": block["checked_on"],
        "by": block["by"],
    }


def _cell(each: Mapping[str, Any], largest: float) -> dict[str, Any]:
    """Colour a head: orange takes the logit down, blue holds it up."""
    value = each["contribution"]["value"] or 0.0
    tone = _MIDDLE - round(_MIDDLE * value / largest)
    said = [
        f"layer {each['layer']}, head {each['head']}, rank {each['rank']}",
        f"contribution {text.score(each['contribution'])}",
    ]
    for key, words in (
        ("end_template", "ablated over the end template"),
        ("final_token", "ablated at the final token"),
        ("beyond_controls", "beyond random heads of its layer"),
    ):
        if key in each:
            said.append(f"{words} {text.score(each[key])}")
    return {"tone": tone, "title": "; ".join(said), "checked": "end_template" in each}


def _ablation(block: Mapping[str, Any]) -> dict[str, Any]:
    conditions = block["conditions"]
    first = [each for each in conditions if each["scope"] == conditions[0]["scope"]]
    repair = block.get("self_repair")
    return {
        "svg": (
            ablation_figure(first, block["sparse"]["n_total"]) if len(first) > 1 else ""
        ),
        "scopes": [
            (words, [each for each in conditions if each["scope"] == scope])
            for scope, words in SCOPES.items()
            if any(each["scope"] == scope for each in conditions)
        ],
        "condition_names": CONDITIONS,
        "measures": {
            key: words for key, words in MEASURES.items() if key in conditions[0]
        },
        "prompts": block["prompts"],
        "factor": block["factor"],
        "renormalise": block["renormalise"],
        "notes": block["notes"],
        "repair": repair
        and {
            "svg": repair_figure(repair),
            "evidence": repair["evidence"],
            "n_heads": repair["n_heads"],
            "figures": [(REPAIR[key], repair[key]) for key in REPAIR],
            "new_heads": repair["new_heads"],
        },
    }


SHOWN = 12


def print_heads(block: Mapping[str, Any]) -> None:
    """Print the top of the ranking, and where the two ways of looking agree."""
    from holdfast.report import text

    rows = []
    for each in block["heads"][:SHOWN]:
        checks = [each.get(key) for key in ("end_template", "beyond_controls")]
        rows.append(
            [
                str(each["rank"]),
                f"{each['layer']}:{each['head']}",
                text.score(each["contribution"]),
                *("not checked" if c is None else text.score(c) for c in checks),
            ]
        )
    columns = ("", "layer:head", "contribution", "ablated", "beyond random heads")
    total = block["n_layers"] * block["n_heads"]
    print_table(f"Heads (the first {len(rows)} of {total})", columns, rows)
    print_lines(*block["evidence"])
    print_lines(*(each["words"] for each in block["agreement"].values()))


def print_ablation(block: Mapping[str, Any]) -> None:
    """Print every condition with its rates."""
    from holdfast.report import text

    measured = [key for key in MEASURES if key in block["conditions"][0]]
    rows = [
        [
            PLACES[each["scope"]],
            CONDITIONS[each["condition"]],
            str(each["n_heads"]),
            *(text.rate(each[key]) for key in measured),
        ]
        for each in block["conditions"]
    ]
    columns = ("where", "off", "heads", *(MEASURES[key] for key in measured))
    n = block["prompts"]
    title = f"Heads off, on {n['harmful']} harmful and {n['benign']} harmless prompts"
    print_table(title, columns, rows)
    print_lines(*block["notes"])
    print_lines(*block.get("self_repair", {}).get("evidence", ()))


def print_baked(found: Mapping[str, Any]) -> None:
    """Print the figures of base and baked model, and where it lies."""
    from holdfast.report import text

    words_of = MEASURES | OTHER
    named = {key: words_of[key] for key in words_of if key in found["before"]}
    rows = [
        [words, text.rate(found["before"][key]), text.rate(found["after"][key])]
        for key, words in named.items()
    ]
    print_table("Before and after", ("", "base", "baked"), rows)
    print_lines(f"Written to {found['directory']}")


def print_transfer(found: Mapping[str, Any]) -> None:
    """Print how two probes do on the same answers."""
    print_section(Section("", [figures("Two probes, one model", found["figures"])]))
    print_lines(f"Cosine of their directions: {found['cosine']:.2f}", found["words"])


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
    "biases": "Attention biases",
    "embedding": "Token embedding",
    "plateau_logit": "Logit on the plateau",
    "final_logit": "Logit at the final token",
}
LIMIT = (
    "Heads were switched off one set at a time, chosen by one ranking. That few of "
    "them do not restore refusal does not show that no few heads would."
)
PLACES = {"everywhere": "everywhere", "end_template": "end", "answer": "answer"}
OTHER = {"other_attack_success": "other harmful, carried out"}
