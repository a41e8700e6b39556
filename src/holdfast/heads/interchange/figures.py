"""Figures of what exchanging heads does: one by one, together, and beside the null."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.heads.checks import excess_over_controls, rank_agreement
from holdfast.heads.interchange.measure import Found
from holdfast.heads.interchange.null import Permuted, beyond_null
from holdfast.heads.ranking import Head
from holdfast.report import text
from holdfast.stats.bootstrap import Estimate, bootstrap_means, undefined
from holdfast.stats.rates import clustered_rate
from holdfast.study.figures import figure_of, generator
from holdfast.study.rows import Int32

Way = Literal["necessity", "sufficiency"]
WAYS: tuple[Way, ...] = ("necessity", "sufficiency")
ALPHA = 0.05
"""Share of the null, its largest head, that a head must be beyond."""
DIGITS = 6


class Side(NamedTuple):
    """What exchanges did in one kind of run, each counted towards the other outcome."""

    plain: Float[Tensor, "example"]  # Positive where it opens as it ended.
    twin: Float[Tensor, "example head"]
    same: Float[Tensor, "example head"]
    ablated: Float[Tensor, "example _"]  # Of runs that complied alone.
    joint: Float[Tensor, "example 1"]
    draws: Float[Tensor, "example _"]
    other: Float[Tensor, "example _"]
    pairs: Float[Tensor, "example _"]  # Two columns for each pair.


@dataclass(frozen=True, eq=False)
class Measured:
    """All that was read of held-out twins, and how heads are ordered."""

    heads: Sequence[Head]  # The columns of what was read.
    ranks: dict[Head, int]
    attribution_ranks: dict[Head, int]
    # What attribution says of the runs that complied, plateau minus final token.
    attribution: Float[Tensor, "example head"]
    found: Found
    joint: Sequence[Head]
    n_draws: int
    pairs: Sequence[tuple[Head, Head]]
    checked: Sequence[Head]  # The top of the ranking, then random others.
    n_top: int
    seed: int

    def side(self, way: Way) -> Side:
        """Return what was exchanged in runs that complied, or in those that refused."""
        found, n = self.found, len(self.heads)
        is_need = way == "necessity"
        columns = found.complied if is_need else -found.refused
        plain = -found.plain_complied if is_need else found.plain_refused
        blocks = (n, n, n * is_need, 1, self.n_draws, len(self.joint))
        sizes = [*blocks, columns.shape[1] - sum(blocks)]
        return Side(plain, *torch.split(columns, sizes, 1))

    def estimates(
        self, values: Float[Tensor, "example _"], name: str
    ) -> list[Estimate]:
        """Return the mean of each column, with intervals over base requests."""
        draw = generator(self.seed, f"heads/interchange/{name}")
        return [*bootstrap_means(values, self.found.clusters, draw)]

    def null(self, way: Way) -> Permuted:
        """Return how far each head is beyond the null."""
        side = self.side(way)
        draw = generator(self.seed, f"heads/interchange/null/{way}")
        return beyond_null(side.twin, side.same, self.found.clusters, draw)

    def flips(
        self, side: Side, change: Float[Tensor, "example"], name: str
    ) -> Estimate:
        """Return in how many runs an exchange turns how the answer opens."""
        turned = (side.plain > 0) & (change > side.plain)
        draw = generator(self.seed, f"heads/interchange/flips/{name}")
        return clustered_rate(turned, self.found.clusters, draw)


@dataclass(frozen=True)
class InterchangeRow:
    """A head in `interchange.parquet`, on held-out twins."""

    layer: Int32
    head: Int32
    rank: Int32  # On training twins, by necessity.
    attribution_rank: Int32
    necessity: float | None
    necessity_low: float | None
    necessity_high: float | None
    necessity_mismatched: float  # From a run of another request that complied as well.
    necessity_null: float  # What 95 % of the null stay below, by itself.
    necessity_p: float  # By itself.
    necessity_p_any: float  # Corrected for all heads.
    sufficiency: float | None
    sufficiency_low: float | None
    sufficiency_high: float | None
    sufficiency_mismatched: float
    sufficiency_null: float
    sufficiency_p: float
    sufficiency_p_any: float
    ablated: float | None
    ablated_low: float | None
    ablated_high: float | None
    attribution: float | None
    attribution_low: float | None
    attribution_high: float | None


def summarised(result: Measured) -> tuple[list[InterchangeRow], dict[str, Any]]:
    """Return the rows of `interchange.parquet`, and the figures of the report."""
    need, suffice = (result.side(way) for way in WAYS)
    nulls = {way: result.null(way) for way in WAYS}
    columns = {
        "necessity": result.estimates(need.twin, "necessity"),
        "sufficiency": result.estimates(suffice.twin, "sufficiency"),
        "ablated": result.estimates(need.ablated, "ablated"),
        "attribution": result.estimates(result.attribution, "attribution"),
    }
    same = {"necessity": need.same.mean(0), "sufficiency": suffice.same.mean(0)}
    rows: list[InterchangeRow] = []
    records: list[dict[str, Any]] = []
    for place, head in enumerate(result.heads):
        named = {name: found[place] for name, found in columns.items()}
        values: dict[str, Any] = {}
        p_any = {}
        for name, each in named.items():
            values |= {
                name: each.value,
                f"{name}_low": each.low,
                f"{name}_high": each.high,
            }
        for way in WAYS:
            p_any[way] = float(nulls[way].p_any[place])
            values |= {
                f"{way}_mismatched": float(same[way][place]),
                f"{way}_null": float(nulls[way].band[place]),
                f"{way}_p": float(nulls[way].p_value[place]),
                f"{way}_p_any": p_any[way],
            }
        ranks = {
            "rank": result.ranks[head],
            "attribution_rank": result.attribution_ranks[head],
        }
        which = {"layer": head.layer, "head": head.head}
        rows.append(InterchangeRow(**which, **ranks, **values))
        figures = {name: figure_of(each) for name, each in named.items()}
        chances = {f"{way}_p": round(p_any[way], DIGITS) for way in WAYS}
        records.append(which | ranks | figures | chances)
    _beside_controls(result, need, records)
    records.sort(key=lambda each: each["rank"])
    block: dict[str, Any] = {
        "plain": _plain(result),
        "agreement": _agreement(result, need),
        "together": _together(result),
        "elsewhere": _elsewhere(result),
        "pairs": _pairs(result),
        "heads": records,
    }
    return rows, {"evidence": sentences(block), **block}


def _beside_controls(
    result: Measured, need: Side, records: Sequence[dict[str, Any]]
) -> None:
    """Write how far the top heads exceed random heads of their own layers."""
    by_head = {Head(each["layer"], each["head"]): each for each in records}
    places = {head: place for place, head in enumerate(result.heads)}
    for head in result.checked[: result.n_top]:
        others = [
            places[other]
            for other in result.checked[result.n_top :]
            if other.layer == head.layer
        ]
        found = undefined(len(need.twin), "no head of its layer is left over")
        name = f"{head.layer}:{head.head}"
        if others:
            draw = generator(result.seed, f"heads/interchange/beyond/{name}")
            found = excess_over_controls(
                need.twin[:, places[head]],
                need.twin[:, others],
                result.found.clusters,
                draw,
            )
        record = by_head[head]
        record["beyond_controls"] = figure_of(found)
        flips = result.flips(need, need.twin[:, places[head]], name)
        record["flips"] = figure_of(flips)


def _plain(result: Measured) -> dict[str, Any]:
    """Return what is read of the runs as they are; positive is refusing."""
    found = result.found
    columns = torch.stack([found.plain_complied, found.plain_refused], 1)
    names = ("complied", "refused")
    estimates = result.estimates(columns, "plain")
    return {name: figure_of(each) for name, each in zip(names, estimates, strict=True)}


def _agreement(result: Measured, need: Side) -> dict[str, Any]:
    """Return how far interchange orders heads as attribution and ablation do."""
    others = {"attribution": result.attribution, "ablation": need.ablated}
    layers = [head.layer for head in result.heads]
    block = {}
    for name, other in others.items():
        found = {}
        for kind, by in (("overall", [0] * len(layers)), ("by_layer", layers)):
            draw = generator(result.seed, f"heads/interchange/agreement/{name}/{kind}")
            clusters = result.found.clusters
            found[kind] = rank_agreement(need.twin, other, by, clusters, draw)
        block[name] = {
            "overall": figure_of(found["overall"][0]),
            "by_layer": {str(k): figure_of(v) for k, v in found["by_layer"].items()},
        }
    return block


def _together(result: Measured) -> dict[str, Any]:
    """Return what the top heads do as one set, beside random sets of their layers."""
    block: dict[str, Any] = {"heads": [list(head) for head in result.joint]}
    clusters = result.found.clusters
    for way in WAYS:
        side = result.side(way)
        [joint] = result.estimates(side.joint, f"joint/{way}")
        [random] = result.estimates(side.draws.mean(1, keepdim=True), f"random/{way}")
        draw = generator(result.seed, f"heads/interchange/beyond_random/{way}")
        beyond = excess_over_controls(side.joint[:, 0], side.draws, clusters, draw)
        found = {
            "change": joint,
            "random": random,
            "beyond_random": beyond,
            "flips": result.flips(side, side.joint[:, 0], f"joint/{way}"),
        }
        block[way] = {key: figure_of(each) for key, each in found.items()}
        flips = (side.draws > side.plain[:, None]) & (side.plain > 0)[:, None]
        draw = generator(result.seed, f"heads/interchange/random_flips/{way}")
        [share] = bootstrap_means(
            flips.double().mean(1, keepdim=True), clusters, draw, bounds=(0.0, 1.0)
        )
        block[way]["random_flips"] = figure_of(share)
    return block


def _elsewhere(result: Measured) -> list[dict[str, Any]]:
    """Return what the top heads of runs of *other* requests do."""
    found = {
        way: result.estimates(result.side(way).other, f"elsewhere/{way}")
        for way in WAYS
    }
    return [
        {"layer": head.layer, "head": head.head}
        | {way: figure_of(found[way][place]) for way in WAYS}
        for place, head in enumerate(result.joint)
    ]


def _pairs(result: Measured) -> list[dict[str, Any]]:
    """Return what a later head still does once an earlier one is exchanged.

    `given`: What exchanging the later head adds then. `interaction`: that minus what it
    does by itself. `through`: how much of what the earlier head does is gone where the
    later one is held as it was.
    """
    places = {head: place for place, head in enumerate(result.heads)}
    side, records = result.side("necessity"), []
    for number, (gate, amplifier) in enumerate(result.pairs):
        alone, later = (side.twin[:, places[head]] for head in (gate, amplifier))
        both, held = side.pairs[:, 2 * number], side.pairs[:, 2 * number + 1]
        columns = {
            "gate": alone,
            "amplifier": later,
            "both": both,
            "given": both - alone,
            "interaction": both - alone - later,
            "through": alone - held,
        }
        name = f"pair/{gate.layer}:{gate.head}/{amplifier.layer}:{amplifier.head}"
        values = torch.stack(list(columns.values()), 1)
        estimates = result.estimates(values, name)
        records.append(
            {"gate_head": list(gate), "amplifier_head": list(amplifier)}
            | {
                key: figure_of(each)
                for key, each in zip(columns, estimates, strict=True)
            }
        )
    return records


def sentences(block: dict[str, Any]) -> list[str]:
    """Say which heads are beyond the null, and how attribution ranks them."""
    heads = block["heads"]
    first = heads[0]
    need, suffice = ([e for e in heads if _holds(e, way)] for way in WAYS)
    both = [each for each in need if each in suffice]
    said = [
        f"Of {len(heads)} heads, {_name(first)} (layer:head) ranks first by "
        "interchange: taken from the run that refused, it moves the one that complied "
        f"by {text.score(first['necessity'])} towards refusal. Attribution ranks it "
        f"{first['attribution_rank']} of {len(heads)}.",
        _listed(both, "carry the outcome both ways", ", corrected for all heads"),
    ]
    for found, way in ((need, "refusal"), (suffice, "compliance")):
        rest = [each for each in found if each not in both]
        if rest:
            said.append(_listed(rest, f"do so towards {way} alone", ""))
    missed = [each for each in both if each["attribution_rank"] > MISSED]
    if missed:
        names = ", ".join(f"{_name(e)} ({e['attribution_rank']})" for e in missed)
        said.append(
            f"Attribution ranks these below the first {MISSED}: {names}. Such a head "
            "acts through later ones."
        )
    return said


def _listed(found: Sequence[dict[str, Any]], what: str, how: str) -> str:
    """Return how many heads do something more than heads of runs that ended alike."""
    null = "more than heads of a run of another request that ended alike"
    if not found:
        return f"No head is shown to {what}, {null}{how}."
    names = ", ".join(map(_name, found))
    if len(found) == 1:
        what = what.replace("carry", "carries", 1).replace("do so", "does so", 1)
        return f"Head {names} {what}, {null}{how}."
    return f"{len(found)} heads {what}, {null}{how}: {names}."


MISSED = 10
"""Rank by attribution below which a head counts as missed by it."""


def _holds(record: dict[str, Any], way: Way) -> bool:
    low = record[way]["low"]
    return record[f"{way}_p"] < ALPHA and low is not None and low > 0


def _name(record: dict[str, Any]) -> str:
    return f"{record['layer']}:{record['head']}"
