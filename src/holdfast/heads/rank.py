"""Rank heads by what they take from refusal, and check the first by ablation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.cliff.probe_files import check_current, names, read_own_probe
from holdfast.errors import InputError, TooFewExamplesError
from holdfast.heads.causal_effects import MOMENTS, Moment
from holdfast.heads.checks import (
    agreement_sentences,
    excess_over_controls,
    rank_agreement,
)
from holdfast.heads.interchange.stage import (
    PARTS,
    Interchange,
    measured,
    reranked,
)
from holdfast.heads.ranking import Head, RankedHead, drops, rank_heads
from holdfast.heads.readings import (
    CAUSAL,
    OTHERS,
    Read,
    Selected,
    ablate_one_by_one,
    read_in_batches,
    select,
)
from holdfast.heads.settings import HeadsSettings, RankSettings
from holdfast.models.model import Adapter
from holdfast.report import text
from holdfast.rollout.rows import from_table
from holdfast.rollout.session import Session
from holdfast.stats.bootstrap import Estimate, bootstrap_means, undefined
from holdfast.study import Study
from holdfast.study.directory import Stage
from holdfast.study.figures import figure_of, generator, study_seed
from holdfast.study.rows import Int32, rows_of, table_of

STAGE = "heads"
ROLLOUTS = "rollouts.parquet"
OUTPUT = "heads.parquet"
SUMMARY = "heads.json"


def run(study: Study, settings: HeadsSettings, session: Session) -> dict[str, Any]:
    """Rank every head; writes `heads.parquet` and `heads.json`.

    Ranked on complied harmful answers to training requests; checked on held-out ones.

    Args:
        study: A study with rollouts and a probe.
        settings: The ranking, and how many heads are checked.
        session: The model, and where progress is told.

    Returns:
        The block `heads` of the report.

    Raises:
        InputError: If the earlier stages are missing, or the probe belongs to another
            model or template.
        TooFewExamplesError: If there are too few complied harmful answers, or the
            model does not think; the reason stays in the study.
    """
    _require_thinking(study)
    check_current(study)
    exchanging = None
    if isinstance(settings, RankSettings) and settings.by == "interchange":
        exchanging = settings
    with study.stage(
        STAGE,
        exchanging or settings.attribution(),
        [ROLLOUTS, *names("published")],
        progress=session.progress,
        done="The heads are ranked and up to date.",
        parts=[CAUSAL, *PARTS],
    ) as stage:
        if stage.is_done:
            return stage.read_json(SUMMARY)
        session.adapter.require("heads")
        rows = from_table(study.read_table(ROLLOUTS))
        selected = select(rows, settings.selection_prompts)
        work = None if exchanging is None else Interchange.find(exchanging, rows)
        session.check_same(study)
        found = _rank(stage, settings, session, selected, work)
        return stage.write_json(SUMMARY, found)


def _require_thinking(study: Study) -> None:
    if study.manifest.get("model", {}).get("thinking") is None:
        raise TooFewExamplesError(
            "a model that thinks, so that there is a plateau to fall from",
            "a chat template without a thinking format",
            "Heads can be ranked for reasoning models alone.",
        )


def _rank(
    stage: Stage,
    settings: HeadsSettings,
    session: Session,
    selected: Selected,
    work: Interchange | None,
) -> dict[str, Any]:
    probe, _ = read_own_probe(stage.study, "published")
    adapter, seed = session.adapter, study_seed(stage.study)
    train, test = list(selected.ranking), list(selected.checking)
    twins = [] if work is None else work.complied
    rows = {row.row_id: row for row in (*train, *test, *twins)}
    read = read_in_batches(stage, session, list(rows.values()), probe)
    places = {row_id: place for place, row_id in enumerate(rows)}
    ranking_on, held_out, of_twins = (
        _part(read, [places[row.row_id] for row in part])
        for part in (train, test, twins)
    )
    ranking = rank_heads(
        ranking_on.readings,
        ranking_on.clusters,
        generator(seed, "heads/ranking"),
        by=settings.ranking,
        layers=adapter.layers_with_heads,
    )
    attributed = [row.head for row in ranking]
    if work is not None:
        exchanger = work.exchanger(stage, session, probe)
        ranking = reranked(work, exchanger, ranking)
    heads, n_top = to_check(ranking, settings.checked_heads, adapter.n_heads, seed)
    effects = ablate_one_by_one(stage, session, test, probe, heads)
    checked = Checked(heads, n_top, effects, held_out.clusters)
    closed_form = drops(held_out.readings).total
    if settings.ranking == "published":
        closed_form = -held_out.readings.published
    lines, records = records_of(ranking, checked, seed)
    stage.write_table(OUTPUT, table_of(lines, HeadRow))
    total = len(ranking)
    evidence = summary_sentences(records, total)
    more = {}
    if work is not None:
        more = {
            "interchange": measured(
                work, exchanger, of_twins, ranking, attributed, (heads, n_top)
            )
        }
        evidence = more["interchange"]["evidence"]
    return {
        "by": settings.ranking if work is None else "interchange",
        "n_layers": adapter.n_layers,
        "n_heads": adapter.n_heads,
        **layers_named(adapter),
        "ranked_on": _counts(ranking_on),
        "checked_on": _counts(held_out),
        "n_checked": n_top,
        "parts": parts_of(held_out, seed),
        "agreement": agreement_of(closed_form, checked, seed),
        **_removal_gap(adapter, held_out, checked, seed),
        "evidence": evidence,
        "heads": records,
        **more,
    }


def layers_named(adapter: Adapter) -> dict[str, list[int]]:
    """Return which layers have heads, where some have none."""
    own = adapter.layers_with_heads
    return {} if len(own) == adapter.n_layers else {"layers_with_heads": list(own)}


def _part(read: Read, places: Sequence[int]) -> Read:
    """Return what was read on some of the rows."""
    chosen = list(places)
    return Read(
        type(read.readings)(*(column[chosen] for column in read.readings)),
        read.others[chosen],
        [read.clusters[place] for place in chosen],
    )


def _counts(found: Read) -> dict[str, int]:
    return {"rows": len(found.clusters), "requests": len(set(found.clusters))}


N_CONTROLS = 5
"""Random heads of its own layer that a checked head is compared with."""
NAMES = {"final_token": "at the final token", "end_template": "over the end template"}


@dataclass(frozen=True)
class HeadRow:
    """A head in `heads.parquet`; what was not checked is null."""

    layer: Int32
    head: Int32
    contribution: float | None
    low: float | None
    high: float | None
    causal_effect: float | None  # Over the end template.
    rank: Int32
    rms_change: float | None
    plateau: float
    final: float
    causal_low: float | None
    causal_high: float | None
    causal_final_token: float | None
    beyond_controls: float | None
    beyond_controls_low: float | None
    beyond_controls_high: float | None
    checked_as: str | None  # "top", "control", or null.


@dataclass(frozen=True)
class Checked:
    """The heads that were ablated one by one, and the effects."""

    heads: tuple[Head, ...]  # The top of the ranking, then the controls.
    n_top: int  # How many of them are not controls.
    # Change of the logit, by moment, one column per head.
    effects: Mapping[Moment, Float[Tensor, "example head"]]
    clusters: list[str]  # The base request of each held-out row.

    def effect(self, moment: Moment, head: Head, seed: int) -> Estimate | None:
        """Return what taking a head away did, or None if it was not checked."""
        if head not in self.heads:
            return None
        place = self.heads.index(head)
        column = self.effects[moment][:, place : place + 1]
        name = f"heads/{moment}/{head.layer}:{head.head}"
        return bootstrap_means(column, self.clusters, generator(seed, name))[0]

    def beyond(self, moment: Moment, head: Head, seed: int) -> Estimate | None:
        """Return by how much an effect exceeds that of the closest control."""
        if head not in self.heads[: self.n_top]:
            return None
        places = [
            place
            for place, other in enumerate(self.heads)
            if place >= self.n_top and other.layer == head.layer
        ]
        if not places:
            return undefined(len(self.clusters), "no head of its layer is left over")
        effects = self.effects[moment]
        name = f"heads/beyond/{moment}/{head.layer}:{head.head}"
        return excess_over_controls(
            effects[:, self.heads.index(head)],
            effects[:, places],
            self.clusters,
            generator(seed, name),
        )


def to_check(
    ranking: Sequence[RankedHead], count: int, n_heads: int, seed: int
) -> tuple[tuple[Head, ...], int]:
    """Return the heads to ablate: the top of the ranking, and random others.

    Returns: The heads, and how many of them are the top ones. Controls are drawn from
    the same layers, up to five in each, among the heads that are not at the top.
    """
    n_top = max(1, min(count, len(ranking) // 4))
    top = [row.head for row in ranking[:n_top]]
    controls: list[Head] = []
    for layer in sorted({head.layer for head in top}):
        left = [Head(layer, h) for h in range(n_heads) if Head(layer, h) not in top]
        order = torch.randperm(
            len(left), generator=generator(seed, f"heads/controls/{layer}")
        )
        controls += [left[place] for place in order[:N_CONTROLS].tolist()]
    return (*top, *controls), n_top


def records_of(
    ranking: Sequence[RankedHead], checked: Checked, seed: int
) -> tuple[list[HeadRow], list[dict[str, Any]]]:
    """Return the rows of `heads.parquet`, and the same heads with their figures."""
    rows, records = [], []
    for row in ranking:
        main, early = (
            checked.effect(each, row.head, seed)
            for each in ("end_template", "final_token")
        )
        beyond = checked.beyond("end_template", row.head, seed)
        found = {
            "contribution": row.contribution,
            "rms_change": row.rms_change,
            "final_token": early,
            "end_template": main,
            "beyond_controls": beyond,
        }
        place = {"rank": row.rank, "layer": row.head.layer, "head": row.head.head}
        figures = {
            key: figure_of(each) for key, each in found.items() if each is not None
        }
        records.append(place | figures)
        mean, unknown = row.contribution, undefined(0, "not checked")
        causal, excess = main or unknown, beyond or unknown
        rows.append(
            HeadRow(
                **place,
                contribution=mean.value,
                low=mean.low,
                high=mean.high,
                rms_change=row.rms_change.value,
                plateau=row.plateau,
                final=row.final,
                causal_effect=causal.value,
                causal_low=causal.low,
                causal_high=causal.high,
                causal_final_token=early and early.value,
                beyond_controls=excess.value,
                beyond_controls_low=excess.low,
                beyond_controls_high=excess.high,
                checked_as=None if main is None else "top" if beyond else "control",
            )
        )
    return rows, records


def parts_of(found: Read, seed: int) -> dict[str, Any]:
    """Return how much of the fall each kind of part makes; they sum to it."""
    heads = drops(found.readings).total.flatten(1).sum(1, keepdim=True)
    columns = torch.cat([heads, found.others], 1)
    estimates = bootstrap_means(columns, found.clusters, generator(seed, "heads/parts"))
    # The last is there where a model has mixers.
    return {
        name: figure_of(each)
        for name, each in zip(("heads", *OTHERS), estimates, strict=False)
    }


def _removal_gap(
    adapter: Adapter, found: Read, checked: Checked, seed: int
) -> dict[str, Any]:
    """Return how far removal and closed form differ where a norm follows attention.

    Taking a head away changes that norm too, which the closed form takes as fixed: the
    sum over checked heads of how far both differ at the final token, over that of the
    effects of removal, row by row.
    """
    if not any(block.norm_after is not None for block in adapter.blocks):
        return {}
    places = [head.layer for head in checked.heads], [h.head for h in checked.heads]
    change = checked.effects["final_token"]
    off = (change + found.readings.final[:, places[0], places[1]]).abs().sum(1)
    share = off / change.abs().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    name = "heads/removal_gap"
    [mean] = bootstrap_means(share[:, None], checked.clusters, generator(seed, name))
    return {"removal_gap": figure_of(mean)}


def agreement_of(
    contributions: Float[Tensor, "example layer head"], checked: Checked, seed: int
) -> dict[str, Any]:
    """Return how far closed form and causal check order heads alike, by layer."""
    layers = [head.layer for head in checked.heads]
    places = [head.head for head in checked.heads]
    columns = contributions[:, layers, places]
    block: dict[str, Any] = {}
    for moment in MOMENTS:
        found = rank_agreement(
            columns,
            checked.effects[moment],
            layers,
            checked.clusters,
            generator(seed, f"heads/agreement/{moment}"),
        )
        block[moment] = {
            "by_layer": {str(layer): figure_of(each) for layer, each in found.items()},
            "words": f"Taken away {NAMES[moment]}: {agreement_sentences(found)}",
        }
    return block


def summary_sentences(records: Sequence[dict[str, Any]], n_total: int) -> list[str]:
    """Say which heads stand out, and how many were confirmed by taking them away."""
    top = [each for each in records if "beyond_controls" in each]
    held = [each for each in top if (each["beyond_controls"]["low"] or 0) > 0]
    first = records[0]["contribution"]
    sentences = [
        f"Of {n_total} heads, {records[0]['layer']}:{records[0]['head']} (layer:head) "
        f"takes the logit down the most, by {text.score(first)}."
    ]
    if held:
        names = ", ".join(f"{each['layer']}:{each['head']}" for each in held)
        sentences.append(
            f"{len(held)} of the {len(top)} heads that were taken away one by one had "
            f"held the final logit down by more than every random head of their "
            f"layer: {names}."
        )
    else:
        sentences.append(
            f"None of the {len(top)} heads that were taken away one by one held the "
            "final logit down by more than every random head of its layer."
        )
    return sentences


def ranking_of(study: Study, adapter: Adapter) -> list[RankedHead]:
    """Return the ranking of `heads.parquet`."""
    table = study.read_table(OUTPUT)
    if table.num_rows != adapter.total_heads:
        raise InputError(
            f"{adapter.total_heads} heads in {study.path(OUTPUT)}",
            f"{table.num_rows}",
            "Run `holdfast heads` on this study.",
        )
    unknown = undefined(0, "not read from the file")
    return [
        RankedHead(
            row.rank,
            Head(row.layer, row.head),
            Estimate(row.contribution, row.low, row.high, 0),
            unknown,
            row.plateau,
            row.final,
        )
        for row in sorted(rows_of(table, HeadRow), key=lambda row: row.rank)
    ]
