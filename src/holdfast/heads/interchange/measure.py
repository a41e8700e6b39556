"""Exchange heads between twins, batch by batch, and keep what each exchange changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.heads.interchange.exchange import Readout, Run, exchange
from holdfast.heads.interchange.twins import BLOCK, Twin, partners, span_of
from holdfast.heads.ranking import Head
from holdfast.heads.settings import Span
from holdfast.models.batching import with_batch_halving
from holdfast.models.decoding.head_swap import KEEP
from holdfast.models.model import Adapter
from holdfast.rollout.rows import Rollout
from holdfast.rollout.session import Session
from holdfast.study.batches import ROW_ID, Batches
from holdfast.study.directory import Stage
from holdfast.study.rows import vectors, vectors_of

TWIN, SAME, NOTHING, OWN, OTHER = range(5)
"""Where a head is taken from: the twin; a run of another request that ended as this one
did; nowhere, which ablates it; this run itself, which holds it where it was; and a run
of another request that ended as the twin did."""
Copy = Mapping[Head, int]
"""Heads that are exchanged together, and where each is taken from."""


@dataclass(frozen=True)
class Plan:
    """What is exchanged in the run that complied, and in the one that refused."""

    complied: Sequence[Copy]
    refused: Sequence[Copy] = ()


class Found(NamedTuple):
    """What was read of each pair of runs; log-odds, or logits, of refusing."""

    plain_complied: Float[Tensor, "example"]
    plain_refused: Float[Tensor, "example"]
    # What each copy of the plan changes, in its order.
    complied: Float[Tensor, "example _"]
    refused: Float[Tensor, "example _"]
    clusters: list[str]  # The base request of each pair.


@dataclass(frozen=True)
class Exchanger:
    """What stays the same over all exchanges of a stage."""

    stage: Stage
    session: Session
    readout: Readout
    span: Span

    def measure(
        self, twins: Sequence[Twin], plan: Plan, parts: str, label: str
    ) -> Found:
        """Exchange heads of all twins by a plan, and keep each finished batch on disk.

        `parts`: Folder of the batches, which belongs to the plan.
        """
        others = {
            twin.name: twins[place]
            for twin, place in zip(twins, partners(twins), strict=True)
        }
        adapter = self.session.adapter
        tables = [_table(adapter, copies) for copies in (plan.complied, plan.refused)]
        # Whole blocks of twins, so that a batch holds the runs of other requests.
        size = max(1, self.session.batch_size // (2 * BLOCK)) * BLOCK

        def work(batch: Sequence[Twin]) -> pa.Table:
            def lines(some: Sequence[Twin]) -> list[Tensor]:
                return self._lines(some, others, tables)

            found, _ = with_batch_halving(lines, batch, size)
            names = [twin.name for twin in batch]
            return pa.table({ROW_ID: names, "values": vectors(torch.stack(found))})

        table = Batches(self.stage, size, parts=parts).run(
            twins,
            work,
            name=lambda twin: twin.name,
            length=lambda twin: twin.length,
            label=label,
        )
        values = vectors_of(table, "values")
        n = len(plan.complied)
        clusters = [twin.request_id for twin in twins]
        return Found(
            values[:, 0],
            values[:, 1],
            values[:, 2 : 2 + n],
            values[:, 2 + n :],
            clusters,
        )

    def _lines(
        self,
        twins: Sequence[Twin],
        others: Mapping[str, Twin],
        tables: Sequence[Int[Tensor, "_ layer head"] | None],
    ) -> list[Float[Tensor, "_"]]:
        """Return of each twin both plain readings, and what every copy changes."""
        complied, refused = tables
        near = [*twins]
        if any(
            bool((t == SAME).any() | (t == OTHER).any())
            for t in tables
            if t is not None
        ):
            near += [others[twin.name] for twin in twins]
        rows = {row.row_id: row for twin in near for row in twin}
        places = {row_id: place for place, row_id in enumerate(rows)}
        runs = [self._run(row) for row in rows.values()]

        def give(own: Rollout, twin: Rollout, same: Rollout, other: Rollout) -> None:
            place = places[own.row_id]
            given = (twin.row_id, same.row_id, "", own.row_id, other.row_id)
            runs[place] = runs[place]._replace(
                sources=tuple(places.get(each) for each in given),
                take=complied if own.is_complied else refused,
            )

        for twin in twins:
            other = others[twin.name]
            give(twin.complied, twin.refused, other.complied, other.refused)
            give(twin.refused, twin.complied, other.refused, other.complied)
        found = exchange(self.session.adapter, runs, self.readout)
        lines = []
        for twin in twins:
            ends = [found[places[row.row_id]] for row in (twin.complied, twin.refused)]
            plain = torch.tensor([each.plain for each in ends])
            lines.append(torch.cat([plain, *(each.change for each in ends)]))
        return lines

    def _run(self, row: Rollout) -> Run:
        return Run(row.token_ids[: row.final + 1], span_of(row, self.span))


def _table(
    adapter: Adapter, copies: Sequence[Copy]
) -> Int[Tensor, "copy layer head"] | None:
    """Return from which source each head of each copy is taken."""
    if not copies:
        return None
    table = torch.full((len(copies), adapter.n_layers, adapter.n_heads), KEEP)
    for place, copy in enumerate(copies):
        for (layer, head), source in copy.items():
            table[place, layer, head] = source
    return table
