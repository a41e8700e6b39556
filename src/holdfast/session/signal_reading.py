"""Read states step by step and reduce them to the signal, where they are computed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.analysis.dynamics import (
    Gauge,
    Kind,
    pool_steps,
    positions_of,
    steps_at_fractions,
)
from holdfast.analysis.probe import Probe
from holdfast.judges.rules import judge
from holdfast.models.target_loss import target_losses
from holdfast.models.windows import read_windows
from holdfast.session.batches import ROW_ID, in_batches
from holdfast.session.context import Session
from holdfast.session.rows import Rollout
from holdfast.session.signal_rows import Window
from holdfast.session.signal_settings import SignalSettings
from holdfast.study import Study

KIND: Kind = "autoregressive"
LOGIT, MATCHED, PROBE = "compliance_logit", "matched_logit", "probe"
DIFFERENCE, PERPLEXITY, TEXT = "logit_difference", "perplexity", "text"

Watched = tuple[Rollout, Window]


class Readers(NamedTuple):
    """What is read off the states of a row.

    Attributes:
        gauges: Anchors in the coordinates of the mode, by channel.
        probe: The refusal probe of the audit, if the study has one.
        difference: Direction of the plain logit difference of first answer tokens.
    """

    gauges: Mapping[str, Gauge]
    probe: Probe | None
    difference: Float[Tensor, "d_model"] | None

    @property
    def channels(self) -> list[str]:
        """Names of what `reduce` returns, column by column."""
        others = {PROBE: self.probe, DIFFERENCE: self.difference}
        return [
            *self.gauges,
            *(name for name, each in others.items() if each is not None),
        ]


def step_indices(n: int, settings: SignalSettings) -> Tensor:
    """Return which state of a row of `n` tokens is read at each step.

    Args:
        n: Tokens that are watched.
        settings: Steps, and what a step is.

    Returns:
        Indices into the pooled states of the row, one a step.
    """
    if settings.time == "step":
        return torch.arange(settings.steps).clamp(max=n - 1)
    shares = (torch.arange(n, dtype=torch.float64) + 1) / n
    return steps_at_fractions(shares[None], settings.steps)[0]


def pooled(
    states: Float[Tensor, "position d_model"], settings: SignalSettings
) -> Float[Tensor, "step d_model"]:
    """Return the pooled state of a row at each step.

    Args:
        states: The states that its tokens were predicted from.
        settings: Mode, steps, and what a step is.
    """
    by_step = settings.time == "step"
    repeat = settings.mode == "repo"
    n_steps = settings.steps if by_step else len(states)
    found = pool_steps(
        states, n_steps, positions_of(settings.mode, KIND), repeat_last=repeat
    )
    if by_step:
        return found
    indices = step_indices(len(states), settings).to(states.device)
    return found[indices]


def read_pooled(
    study: Study,
    stage: str,
    session: Session,
    items: Sequence[Watched],
    settings: SignalSettings,
) -> Float[Tensor, "example step d_model"]:
    """Return the pooled states of the rows that anchors are fitted on.

    Args:
        study: Keeps them until the stage has finished.
        stage: Name of the stage.
        session: The model.
        items: Rows and their windows.
        settings: Mode, steps, region.
    """
    session.progress.say(f"Reading {len(items)} answers for the anchors.")

    def work(batch: list[Watched]) -> pa.Table:
        found = _read(session, batch, lambda states: pooled(states, settings))
        flat = pa.array(torch.stack(found).numpy().reshape(-1), pa.float32())
        size = found[0].numel()
        values = pa.FixedSizeListArray.from_arrays(flat, size)
        return pa.table({ROW_ID: [row.row_id for row, _ in batch], "states": values})

    table = _batches(study, stage, session, items, work, "Reading anchors")
    return _tensor(table, "states").reshape(len(items), settings.steps, -1)


def read_signal(
    study: Study,
    stage: str,
    session: Session,
    items: Sequence[Watched],
    settings: SignalSettings,
    readers: Readers,
) -> dict[str, Float[Tensor, "example step"]]:
    """Return every channel of every row.

    Args:
        study: Keeps finished batches until the stage has finished.
        stage: Name of the stage.
        session: The model.
        items: Rows and their windows.
        settings: Mode, steps, region.
        readers: Anchors, probe and direction.
    """
    channels = [*readers.channels, TEXT]
    if settings.perplexity:
        channels.append(PERPLEXITY)

    def work(batch: list[Watched]) -> pa.Table:
        reduce = _reducer(readers, settings, session.adapter.device)
        found = torch.stack(_read(session, batch, reduce))
        found = torch.cat([found, _texts(session, batch, settings)[..., None]], -1)
        if settings.perplexity:
            losses = _perplexities(session, batch)
            spread = losses[:, None, None].expand(-1, settings.steps, 1)
            found = torch.cat([found, spread], -1)
        columns: dict[str, Any] = {ROW_ID: [row.row_id for row, _ in batch]}
        for place, name in enumerate(channels):
            flat = pa.array(found[..., place].numpy().reshape(-1), pa.float32())
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, settings.steps)
        return pa.table(columns)

    table = _batches(study, stage, session, items, work, "Reading the signal")
    return {name: _tensor(table, name) for name in channels}


def _reducer(
    readers: Readers, settings: SignalSettings, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return what turns the states of a row into its channels, on the device."""
    gauges = [gauge.to(device) for gauge in readers.gauges.values()]
    raw = None
    if readers.probe is not None:
        direction, offset = readers.probe.raw()
        raw = direction.float().to(device), offset
    difference = readers.difference
    if difference is not None:
        difference = difference.float().to(device)

    def reduce(states: Tensor) -> Tensor:
        means = pooled(states, settings)[None]
        columns = [gauge.logit(means)[0] for gauge in gauges]
        at = step_indices(len(states), settings).to(device)
        if raw is not None:
            columns.append(torch.sigmoid(states @ raw[0] + raw[1])[at])
        if difference is not None:
            columns.append((states[0] @ difference).expand(settings.steps))
        return torch.stack(columns, -1)

    return reduce


def _read(
    session: Session, batch: Sequence[Watched], reduce: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    return read_windows(
        session.adapter,
        [window.token_ids for _, window in batch],
        [window.n for _, window in batch],
        reduce,
        batch_size=session.batch_size,
    )


def _texts(
    session: Session, batch: Sequence[Watched], settings: SignalSettings
) -> Float[Tensor, "example step"]:
    """Return 1 at each step whose text so far is no refusal, and 0 where it is one."""
    rows = []
    for row, window in batch:
        start = len(window.token_ids) + 1 - window.n
        ends = (step_indices(window.n, settings) + start + 1).tolist()
        said = {
            end: judge(
                row.prompt,
                session.adapter.tokenizer.decode(
                    row.token_ids[start:end], skip_special_tokens=True
                ),
            ).outcome
            for end in sorted(set(ends))
        }
        rows.append([float(said[end] != "refused") for end in ends])
    return torch.tensor(rows)


def _perplexities(
    session: Session, batch: Sequence[Watched]
) -> Float[Tensor, "example"]:
    """Return the mean negative log-likelihood of the prompt of each row, in nats."""
    prompts = {row.prompt_id: row.token_ids[: row.spans.prompt[1]] for row, _ in batch}
    losses = target_losses(
        session.adapter,
        list(prompts.values()),
        [(1, len(ids)) for ids in prompts.values()],
        batch_size=session.batch_size,
    )
    known = dict(zip(prompts, losses.tolist(), strict=True))
    return torch.tensor([known[row.prompt_id] for row, _ in batch]).float()


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
