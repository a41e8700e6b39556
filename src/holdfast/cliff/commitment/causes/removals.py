"""What taking directions out changed: units, figures, and the verdict on them."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from holdfast.cliff.commitment.causes.edited import (
    Said,
)
from holdfast.cliff.commitment.causes.places import CONTROL, KINDS, PLAIN, READ, WORDS
from holdfast.cliff.commitment.causes.use import (
    Removal,
    beyond,
    changed,
    gap_lost,
    least,
    use_verdict,
)
from holdfast.cliff.groups import COMPLIED, REFUSED
from holdfast.rollout.rows import UNJUDGED
from holdfast.stats.bootstrap import Estimate, undefined
from holdfast.stats.rates import clustered_rate
from holdfast.study.figures import draws_of, figure_of, generator

SAME_TOKEN = "refusals and compliances begin with the same tokens"


class Table(NamedTuple):
    """The units of a comparison: a row and a draw, judged under every condition."""

    clusters: list[str]
    refused: Bool[Tensor, "example"]  # Which group a row is of.
    outcomes: dict[str, Bool[Tensor, "example"]]  # Whether it is refused, by condition.
    broken: dict[str, Bool[Tensor, "example"]]
    margins: dict[str, Float[Tensor, "example"]] | None
    lost: Counter[str]

    def of_random(self, place: str, kind: str) -> list[str]:
        """Return the conditions of random directions of a kind at a place."""
        return [name for name in self.outcomes if name.startswith(f"{place}/{kind}/")]


def _table(said: Sequence[Said], refused: Collection[str]) -> Table:
    names = list(dict.fromkeys(each.row["condition"] for each in said))
    by_unit: dict[tuple[str, int], dict[str, Said]] = {}
    for each in said:
        unit_of = (each.row["asked"], each.row["draw"])
        by_unit.setdefault(unit_of, {})[each.row["condition"]] = each
    units, lost = [], Counter[str]()
    for one in by_unit.values():
        outcomes = {one[name].judged.outcome for name in names}
        if UNJUDGED in outcomes or None in outcomes:
            lost["an answer that was not judged"] += 1
        elif _side(one[PLAIN]) is None:
            lost["a broken answer without any edit"] += 1
        else:
            units.append(one)
    # The margin is the same for all draws of a row, and counts with each of them.
    read = all(one[name].row["margin"] is not None for one in units for name in names)
    tensor = partial(torch.tensor, dtype=torch.float64)
    return Table(
        [one[PLAIN].judged.request_id for one in units],
        torch.tensor([one[PLAIN].row["asked"] in refused for one in units]).bool(),
        {name: _outcomes(units, name) for name in names},
        {
            name: torch.tensor([_side(one[name]) is None for one in units]).bool()
            for name in names
        },
        {n: tensor([one[n].row["margin"] for one in units]) for n in names}
        if read
        else None,
        lost,
    )


def _side(said: Said) -> bool | None:
    """Return whether an answer refuses; None where it is broken."""
    outcome = said.judged.outcome
    if outcome == "refused":
        return True
    return False if outcome in ("complied", "partial") else None


def _outcomes(units: Sequence[Mapping[str, Said]], name: str) -> Bool[Tensor, "_"]:
    # What an edit has broken decides nothing, and is no change of outcome.
    sides = [
        _side(one[PLAIN]) if _side(one[name]) is None else _side(one[name])
        for one in units
    ]
    return torch.tensor(sides, dtype=torch.bool)


def removals_of(
    said: Sequence[Said], refused: Collection[str], seed: int
) -> dict[str, Any]:
    """Return the verdict, and what each direction changes at each place.

    `refused`: Rows that were refused; the others were complied with.
    """
    table = _table(said, refused)
    measured = {
        f"{place}/{name}": _removal(seed, table, place, f"{place}/{name}")
        for place in WORDS
        for name in ("probe", "mean_difference")
    }
    control = _removal(seed, table, READ, CONTROL)
    n_requests = len(set(table.clusters))
    found = use_verdict(
        {WORDS[place]: measured[f"{place}/probe"] for place in WORDS},
        control,
        n_requests,
    )
    return {
        "verdict": found.word,
        "evidence": list(found.evidence),
        "answers": {
            REFUSED: int(table.refused.sum()),
            COMPLIED: int((~table.refused).sum()),
        },
        "requests": n_requests,
        "lost": dict(table.lost),
        "places": {
            place: {
                name: _shown(seed, table, f"{place}/{name}", measured)
                for name in ("probe", "mean_difference")
            }
            | {kind: _random(seed, table, place, kind) for kind in KINDS}
            for place in WORDS
        },
        "control": _shown(seed, table, CONTROL, {CONTROL: control}),
    }


def _gap(
    seed: int, table: Table, name: str, after: str, beside: str | None = None
) -> Estimate:
    if table.margins is None:
        return undefined(len(table.clusters), SAME_TOKEN)
    return gap_lost(
        table.margins[PLAIN],
        table.margins[after],
        table.refused,
        table.clusters,
        generator(seed, f"use/gap/{name}"),
        beside=None if beside is None else table.margins[beside],
    )


def _removal(seed: int, table: Table, place: str, name: str) -> Removal:
    before = table.outcomes[PLAIN]
    draws = draws_of(seed, f"use/{name}")
    edited = before != table.outcomes[name]
    controls = [each for kind in KINDS for each in table.of_random(place, kind)]
    others = [before != table.outcomes[each] for each in controls]
    return Removal(
        changed(before, table.outcomes[name], table.clusters, draws("answers")),
        beyond(edited, others, table.clusters, draws),
        _gap(seed, table, name, name),
        least([_gap(seed, table, f"{name}/{each}", name, each) for each in controls]),
    )


def _shown(
    seed: int, table: Table, name: str, measured: Mapping[str, Removal]
) -> dict[str, Any]:
    """Return the figures of one edit."""
    before, after = table.outcomes[PLAIN], table.outcomes[name]
    draws = draws_of(seed, f"use/{name}")

    def turned(group: Bool[Tensor, "example"], label: str) -> dict[str, Any]:
        places = torch.nonzero(group)[:, 0].tolist()
        clusters = [table.clusters[place] for place in places]
        return figure_of(changed(before[group], after[group], clusters, draws(label)))

    found = measured[name]._asdict()
    return {key: figure_of(each) for key, each in found.items()} | {
        "refused_turned": turned(table.refused, "refused"),
        "complied_turned": turned(~table.refused, "complied"),
        "broken": figure_of(
            clustered_rate(table.broken[name], table.clusters, draws("broken"))
        ),
    }


def _random(seed: int, table: Table, place: str, kind: str) -> dict[str, Any]:
    """Return what random directions of a kind change, over all draws."""
    names = table.of_random(place, kind)
    before, n = table.outcomes[PLAIN], len(names)
    draws = draws_of(seed, f"use/{place}/{kind}")
    clusters = table.clusters * n
    after = torch.cat([table.outcomes[name] for name in names])
    broken = torch.cat([table.broken[name] for name in names])
    gap = _gap(seed, table, f"{place}/{kind}", names[0])
    if table.margins is not None:
        mean = torch.stack([table.margins[name] for name in names]).mean(0)
        gap = gap_lost(
            table.margins[PLAIN], mean, table.refused, table.clusters, draws("gap")
        )
    return {
        "directions": n,
        "answers": figure_of(
            changed(before.repeat(n), after, clusters, draws("answers"))
        ),
        "gap": figure_of(gap),
        "broken": figure_of(clustered_rate(broken, clusters, draws("broken"))),
    }
