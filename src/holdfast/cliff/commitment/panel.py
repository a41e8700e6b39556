"""When it was decided, on page and terminal."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import altair as alt

from holdfast.cliff.commitment.causes import panel as causes
from holdfast.cliff.commitment.settings import file_of, stage_of
from holdfast.report.charts import PALETTE, heading, line_legend, to_svg
from holdfast.report.section import (
    Chart,
    Fold,
    Heading,
    Number,
    Paragraph,
    Part,
    Section,
    Sentences,
    Table,
)
from holdfast.report.text import plain
from holdfast.study import Study
from holdfast.study.directory import is_current

ACCOUNTS = {
    "decided_early": "decided early",
    "drifted": "drifted",
    "fell_at_template": "fell at the end template",
    "undecided": "undecided",
}
GROUPS = ACCOUNTS | {
    "harmful_refused": "refused harmful",
    "benign": "complied benign",
}
_COLOURS = {
    "decided early": "#7a6a00",
    "drifted": "#cc79a7",
    "fell at the end template": PALETTE["harmful_complied"],
    "undecided": "#56779a",
    "refused harmful": PALETTE["harmful_refused"],
    "complied benign": PALETTE["benign"],
}
_BEHIND = 1.08
"""Where the whole answer stands in the figure: behind the end template."""


def section(block: Mapping[str, Any]) -> Section:
    """Return the block `decide`: each part in turn."""
    shown = [part for key in PARTS if key in block for part in PARTS[key](block[key])]
    return Section("When it was decided", shown, "decide", "Decided when")


def decide_files(study: Study) -> dict[str, str]:
    """Return the file of each part whose stage is done, on the answers of now."""
    return {key: file_of(key) for key in PARTS if is_current(study, stage_of(key))}


def decide_blocks(study: Study) -> dict[str, Any]:
    """Return the block `decide` of the report; empty where nothing was asked."""
    found = {key: study.read_json(name) for key, name in decide_files(study).items()}
    return {"decide": found} if found else {}


def _curve(block: Mapping[str, Any]) -> Iterator[Part]:
    yield Sentences(block["evidence"])
    yield Sentences(block["notes"], "note")
    yield Paragraph(
        "The thinking of every answer was cut at several places, closed, and answered "
        "anew. An outcome is decided from the first cut on from which nine in ten "
        "answers agree with the final one. A refusal that the thinking holds until it "
        "is closed, and that is lost then, fell at the end template."
    )
    yield Table(
        "Accounts of complied harmful answers",
        ("Account", "Share"),
        [
            [ACCOUNTS[name], Number(figure, share=True, count=True)]
            for name, figure in block["account"].items()
        ],
    )
    if any(block["reasons"].values()):
        yield Table(
            "Why answers are undecided",
            ("Reason", "Answers"),
            [[why, str(count)] for why, count in block["reasons"].items() if count],
            style="narrow",
        )
    yield Chart(
        "Plot of the share of answers with the final outcome, by cut",
        lambda: figure(block["curves"], "share of answers with the final outcome"),
        "Bands are 95% intervals over requests. Behind the end template the answer is "
        "drawn from the whole thinking as the model closed it.",
    )
    yield Fold("The same as a table", [_table(block["curves"], share=True)])
    if any(each["points"] for each in block["leanings"]):
        yield Chart(
            "Plot of the leaning to refuse before the end template",
            lambda: figure(block["leanings"], "leaning to refuse"),
            "Read where the thinking is cut and not closed: 0 is like complied benign "
            "answers at that cut, 1 like refused harmful ones.",
        )
        yield Fold("The leaning as a table", [_table(block["leanings"])])
    if "redrawn" in block:
        words = "share with the final outcome, the thinking drawn anew"
        yield Chart(
            "Plot of the share with the final outcome where the thinking goes on",
            lambda: figure(block["redrawn"], words),
            "From each cut the model thought on, closed its thinking itself, and "
            "answered.",
        )
        yield Fold("That as a table", [_table(block["redrawn"], share=True)])
    yield Fold(
        "Accounts by wrapper",
        [
            Table(
                "Accounts by wrapper",
                ("Wrapper", *ACCOUNTS.values()),
                [
                    [wrapper, *(_count(counts[name]) for name in ACCOUNTS)]
                    for wrapper, counts in block["by_wrapper"].items()
                ],
            )
        ],
    )


def _count(number: int | None) -> str:
    return "not known" if number is None else str(number)


def _table(curves: Sequence[Mapping[str, Any]], *, share: bool = False) -> Table:
    """Return the points of all curves, a cut in each row."""
    points = [{point["at"]: point["share"] for point in c["points"]} for c in curves]
    cuts = list(dict.fromkeys(at for found in points for at in found))
    return Table(
        "Each cut",
        ("Cut", *(GROUPS[each["group"]] for each in curves)),
        [
            [
                _cut(at),
                *(
                    Number(found[at], share, count=True) if at in found else ""
                    for found in points
                ),
            ]
            for at in cuts
        ],
    )


def _cut(at: float | None) -> str:
    return "end template" if at is None else f"{plain(100 * at, 0)}%"


def figure(curves: Sequence[Mapping[str, Any]], title: str) -> str:
    """Draw curves over the thinking, one for each group, with their bands."""
    points = [
        {
            "group": GROUPS[curve["group"]],
            "x": _BEHIND if point["at"] is None else point["at"],
            **{key: point["share"][key] for key in ("value", "low", "high")},
        }
        for curve in curves
        for point in curve["points"]
        if point["share"]["value"] is not None
    ]
    names = [GROUPS[each["group"]] for each in curves]
    names = [name for name in names if any(p["group"] == name for p in points)]
    tones = alt.Scale(domain=names, range=[_COLOURS[name] for name in names])
    key = line_legend(orient="top", columns=3)
    ticks = [0, 0.2, 0.35, 0.5, 0.8, 1, _BEHIND]
    label = "datum.value > 1 ? 'end' : format(datum.value, '.0%')"
    x = alt.X("x:Q", title="part of the thinking that is kept").axis(
        values=ticks, grid=False, labelExpr=label
    )
    base = alt.Chart(alt.Data(values=points)).encode(
        x=x, color=alt.Color("group:N", scale=tones, legend=key)
    )
    y = alt.Y("value:Q", title=None)
    band = base.mark_area(opacity=0.14).encode(
        y=alt.Y("low:Q", title=None), y2="high:Q"
    )
    line = base.mark_line(strokeWidth=2.25).encode(
        y=y,
        strokeDash=alt.StrokeDash("group:N", scale=alt.Scale(domain=names), legend=key),
    )
    dots = base.mark_point(filled=True, size=40, opacity=1).encode(y=y)
    whole = alt.layer(band, line, dots).properties(
        width=640, height=280, title=heading(title)
    )
    said = f"One line each for: {', '.join(names)}. The table below has the numbers."
    return to_svg(whole, title[:1].upper() + title[1:], said)


def _first_token(block: Mapping[str, Any]) -> Iterator[Part]:
    if block["reason"]:
        yield Sentences(
            [f"No probe was fitted at the first thinking token: {block['reason']}."]
        )
        return
    words = {
        "auroc": "A probe at the first token of the thinking",
        "within_wrapper": "The same, within each wrapper",
        "length_alone": "The length of the prompt alone",
        "words_alone": "The words of the prompt alone",
        "beyond_words": "The probe minus the words alone",
    }
    yield Heading("Can the outcome be read at the first thinking token?")
    yield Sentences(
        [
            f"Each probe was fitted on {block['n_train']} harmful answers to training "
            f"requests and tried on {block['n_test']} to held-out ones."
        ]
    )
    yield Table(
        "Can the outcome be read at the first thinking token?",
        ("Read from", "AUROC, refused against complied harmful"),
        [[said, Number(block[key], count=True)] for key, said in words.items()],
    )
    yield Heading("A probe at each place of the thinking")
    yield Table(
        "A probe at each place of the thinking",
        ("Place", "AUROC"),
        [
            [
                _cut(place["at"]),
                Number(place["auroc"], count=True),
            ]
            for place in block["places"]
        ],
    )


PARTS: dict[str, Callable[[Mapping[str, Any]], Iterator[Part]]] = {
    "curve": _curve,
    "first_token": _first_token,
    "swap": causes.swap,
    "use": causes.use,
}
"""What shows the block of each part, in the order of the page."""
