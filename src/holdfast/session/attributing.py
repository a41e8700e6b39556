"""What every head adds to the probe's logit, and what taking it away does, by row."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.analysis.heads import Head, Readings
from holdfast.analysis.probe import Probe
from holdfast.models.attribution import Attribution, attribute
from holdfast.models.causal import MOMENTS, Moment, causal_effects
from holdfast.models.edits import HeadEdit, editing
from holdfast.models.parts import Adapter
from holdfast.session.batches import ROW_ID, in_batches
from holdfast.session.context import Session
from holdfast.session.rows import Rollout
from holdfast.study import Study

OTHERS = ("mlps", "biases", "embedding", "plateau_logit", "final_logit")
CAUSAL = "heads_causal"
"""Folder of the batches of the second half of the stage `heads`."""


class Read(NamedTuple):
    """What was read of each head, and of everything else, on each row.

    Attributes:
        readings: Of the heads.
        others: Plateau less final token of all MLPs, all biases and the embedding,
            then the logit at both, in the order of `OTHERS`.
        clusters: The base request of each row.
    """

    readings: Readings
    others: Float[Tensor, "example _"]
    clusters: list[str]


def read(
    adapter: Adapter,
    rows: Sequence[Rollout],
    probe: Probe,
    *,
    batch_size: int,
    edit: HeadEdit | None = None,
) -> Float[Tensor, "example _"]:
    """Attribute the plateau and the final token of each row, one line of numbers a row.

    Args:
        adapter: The model.
        rows: Answers with thinking.
        probe: Whose logit is attributed.
        batch_size: Rows at once.
        edit: Heads that are scaled meanwhile, at every position.
    """
    direction, offset = probe.raw()
    with editing(adapter, edit) if edit else nullcontext():
        found = attribute(
            adapter,
            [row.token_ids[: row.final + 1] for row in rows],
            [row.spans.thinking for row in rows],
            direction.float(),
            offset,
            tail=1,
            batch_size=batch_size,
        )
    return torch.stack([_line(each) for each in found])


def unpack(
    lines: Float[Tensor, "example _"], rows: Sequence[Rollout], adapter: Adapter
) -> Read:
    """Return what `read` found, taken apart."""
    shape = (len(lines), adapter.n_layers, adapter.n_heads)
    size = shape[1] * shape[2]
    heads = [lines[:, i * size : (i + 1) * size].reshape(shape) for i in range(4)]
    rest = lines[:, 4 * size :]
    readings = Readings(
        plateau=heads[0],
        plateau_unscaled=heads[1],
        plateau_inverse_rms=rest[:, 0],
        final=heads[2],
        final_inverse_rms=rest[:, 1],
        published=heads[3],
    )
    return Read(readings, rest[:, 2:], [row.request_id for row in rows])


def read_in_batches(
    study: Study, session: Session, rows: Sequence[Rollout], probe: Probe
) -> Read:
    """Attribute rows, keeping each finished batch on disk."""
    adapter, batch_size = session.adapter, session.batch_size

    def work(batch: list[Rollout]) -> pa.Table:
        return _table(batch, read(adapter, batch, probe, batch_size=batch_size))

    table = in_batches(
        study,
        "heads",
        rows,
        name=lambda row: row.row_id,
        length=lambda row: row.final,
        batch_size=batch_size,
        work=work,
        progress=session.progress,
        label="Attributing to heads",
    )
    return unpack(_lines(table), rows, adapter)


def take_away(
    study: Study,
    session: Session,
    rows: Sequence[Rollout],
    probe: Probe,
    heads: Sequence[Head],
) -> Mapping[Moment, Float[Tensor, "example head"]]:
    """Take each head away, at the final token and over the end template.

    Args:
        study: Where finished batches are kept.
        session: The model.
        rows: Answers whose thinking has ended.
        probe: Whose logit is read.
        heads: Heads, each by itself.

    Returns:
        Change of the logit at the final token, by moment.
    """
    adapter, batch_size = session.adapter, session.batch_size
    direction, offset = probe.raw()

    def work(batch: list[Rollout]) -> pa.Table:
        found = causal_effects(
            adapter,
            [row.token_ids[: row.final + 1] for row in batch],
            [row.final + 1 - row.spans.end_template[0] for row in batch],
            [[head] for head in heads],
            direction.float(),
            offset,
            batch_size=batch_size,
        )
        return _table(batch, torch.cat([found[each].change for each in MOMENTS], 1))

    table = in_batches(
        study,
        CAUSAL,
        rows,
        name=lambda row: row.row_id,
        length=lambda row: row.final,
        batch_size=batch_size,
        work=work,
        progress=session.progress,
        label="Taking heads away",
    )
    both = _lines(table).chunk(len(MOMENTS), 1)
    return dict(zip(MOMENTS, both, strict=True))


def _line(found: Attribution) -> Float[Tensor, "_"]:
    level, end = found.plateau, found.tail
    others = [
        level.mlps.sum() - end.mlps[-1].sum(),
        level.biases.sum() - end.biases[-1].sum(),
        level.embedding - end.embedding[-1],
        torch.tensor(found.plateau_logit),
        found.tail_logits[-1],
    ]
    rms = [torch.tensor(found.plateau_inverse_rms), found.tail_inverse_rms[-1]]
    return torch.cat(
        [
            level.heads.flatten(),
            found.plateau_unscaled.flatten(),
            end.heads[-1].flatten(),
            found.published.flatten(),
            torch.stack([each.float() for each in [*rms, *others]]),
        ]
    ).float()


def _table(rows: Sequence[Rollout], lines: Float[Tensor, "example _"]) -> pa.Table:
    flat = pa.array(lines.float().numpy().reshape(-1), pa.float32())
    return pa.table(
        {
            ROW_ID: [row.row_id for row in rows],
            "values": pa.FixedSizeListArray.from_arrays(flat, lines.shape[1]),
        }
    )


def _lines(table: pa.Table) -> Float[Tensor, "example _"]:
    flat = table.column("values").combine_chunks().flatten().to_numpy()
    return torch.from_numpy(np.array(flat).reshape(table.num_rows, -1))
