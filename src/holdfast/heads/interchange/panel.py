"""What exchanging heads between twins did, on the page and on the terminal."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from holdfast.report import text
from holdfast.report.section import (
    Cell,
    Fold,
    Heading,
    Number,
    Paragraph,
    Part,
    Scale,
    Sentences,
    Shown,
    Switch,
    Table,
    head_grid,
    table_of,
)

Head = Mapping[str, Any]
SHOWN, BRIEF, NUMBERED = 16, 12, 9
ALPHA = 0.05
VIEWS = {
    "attribution": "Attribution",
    "ablated": "Ablation",
    "necessity": "Interchange, into runs that complied",
    "sufficiency": "Interchange, into runs that refused",
}
EXPLAINED = {
    "attribution": "What the head takes from the probe's logit between the thinking "
    "and the last token before the answer.",
    "ablated": "How far the run moves towards refusal without the head.",
    "necessity": "How far the run moves towards refusal with the head of the run that "
    "refused. A ring: beyond heads of a run that complied as well.",
    "sufficiency": "How far the run moves towards compliance with the head of the run "
    "that complied. A ring: beyond heads of a run that refused as well.",
}
READINGS = {
    "first-token": "the log-odds of opening a refusal at the first answer token",
    "probe": "the logit of the refusal probe before the first answer token",
}
SPANS = {
    "end_template": "over the end template",
    "thinking": "at every token of the thinking, aligned at its end",
}


def grids(block: Mapping[str, Any]) -> Iterator[Part]:
    """Return the grid of heads with its switch; `block`: the block `heads`."""
    found = block["interchange"]
    yield Scale("takes refusal away", "holds it up")
    views = [(name, _view(block, found["heads"], key)) for key, name in VIEWS.items()]
    yield Switch("What the squares show", "head-grid", views)


def _view(
    block: Mapping[str, Any], heads: Sequence[Head], key: str
) -> tuple[Shown, Shown]:
    """Return the grid by one way of looking, and what it shows."""

    def size(each: Head) -> float:
        return each[key]["value"] or 0.0

    first = sorted(heads, key=size, reverse=True)[:NUMBERED]
    numbers = {_place(each): str(n) for n, each in enumerate(first, 1)}

    def is_beyond(each: Head) -> bool:
        return bool(each.get(f"{key}_p", 1.0) < ALPHA)

    grid = head_grid(
        VIEWS[key],
        {**block, "heads": heads},
        lambda each: -size(each),
        _words,
        is_beyond,
        lambda each: numbers.get(_place(each), ""),
    )
    return Paragraph(EXPLAINED[key], note=True), grid


def details(found: Mapping[str, Any]) -> Iterator[Part]:
    """Return the tables of the block `interchange`."""
    pairs = found["measured_on"]
    yield Sentences(
        [
            f"Heads were exchanged {SPANS[found['span']]} between {pairs['rows']} "
            f"pairs of runs of {pairs['requests']} held-out requests, one refused and "
            f"one complied: {pairs['wrappers']} under two wrappers (or none), "
            f"{pairs['samples']} two samples of one prompt. What is followed is "
            f"{READINGS[found['reading']]}. The order was set on "
            f"{found['ranked_on']['rows']} pairs of training requests."
        ],
        "note",
    )
    heads = [each for each in found["heads"] if "beyond_controls" in each][:SHOWN]
    title = f"Exchanged heads (the first {len(heads)} of {len(found['heads'])})"
    yield table_of(title, heads, HEAD, brief=(0, 1, 2, 3, 4, 5), most=BRIEF)
    yield Heading("The top heads together")
    together = found["together"]
    rows: list[list[Cell]] = [
        [name, *(Number(together[key][each], each in SHARES) for each in TOGETHER)]
        for key, name in WAYS.items()
    ]
    named = ", ".join(f"{layer}:{head}" for layer, head in together["heads"])
    yield Table(
        f"Exchanged together: {named}", ("Into runs that", *TOGETHER.values()), rows
    )
    yield Heading("From a run of another request")
    yield table_of("From a run of another request", found["elsewhere"], ELSEWHERE)
    if found["pairs"]:
        yield Heading("Does a head act through a later one?")
        yield Paragraph(
            "Where the later head adds less once the earlier one is exchanged than by "
            "itself, the earlier one switches it.",
            note=True,
        )
        yield table_of("Pairs of heads", found["pairs"], PAIR)
    yield Fold(
        "Do interchange, attribution and ablation order heads alike?",
        [_agreement(found)],
    )


def _agreement(found: Mapping[str, Any]) -> Table:
    both = found["agreement"]
    rows: list[list[Cell]] = [
        ["All layers", *(Number(each["overall"]) for each in both.values())]
    ]
    for layer in both["attribution"]["by_layer"]:
        cells = [Number(each["by_layer"][layer]) for each in both.values()]
        rows.append([f"Layer {layer}", *cells])
    columns = ("Spearman's correlation with", *both)
    return Table("Rank correlation of interchange", columns, rows, style="narrow")


WAYS = {"necessity": "complied", "sufficiency": "refused"}
TOGETHER = {
    "change": "Change",
    "random": "Random heads, same layers",
    "beyond_random": "Beyond every random set",
    "flips": "Answers that open otherwise",
    "random_flips": "The same, random heads",
}
SHARES = ("flips", "random_flips")
HEAD: dict[str, Callable[[Any], Cell]] = {
    "Layer : head": lambda each: f"{each['layer']} : {each['head']}",
    "Rank by attribution": lambda each: str(each["attribution_rank"]),
    "Towards refusal": lambda each: Number(each["necessity"]),
    "p": lambda each: _chance(each["necessity_p"]),
    "Towards compliance": lambda each: Number(each["sufficiency"]),
    "p of that": lambda each: _chance(each["sufficiency_p"]),
    "Ablated": lambda each: Number(each["ablated"]),
    "Beyond every random head of its layer": (
        lambda each: Number(each["beyond_controls"])
    ),
    "Answers that open otherwise": lambda each: Number(each["flips"], share=True),
}
ELSEWHERE: dict[str, Callable[[Any], Cell]] = {
    "Layer : head": lambda each: f"{each['layer']} : {each['head']}",
    "Towards refusal": lambda each: Number(each["necessity"]),
    "Towards compliance": lambda each: Number(each["sufficiency"]),
}
PAIR: dict[str, Callable[[Any], Cell]] = {
    "Earlier, later": lambda each: (
        f"{':'.join(map(str, each['gate_head']))}, "
        f"{':'.join(map(str, each['amplifier_head']))}"
    ),
    "Earlier alone": lambda each: Number(each["gate"]),
    "Later alone": lambda each: Number(each["amplifier"]),
    "Both": lambda each: Number(each["both"]),
    "Later adds then": lambda each: Number(each["given"]),
    "Interaction": lambda each: Number(each["interaction"]),
    "Of the earlier, through the later": lambda each: Number(each["through"]),
}


def _chance(p: float) -> str:
    return f"{p:.4f}" if p < ALPHA else f"{p:.2f}"


def _place(each: Head) -> tuple[int, int]:
    return each["layer"], each["head"]


def _words(each: Head) -> str:
    place = f"layer {each['layer']}, head {each['head']}, rank {each['rank']}"
    named = {
        "attribution": f"attribution (rank {each['attribution_rank']})",
        "ablated": "ablated",
        "necessity": "towards refusal",
        "sufficiency": "towards compliance",
    }
    values = (f"{words} {text.score(each[key])}" for key, words in named.items())
    return "; ".join((place, *values))
