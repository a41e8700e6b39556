"""The steps of an answer that was written from left to right, read in one prefill."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.analysis.dynamics import pool_steps, positions_of, steps_at_fractions
from holdfast.judges.rules import judge
from holdfast.models.target_loss import target_losses
from holdfast.models.windows import read_windows
from holdfast.session.context import Session
from holdfast.session.signal_reading import (
    PERPLEXITY,
    TEXT,
    Batch,
    Readers,
    on_device,
)
from holdfast.session.signal_settings import SignalSettings

KIND = "autoregressive"


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
        states,
        n_steps,
        positions_of(settings.mode, "autoregressive"),
        repeat_last=repeat,
    )
    if by_step:
        return found
    indices = step_indices(len(states), settings).to(states.device)
    return found[indices]


class Prefill:
    """States of answers, each read in one pass: attention is causal."""

    def __init__(self, session: Session, settings: SignalSettings) -> None:
        """Remember how steps are counted.

        Args:
            session: The model.
            settings: Mode, steps, region.
        """
        self._session, self._settings = session, settings

    @property
    def extras(self) -> tuple[str, ...]:
        """Channels that are not read off states."""
        return (TEXT, PERPLEXITY) if self._settings.perplexity else (TEXT,)

    def pooled(self, batch: Batch) -> Sequence[Float[Tensor, "step d_model"]]:
        """Return the pooled state of each row at each step."""
        return self._read(batch, lambda states: pooled(states, self._settings))

    def read(
        self, batch: Batch, readers: Readers
    ) -> Sequence[Float[Tensor, "step channel"]]:
        """Return what is read off the states of each row."""
        settings = self._settings
        there = on_device(readers, self._session.adapter.device)

        def reduce(states: Tensor) -> Tensor:
            means = pooled(states, settings)[None]
            columns = [gauge.logit(means)[0] for gauge in there.gauges]
            at = step_indices(len(states), settings).to(states.device)
            if there.probe is not None:
                direction, offset = there.probe
                columns.append(torch.sigmoid(states @ direction + offset)[at])
            if there.difference is not None:
                columns.append((states[0] @ there.difference).expand(settings.steps))
            return torch.stack(columns, -1)

        return self._read(batch, reduce)

    def beside(self, batch: Batch) -> Float[Tensor, "example step channel"]:
        """Return the text-level signal, and the perplexity of the prompt if asked."""
        columns = [_texts(self._session, batch, self._settings)]
        if self._settings.perplexity:
            losses = _perplexities(self._session, batch)
            columns.append(losses[:, None].expand(-1, self._settings.steps))
        return torch.stack(columns, -1)

    def _read(self, batch: Batch, reduce: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return read_windows(
            self._session.adapter,
            [window.token_ids for _, window in batch],
            [window.n for _, window in batch],
            reduce,
            batch_size=self._session.batch_size,
        )


def _texts(
    session: Session, batch: Batch, settings: SignalSettings
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


def _perplexities(session: Session, batch: Batch) -> Float[Tensor, "example"]:
    """Return the mean negative log-likelihood of the prompt of each row, in nats."""
    # Not by their names: two samples of a conversation have histories of their own.
    prompts = {row.token_ids[: row.spans.prompt[1]] for row, _ in batch}
    ordered = sorted(prompts)
    losses = target_losses(
        session.adapter,
        ordered,
        [(1, len(ids)) for ids in ordered],
        batch_size=session.batch_size,
    )
    known = dict(zip(ordered, losses.tolist(), strict=True))
    prompts_of = (row.token_ids[: row.spans.prompt[1]] for row, _ in batch)
    return torch.tensor([known[ids] for ids in prompts_of]).float()
