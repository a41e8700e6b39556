"""Hidden states by step, from one prefill or from replayed denoising."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.dynamics.rows import (
    CHANGED,
    PERPLEXITY,
    READING,
    TEXT,
    Batch,
    Readers,
    on_device,
)
from holdfast.dynamics.settings import SignalSettings
from holdfast.dynamics.signal import Gauge, pool_steps, positions_of, steps_at_fractions
from holdfast.dynamics.trajectories import HARMFUL, HARMLESS, UNPARSED
from holdfast.errors import InputError
from holdfast.judges.degenerate import is_half_decoded
from holdfast.judges.rules.rules import judge
from holdfast.judges.verdict import Outcome
from holdfast.models.decoding.row_state import Drafting
from holdfast.models.decoding.steps import Pooled, Positions, Region, StepView
from holdfast.models.diffusion.replay import Script, replay
from holdfast.models.hidden_states import read_windows, target_losses
from holdfast.models.model import MaskedModel
from holdfast.rollout.rows import Rollout
from holdfast.rollout.session import Session

KIND = "autoregressive"


def token_steps(n: int, settings: SignalSettings) -> Tensor:
    """Return which state of a row of `n` tokens is read at each step."""
    if settings.time == "step":
        return torch.arange(settings.steps).clamp(max=n - 1)
    shares = (torch.arange(n, dtype=torch.float64) + 1) / n
    return steps_at_fractions(shares[None], settings.steps)[0]


def pooled(
    states: Float[Tensor, "position d_model"], settings: SignalSettings
) -> Float[Tensor, "step d_model"]:
    """Return the pooled state of a row at each step.

    `states`: The states that its tokens were predicted from.
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
    indices = token_steps(len(states), settings).to(states.device)
    return found[indices]


class Prefill:
    """States of answers, each read in one pass: attention is causal."""

    def __init__(self, session: Session, settings: SignalSettings) -> None:
        """Remember how steps are counted."""
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
            at = token_steps(len(states), settings).to(states.device)
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
        ends = (token_steps(window.n, settings) + start + 1).tolist()
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


class LiveSignal:
    """An observer that returns the log-odds of compliance of every row at each step.

    It costs one mean and two distances a row, on the device; no state is kept.
    """

    def __init__(
        self, gauge: Gauge, positions: Positions, region: Region = "completion"
    ) -> None:
        """Choose what states are held against, and which of them."""
        self.gauge = gauge
        self.region = region
        self._pooled = Pooled(positions, region)
        self._taken = torch.empty(0)

    def __call__(self, look: StepView) -> Float[Tensor, "example"]:
        """Return the log-odds of compliance at this step of each row.

        It is not a number before the region begins, and after the last step that the
        anchors have.
        """
        states = self._pooled(look)
        if look.step == 0:
            self._taken = torch.zeros_like(look.rows)
        counted = look.fresh.any(-1)
        if self.region == "answer":
            counted = counted & look.answering
        step = self._taken[look.rows]
        self._taken[look.rows] = step + counted.long()
        last = self.gauge.n_steps - 1
        found = self.gauge.logit_at(step.clamp(max=last), states)
        return found.masked_fill(~counted | (step > last), torch.nan)


_READINGS: dict[Outcome, int] = {
    "refused": HARMLESS,
    "complied": HARMFUL,
    "partial": HARMFUL,
    "degenerate": UNPARSED,
    "ended_inside": UNPARSED,
    "unparsed": UNPARSED,
}


class Replay:
    """States of answers at the steps that were taken, forward pass by forward pass."""

    def __init__(
        self,
        masked: MaskedModel,
        batch_size: int,
        drafts: Mapping[str, Drafting],
        settings: SignalSettings,
    ) -> None:
        """Remember how the answers came about."""
        self._masked, self._batch_size = masked, batch_size
        self._drafts, self._settings = drafts, settings

    @property
    def extras(self) -> tuple[str, ...]:
        """Channels that are not read off states."""
        return TEXT, READING, CHANGED

    def pooled(self, batch: Batch) -> Sequence[Float[Tensor, "step d_model"]]:
        """Return the pooled state of each row at each step."""
        return [means for means, _ in self._states(batch)]

    def read(
        self, batch: Batch, readers: Readers
    ) -> Sequence[Float[Tensor, "step channel"]]:
        """Return what is read off the states of each row."""
        there = on_device(readers, torch.device("cpu"))
        found = []
        for means, first in self._states(batch):
            columns = [gauge.logit(means[None])[0] for gauge in there.gauges]
            if there.probe is not None:
                direction, offset = there.probe
                columns.append(torch.sigmoid(means @ direction + offset))
            if there.difference is not None:
                columns.append((first @ there.difference).expand(len(means)))
            found.append(torch.stack(columns, -1))
        return found

    def beside(self, batch: Batch) -> Float[Tensor, "example step channel"]:
        """Return what the rules read in the draft of each step."""
        return torch.stack([self._said(row) for row, _ in batch])

    def _states(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Return pooled states, and the one that the first token comes from."""
        known = [(row, self._drafts[row.row_id]) for row, _ in batch]
        scripts = [
            Script(row.token_ids[: row.spans.prompt[1]], how.response, how.committed_at)
            for row, how in known
        ]
        positions = positions_of(self._settings.mode, "diffusion")
        seen = replay(
            self._masked,
            scripts,
            lambda: _Seen(positions),
            batch_size=self._batch_size,
        )
        width = self._masked.d_model
        return [
            (each[draft_steps(how, self._settings), :width], each[0, width:])
            for each, (_, how) in zip(seen, known, strict=True)
        ]

    def _said(self, row: Rollout) -> Float[Tensor, "step channel"]:
        """Return for each step: no refusal; harmless, harmful or neither; changed."""
        how = self._drafts[row.row_id]
        steps = draft_steps(how, self._settings).tolist()
        final = how.drafts[-1]
        known: dict[tuple[int, ...], tuple[Outcome, int]] = {}
        made = []
        for step in steps:
            draft = how.drafts[step]
            if draft not in known:
                text = text_of(self._masked, draft)
                outcome = judge(row.prompt, text).outcome
                # The response itself is read as its verdict says, whole or not.
                broken = draft != final and is_half_decoded(text)
                known[draft] = outcome, UNPARSED if broken else _READINGS[outcome]
            outcome, reading = known[draft]
            said = outcome != "refused", reading, draft != final
            made.append([float(each) for each in said])
        return torch.tensor(made)


class _Seen:
    """Keeps the pooled state, and beside it the one behind the first position."""

    def __init__(self, positions: Positions) -> None:
        self._pooled = Pooled(positions)

    def __call__(self, look: StepView) -> Tensor:
        return torch.cat([self._pooled(look), look.producing[:, 0].float()], -1)


def draft_steps(how: Drafting, settings: SignalSettings) -> Int[Tensor, "step"]:
    """Return which step of a response is read at each step of the signal."""
    if settings.time == "step":
        return torch.arange(settings.steps).clamp(max=how.n_steps - 1)
    counts = torch.bincount(torch.tensor(how.committed_at), minlength=how.n_steps)
    shares = counts.cumsum(0).double() / len(how.response)
    return steps_at_fractions(shares[None], settings.steps)[0]


def text_of(masked: MaskedModel, draft: Sequence[int]) -> str:
    """Return the text of a draft up to its first stop token."""
    stops = [place for place, token in enumerate(draft) if token in masked.stop_ids]
    end = stops[0] if stops else len(draft)
    return str(
        masked.tokenizer.decode(
            list(draft[:end]),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
    )


def require_no_thinking(masked: MaskedModel, settings: SignalSettings) -> None:
    """Refuse a region that a response which is written all at once does not have."""
    if masked.thinking is not None and settings.region == "answer":
        raise InputError(
            "--region completion with a masked-diffusion model that thinks, whose "
            "thinking and answer are written together",
            "--region answer",
            "Add --region completion.",
        )
