"""Rank heads by what they do between twins, and measure that on held-out twins."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.cliff.openings import FirstToken, Openings, openings
from holdfast.cliff.probe import Probe
from holdfast.errors import EvidenceError, SettingsError
from holdfast.heads.interchange.exchange import Readout
from holdfast.heads.interchange.figures import InterchangeRow, Measured, summarised
from holdfast.heads.interchange.measure import (
    NOTHING,
    OTHER,
    OWN,
    SAME,
    TWIN,
    Copy,
    Exchanger,
    Plan,
)
from holdfast.heads.interchange.twins import Twin, Twins, find_twins
from holdfast.heads.ranking import Head, RankedHead, drops, layer_matched_draws
from holdfast.heads.readings import Read
from holdfast.heads.settings import RankSettings
from holdfast.models.model import Adapter
from holdfast.rollout.rows import Rollout
from holdfast.rollout.session import Session
from holdfast.study.directory import Stage
from holdfast.study.figures import generator, study_seed
from holdfast.study.rows import table_of

OUTPUT = "interchange.parquet"
RANKING, MEASURING = "heads_interchange_ranking", "heads_interchange"
"""Folders of the batches, which go with those of the stage `heads`."""
PARTS = (RANKING, MEASURING)
N_DRAWS = 5
"""Random sets of the same layers that the set of top heads stands beside."""
LEAST_OPENED = 0.5
"""Share of each kind of answers that must open with a token of its own."""


@dataclass(frozen=True)
class Interchange:
    """Twins of a study, and how heads are exchanged between them."""

    settings: RankSettings
    twins: Twins
    rows: Sequence[Rollout]  # All rollouts of the study.

    @classmethod
    def find(cls, settings: RankSettings, rows: Sequence[Rollout]) -> "Interchange":
        """Find the twins, before anything costly is done.

        Raises:
            TooFewExamplesError: If there are too few.
        """
        return cls(settings, find_twins(rows, settings.twins, settings.span), rows)

    @property
    def complied(self) -> list[Rollout]:
        """The runs of held-out twins that complied, in their order."""
        return [twin.complied for twin in self.twins.measuring]

    def exchanger(self, stage: Stage, session: Session, probe: Probe) -> Exchanger:
        """Return what exchanges heads, and what it follows.

        Raises:
            EvidenceError: If refusals and answers open alike.
            SettingsError: If more heads are to be exchanged together than can be.
        """
        adapter = session.adapter
        most = adapter.total_heads // 2
        if self.settings.joint_heads > most:
            raise SettingsError(
                f"--joint-heads of at most {most}, half of the model's heads, so that "
                "as many others are left to compare with",
                str(self.settings.joint_heads),
                "Lower it.",
            )
        readout = self._readout(adapter, probe)
        return Exchanger(stage, session, readout, self.settings.span)

    def _readout(self, adapter: Adapter, probe: Probe) -> Readout:
        if self.settings.reading == "probe":
            direction, offset = probe.raw()
            direction = direction.float().to(adapter.device)
            return lambda states: states.float() @ direction.to(states.device) + offset
        train = [row for row in self.rows if row.split == "train"]
        return FirstToken(adapter, require_openings(train))


def require_openings(rows: Sequence[Rollout]) -> Openings:
    """Return the tokens with which refused and complied answers open.

    Raises:
        EvidenceError: If one kind is missing, or both open alike too often.
    """
    found = openings(rows)
    if min(found.refused, found.complied) < LEAST_OPENED:
        raise EvidenceError(
            "refused and complied training answers that mostly open with tokens of "
            "their own",
            f"{found.refused:.0%} of those refused and {found.complied:.0%} of those "
            "complied",
            "Read the refusal probe in place of the first token: --reading probe.",
        )
    return found.openings


def reranked(
    work: Interchange, exchanger: Exchanger, ranking: Sequence[RankedHead]
) -> tuple[RankedHead, ...]:
    """Return a ranking in the order of what heads of the twin bring back.

    On twins of training requests: the mean change, over runs that complied, towards
    refusal, by the head of the run that refused.
    """
    heads = [row.head for row in ranking]
    found = exchanger.measure(
        work.twins.ranking,
        Plan([{head: TWIN} for head in heads]),
        RANKING,
        "Exchanging heads, to rank them",
    )
    means = found.complied.double().mean(0).tolist()
    # Equal ones stay in the order of layers and heads.
    order = sorted(range(len(heads)), key=lambda i: (-means[i], heads[i]))
    return tuple(
        ranking[place]._replace(rank=rank) for rank, place in enumerate(order, 1)
    )


def measured(
    work: Interchange,
    exchanger: Exchanger,
    read: Read,
    ranking: Sequence[RankedHead],
    attributed: Sequence[Head],
    checked: tuple[Sequence[Head], int],
) -> dict[str, Any]:
    """Measure all heads on held-out twins; writes `interchange.parquet`.

    Args:
        work: The twins.
        exchanger: What exchanges heads.
        read: What attribution reads on the runs of `work.complied`.
        ranking: All heads, in the order of interchange.
        attributed: All heads, in the order of attribution.
        checked: The top of the ranking and random others of the same layers; and how
            many of them are the top.

    Returns:
        The block `interchange` of the block `heads`.
    """
    stage, adapter = exchanger.stage, exchanger.session.adapter
    seed, twins = study_seed(stage.study), work.twins.measuring
    heads = sorted(attributed)
    joint = chosen_together(ranking, work.settings.joint_heads, adapter.n_heads)
    draws = layer_matched_draws(
        joint, adapter.n_heads, N_DRAWS, generator(seed, "heads/interchange/draws")
    )
    pairs = chosen_pairs(joint, attributed[: work.settings.joint_heads])
    few = [
        *(dict.fromkeys(each, TWIN) for each in (joint, *draws)),
        *({head: OTHER} for head in joint),
        *(copy for pair in pairs for copy in _of_pair(*pair)),
    ]
    each = [{head: source} for source in (TWIN, SAME) for head in heads]
    ablated: list[Copy] = [{head: NOTHING} for head in heads]
    found = exchanger.measure(
        twins,
        Plan([*each, *ablated, *few], [*each, *few]),
        MEASURING,
        "Exchanging heads",
    )
    places = [h.layer for h in heads], [h.head for h in heads]
    result = Measured(
        heads=heads,
        ranks={row.head: row.rank for row in ranking},
        attribution_ranks={head: rank for rank, head in enumerate(attributed, 1)},
        attribution=drops(read.readings).total[:, places[0], places[1]],
        found=found,
        joint=joint,
        n_draws=len(draws),
        pairs=pairs,
        checked=checked[0],
        n_top=checked[1],
        seed=seed,
    )
    rows, block = summarised(result)
    stage.write_table(OUTPUT, table_of(rows, InterchangeRow))
    kinds = Counter[str](twin.kind for twin in twins)
    return {
        "span": work.settings.span,
        "reading": work.settings.reading,
        "ranked_on": _counts(work.twins.ranking),
        "measured_on": _counts(twins) | {kind: kinds[kind] for kind in KINDS},
        **block,
    }


KINDS = ("samples", "wrappers")


def chosen_together(
    ranking: Sequence[RankedHead], count: int, n_heads: int
) -> tuple[Head, ...]:
    """Return the first heads of a ranking, at most half of those of any layer."""
    chosen: list[Head] = []
    for row in ranking:
        of_layer = sum(head.layer == row.head.layer for head in chosen)
        if len(chosen) < count and of_layer < n_heads // 2:
            chosen.append(row.head)
    return tuple(chosen)


def chosen_pairs(
    gates: Sequence[Head], amplifiers: Sequence[Head]
) -> tuple[tuple[Head, Head], ...]:
    """Return pairs of a head and one of a later layer that it may switch."""
    return tuple(
        (gate, amplifier)
        for gate in gates
        for amplifier in amplifiers
        if gate.layer < amplifier.layer
    )


def _of_pair(gate: Head, amplifier: Head) -> tuple[Copy, Copy]:
    """Return both together, and the first with the second held where it was."""
    return {gate: TWIN, amplifier: TWIN}, {gate: TWIN, amplifier: OWN}


def _counts(twins: Sequence[Twin]) -> dict[str, int]:
    return {"rows": len(twins), "requests": len({twin.request_id for twin in twins})}
