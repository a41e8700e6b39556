"""Read states step by step and reduce them to the signal, where they are computed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.analysis.dynamics import Gauge
from holdfast.analysis.probe import Probe
from holdfast.session.batches import ROW_ID, in_batches
from holdfast.session.context import Session
from holdfast.session.rows import Rollout
from holdfast.session.signal_rows import Window
from holdfast.study import Study

LOGIT, MATCHED, PROBE = "compliance_logit", "matched_logit", "probe"
DIFFERENCE, PERPLEXITY, TEXT = "logit_difference", "perplexity", "text"
READING, CHANGED = "reading", "changed"

Watched = tuple[Rollout, Window]
Batch = Sequence[Watched]


class Readers(NamedTuple):
    """What is read off the states of a row.

    Attributes:
        gauges: Anchors in the coordinates of the mode, by channel.
        probe: A refusal probe, if the study has one.
        difference: Direction of the plain logit difference of first answer tokens.
    """

    gauges: Mapping[str, Gauge]
    probe: Probe | None
    difference: Float[Tensor, "d_model"] | None

    @property
    def channels(self) -> list[str]:
        """Names of what a source reads with them, column by column."""
        others = {PROBE: self.probe, DIFFERENCE: self.difference}
        return [
            *self.gauges,
            *(name for name, each in others.items() if each is not None),
        ]


class OnDevice(NamedTuple):
    """The same where states are computed.

    Attributes:
        gauges: Anchors.
        probe: Direction and offset of the probe.
        difference: The direction of first answer tokens.
    """

    gauges: Sequence[Gauge]
    probe: tuple[Tensor, float] | None
    difference: Tensor | None


def on_device(readers: Readers, device: torch.device) -> OnDevice:
    """Return readers where states are computed.

    Args:
        readers: What is read.
        device: The device of the model.
    """
    gauges = [gauge.to(device) for gauge in readers.gauges.values()]
    raw = None
    if readers.probe is not None:
        direction, offset = readers.probe.raw()
        raw = direction.float().to(device), offset
    difference = readers.difference
    if difference is not None:
        difference = difference.float().to(device)
    return OnDevice(gauges, raw, difference)


@runtime_checkable
class Source(Protocol):
    """Where states step by step come from: a prefill, or steps run once more."""

    @property
    def extras(self) -> tuple[str, ...]:
        """Channels that are not read off states."""

    def pooled(self, batch: Batch) -> Sequence[Float[Tensor, "step d_model"]]:
        """Return the pooled state of each row at each step."""

    def read(
        self, batch: Batch, readers: Readers
    ) -> Sequence[Float[Tensor, "step channel"]]:
        """Return what is read off the states of each row, in the readers' order."""

    def beside(self, batch: Batch) -> Float[Tensor, "example step channel"]:
        """Return the extras of each row."""


def read_pooled(
    study: Study,
    stage: str,
    session: Session,
    items: Batch,
    source: Source,
) -> Float[Tensor, "example step d_model"]:
    """Return the pooled states of the rows that anchors are fitted on.

    Args:
        study: Keeps them until the stage has finished.
        stage: Name of the stage.
        session: Where progress is told.
        items: Rows and their windows.
        source: Where states come from.
    """
    session.progress.say(f"Reading {len(items)} answers for the anchors.")

    def work(batch: list[Watched]) -> pa.Table:
        found = source.pooled(batch)
        flat = pa.array(torch.stack(list(found)).numpy().reshape(-1), pa.float32())
        values = pa.FixedSizeListArray.from_arrays(flat, found[0].numel())
        steps = [len(found[0])] * len(batch)
        names = [row.row_id for row, _ in batch]
        return pa.table({ROW_ID: names, "states": values, "steps": steps})

    table = _batches(study, stage, session, items, work, "Reading anchors")
    n_steps = table.column("steps")[0].as_py()
    return _tensor(table, "states").reshape(len(items), n_steps, -1)


def read_signal(
    study: Study,
    stage: str,
    session: Session,
    items: Batch,
    source: Source,
    readers: Readers,
) -> dict[str, Float[Tensor, "example step"]]:
    """Return every channel of every row.

    Args:
        study: Keeps finished batches until the stage has finished.
        stage: Name of the stage.
        session: Where progress is told.
        items: Rows and their windows.
        source: Where states come from.
        readers: Anchors, probe and direction.
    """
    channels = [*readers.channels, *source.extras]

    def work(batch: list[Watched]) -> pa.Table:
        found = torch.stack(list(source.read(batch, readers)))
        found = torch.cat([found, source.beside(batch)], -1)
        columns: dict[str, Any] = {ROW_ID: [row.row_id for row, _ in batch]}
        for place, name in enumerate(channels):
            flat = pa.array(found[..., place].numpy().reshape(-1), pa.float32())
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, found.shape[1])
        return pa.table(columns)

    table = _batches(study, stage, session, items, work, "Reading the signal")
    return {name: _tensor(table, name) for name in channels}


def _batches(
    study: Study,
    stage: str,
    session: Session,
    items: Sequence[Watched],
    work: Callable[[list[Watched]], pa.Table],
    label: str,
) -> pa.Table:
    return in_batches(
        study,
        stage,
        items,
        name=lambda item: item[0].row_id,
        length=lambda item: len(item[1].token_ids),
        batch_size=session.batch_size,
        work=work,
        progress=session.progress,
        label=label,
    )


def _tensor(table: pa.Table, name: str) -> Float[Tensor, "example _"]:
    flat = table.column(name).combine_chunks().flatten().to_numpy()
    return torch.from_numpy(np.array(flat).reshape(table.num_rows, -1))
