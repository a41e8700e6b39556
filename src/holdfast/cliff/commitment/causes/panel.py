"""Thinking or state, and whether the probe is used, on page and terminal."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import altair as alt

from holdfast.report import text
from holdfast.report.charts import heading, interval_panel, to_svg
from holdfast.report.section import (
    Cell,
    Chart,
    Heading,
    Number,
    Paragraph,
    Part,
    Sentences,
    Table,
    table_of,
)

_COLOURS = {"without the edit": "#0072b2", "with the edit": "#d55e00"}
_WIDTH = 620
KINDS = {
    "heads": "heads switched off or scaled",
    "direction": "a direction at the end template",
    "wrapper": "the wrapper taken off",
}
OTHER = {
    "heads": "the thinking written under the edit",
    "direction": "the thinking written without the wrapper",
    "wrapper": "the thinking written without the wrapper",
}
MEASURES = {
    "attack_success": "harmful requests carried out",
    "over_refusal": "harmless requests refused",
}
CELLS = {
    "own_off": ("own thinking", "without the edit"),
    "own_on": ("own thinking", "with the edit"),
    "other_off": ("other thinking", "without the edit"),
    "other_on": ("other thinking", "with the edit"),
}
EFFECTS = {
    "thinking": "Main effect of the thinking",
    "edit": "Main effect of the edit",
    "interaction": "Interaction",
    "thinking_alone": "Other thinking, read without the edit",
    "edit_alone": "Own thinking, read with the edit",
    "both": "Both",
}


def swap(block: Mapping[str, Any]) -> Iterator[Part]:
    """Show the four cells of each edit, and what thinking and edit do."""
    yield Heading("Is it the thinking, or the state behind it?")
    yield Paragraph(
        "The same held-out prompts were answered four times: behind their own thinking "
        "and behind another one, with an edit of the model or the prompt and without. "
        "Where the thinking carries the outcome it changes with the thinking; where "
        "the state does, with the edit. Differences are between the same prompts."
    )
    yield Sentences(
        [f"Left out: {name}: {why}" for name, why in block["left_out"].items()], "note"
    )
    for each in block["kinds"]:
        yield from _kind(each)


def _kind(each: Mapping[str, Any]) -> Iterator[Part]:
    name = KINDS[each["kind"]]
    yield Heading(f"The edit: {name}")
    yield Paragraph(
        f"The other thinking is {OTHER[each['kind']]}. {_about(each)}", note=True
    )
    for label in ("harmful", "benign"):
        yield from _group(each[label], label, name)


def _group(group: Mapping[str, Any], label: str, name: str) -> Iterator[Part]:
    measure = MEASURES[group["measure"]]
    yield Sentences([_counted(group, label)])
    if not group["rows"]:
        return
    if label == "harmful":
        yield Chart(
            f"Plot of {measure}, by thinking and edit ({name})",
            lambda: _picture(group, measure),
            "Bars are 95% intervals over base requests.",
        )
    cells: dict[str, Callable[[str], Cell]] = {
        "Thinking": lambda key: CELLS[key][0],
        "Read": lambda key: CELLS[key][1],
        "Share": lambda key: Number(group["cells"][key], share=True),
        "Broken answers": lambda key: Number(group["degenerate"][key], share=True),
    }
    yield table_of(f"{measure[:1].upper()}{measure[1:]}: {name}", [*CELLS], cells)
    effects: dict[str, Callable[[str], Cell]] = {
        "Effect": lambda key: EFFECTS[key],
        "Change of the share": lambda key: Number(group["effects"][key], share=True),
    }
    yield table_of(f"What changes {measure}: {name}", [*EFFECTS], effects)


def _about(each: Mapping[str, Any]) -> str:
    about = each["about"]
    if each["kind"] == "heads":
        heads = ", ".join(f"{layer}:{head}" for layer, head in about["heads"])
        return f"Heads {heads} were multiplied by {text.scalar(about['factor'])}."
    if each["kind"] == "wrapper":
        return f"Wrappers: {', '.join(about['wrappers'])}."
    direction = about["direction"].replace("_", " ")
    done = "added" if about["action"] == "add" else "projected out"
    return f"The direction of the {direction} was {done} after layer {about['layer']}."


def _counted(group: Mapping[str, Any], label: str) -> str:
    lost = [f"{count} for {reason}" for reason, count in group["lost"].items() if count]
    words = f", and {'; '.join(lost)} were left out" if lost else ""
    return (
        f"{group['rows']} {label} prompts of {group['requests']} requests were judged "
        f"in all four cells{words}."
    )


def _picture(group: Mapping[str, Any], measure: str) -> str:
    rows = [
        (thinking, edit, group["cells"][key]) for key, (thinking, edit) in CELLS.items()
    ]
    chart = interval_panel(rows, _COLOURS, _WIDTH - 130)
    return to_svg(
        alt.vconcat(chart).properties(title=heading(measure)),
        f"Share of {measure}",
        "A dot with its interval for each thinking, with the edit and without.",
    )


PLACES = {"read": "Where it is read", "stream": "Along the residual stream"}
DIRECTIONS = {
    "probe": "The probe",
    "mean_difference": "Mean of refused minus complied",
    "moved": "Random: states moved as far",
    "matched": "Random: as much variance within outcomes",
}
MASKS = {
    "refusal_words": "Words that go with refusals",
    "all_words": "Words that go with either outcome",
    "as_many": "As many others, at random",
}


def use(block: Mapping[str, Any]) -> Iterator[Part]:
    """Show whether the probe is what the model uses, and past which words it reads."""
    yield Heading("Is the probe what the model uses?")
    n = block["answers"]
    yield Sentences(
        [
            f"The probe's direction: {block['verdict']}.",
            "Directions were taken out of held-out answers to "
            f"{block['requests']} harmful requests: {n['harmful_refused']} that "
            f"refused and {n['harmful_complied']} that complied.",
            *block["evidence"],
        ]
    )
    lost = [f"{count} for {reason}" for reason, count in block["lost"].items()]
    if lost:
        yield Sentences([f"Left out: {'; '.join(lost)}."], "note")
    rows: list[Sequence[Cell]] = []
    for place, words in PLACES.items():
        rows.append([words])
        rows += [
            _removed(DIRECTIONS[name], figures)
            for name, figures in block["places"][place].items()
        ]
    rows += [["Positive control"], _removed("The answer's own", block["control"])]
    yield Table(
        "Directions taken out of held-out answers",
        ("Direction", "Outcomes changed", "Gap of log-odds lost", "Broken answers"),
        rows,
    )
    cosines = block["cosines"]
    answer = cosines["answer"]
    own = (
        "; refusals and compliances begin alike, so that there is no direction of "
        "the answer's own."
        if answer is None
        else f", and {answer:.2f} with that of the answers' first tokens."
    )
    yield Paragraph(
        f"The cosine of the probe's direction is {cosines['mean_difference']:.2f} with "
        f"the difference of means{own}",
        note=True,
    )
    yield from _words(block["words"])


def _removed(name: str, figures: Mapping[str, Any]) -> list[Cell]:
    draws = f" ({figures['directions']} draws)" if "directions" in figures else ""
    keys = ("answers", "gap", "broken")
    return [name + draws, *(Number(figures[key], share=True) for key in keys)]


def _words(block: Mapping[str, Any]) -> Iterator[Part]:
    columns: dict[str, Callable[[str], Cell]] = {
        "Masked in the thinking": lambda key: MASKS.get(key, "Nothing"),
        "Share of its tokens": lambda key: (
            Number(block[key]["masked"], share=True) if key in MASKS else ""
        ),
        "AUROC": lambda key: Number(
            block[key]["auroc"] if key in MASKS else block[key]
        ),
        "Change": lambda key: Number(block[key]["change"]) if key in MASKS else "",
    }
    yield table_of(
        "The probe on held-out answers, words masked", ["before", *MASKS], columns
    )
    for name, words in (("refusals", "refusing"), ("compliances", "complying")):
        told = ", ".join(f"“{text.clean(each)}”" for each in block["tokens"][words])
        yield Paragraph(f"Tokens that go with {name}: {told or 'none'}.", note=True)
