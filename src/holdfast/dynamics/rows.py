"""The rows that the signal is read of, and reading them in batches."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from holdfast.cliff.probe import Probe
from holdfast.dynamics.settings import SignalSettings
from holdfast.dynamics.signal import Gauge
from holdfast.rollout.rows import (
    ATTACK_SUCCESS_OUTCOMES,
    BESIDE,
    PLAIN,
    Rollout,
    is_refused,
)
from holdfast.rollout.session import Session
from holdfast.stats.groups import group_names
from holdfast.study import Study
from holdfast.study.batches import ROW_ID, in_batches

LOOKALIKE = "safe_lookalike"


class Window(NamedTuple):
    """The tokens of a row whose states are read."""

    # The sequence, without its last token, which predicts nothing.
    token_ids: tuple[int, ...]
    # How many tokens of the response are watched; as many of the last states of the
    # sequence predict them.
    n: int


class AnchorRows(NamedTuple):
    """The rows that anchors may be fitted on."""

    published: tuple[Rollout, ...]  # Plain training rows of both sides.
    # The same refusals, beside harmless rows that sound like them.
    matched: tuple[Rollout, ...]

    @property
    def rows(self) -> list[Rollout]:
        """All of them, each once."""
        return list(
            {row.row_id: row for row in (*self.published, *self.matched)}.values()
        )

    @property
    def requests(self) -> set[str]:
        """Base requests of all of them; nothing else is read off these."""
        return {row.request_id for row in self.rows}


def window_of(row: Rollout, settings: SignalSettings) -> Window | None:
    """Return the tokens of a row that are watched, or None where there are none.

    `row`: The row; the token that ended it counts as one of its tokens.
    """
    start = row.spans.answer[0] if settings.region == "answer" else row.spans.prompt[1]
    n = len(row.token_ids) - start
    if settings.time == "step":
        n = min(n, settings.steps)
    if n < 1 or start < 1 or (settings.region == "answer" and not row.closed):
        return None
    return Window(row.token_ids[: start + n - 1], n)


def anchor_rows(rows: Sequence[Rollout], settings: SignalSettings) -> AnchorRows:
    """Return the rows that anchors may be fitted on.

    Training rows, in the order of their content hashes, at most half of the requests
    of each side, so that as many are left to fit a detector on. Harmless rows that
    sound dangerous have no part in any other fit; half of their requests are taken
    for the matched anchors.
    """

    def side(role: str, split: str) -> list[Rollout]:
        return [
            row
            for row in rows
            if row.role == role and row.split == split and _counts(row, settings)
        ]

    refused = _half(side("harmful", "train"), settings.anchor_requests)
    benign = _half(side("benign", "train"), settings.anchor_requests)
    sounding = _half(side(LOOKALIKE, "test"), settings.anchor_requests)
    return AnchorRows((*benign, *refused), (*benign, *sounding, *refused))


def matched_topics(rows: Sequence[Rollout]) -> list[str | None]:
    """Return the topic of each row as matched anchors see it.

    A topic that has harmless and harmful rows is itself. Else a harmful row has its
    counterpart in harmless ones that sound dangerous, whatever their topics.
    """
    topics = {
        label: {row.topic for row in rows if row.label == label}
        for label in ("harmful", "benign")
    }
    shared = (topics["harmful"] & topics["benign"]) - {None}

    def topic(row: Rollout) -> str | None:
        if row.topic in shared:
            return row.topic
        if row.label == "harmful" or row.role == LOOKALIKE:
            return "sounds dangerous"
        return row.topic

    return [topic(row) for row in rows]


def held_out(rows: Sequence[Rollout], taken: Collection[str]) -> list[Rollout]:
    """Return the test rows from whose requests no anchor was made."""
    return [
        row
        for row in rows
        if row.split == "test"
        and row.role not in BESIDE
        and row.request_id not in taken
        and is_read(row)
    ]


def is_read(row: Rollout) -> bool:
    """Return whether the judge saw a refusal, help, or part of it."""
    return row.is_refused or row.verdict in ATTACK_SUCCESS_OUTCOMES


def groups_of(rows: Sequence[Rollout]) -> list[str]:
    """Return the group of each row: benign or attack, complied or refused."""
    return group_names(is_harmful(rows), is_refused(rows))


def is_harmful(rows: Sequence[Rollout]) -> Bool[Tensor, "example"]:
    """Return whether each request is harmful."""
    return torch.tensor([row.label == "harmful" for row in rows], dtype=torch.bool)


def _counts(row: Rollout, settings: SignalSettings) -> bool:
    if not row.is_decided:
        return False
    role = "benign" if row.label == "benign" else "harmful"
    return settings.unfiltered or (role, row.verdict) in PLAIN


def _half(rows: Sequence[Rollout], most: int) -> list[Rollout]:
    """Return the rows of half of the requests, chosen by hash, or of fewer."""
    ordered = sorted({row.request_id for row in rows}, key=_hash)
    kept = set(ordered[: min(most, len(ordered) // 2)])
    return [row for row in rows if row.request_id in kept]


def _hash(request_id: str) -> str:
    return hashlib.sha256(f"anchor/{request_id}".encode()).hexdigest()


LOGIT, MATCHED, PROBE = "compliance_logit", "matched_logit", "probe"
DIFFERENCE, PERPLEXITY, TEXT = "logit_difference", "perplexity", "text"
READING, CHANGED = "reading", "changed"
Watched = tuple[Rollout, Window]
Batch = Sequence[Watched]


class Readers(NamedTuple):
    """What is read off the states of a row."""

    gauges: Mapping[str, Gauge]  # Anchors in the coordinates of the mode, by channel.
    probe: Probe | None  # A refusal probe, if the study has one.
    # Direction of the plain logit difference of first answer tokens.
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
    """The same where states are computed."""

    gauges: Sequence[Gauge]  # Anchors.
    probe: tuple[Tensor, float] | None  # Direction and offset of the probe.
    difference: Tensor | None  # The direction of first answer tokens.


def on_device(readers: Readers, device: torch.device) -> OnDevice:
    """Return readers where states are computed."""
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
    """Return the pooled states of the rows that anchors are fitted on."""
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
    """Return every channel of every row."""
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
