"""Hidden states by step, from one prefill or from replayed denoising."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.dynamics.rows import (
    CHANGED,
    DIFFERENCE,
    PERPLEXITY,
    PROBE,
    READING,
    TEXT,
    Batch,
    Watched,
)
from holdfast.dynamics.settings import SignalSettings
from holdfast.dynamics.signal import (
    AnchorSignal,
    pool_steps,
    positions_of,
    steps_at_fractions,
)
from holdfast.dynamics.trajectories import HARMFUL, HARMLESS, UNPARSED
from holdfast.errors import InputError
from holdfast.judges.degenerate import is_half_decoded
from holdfast.judges.rules.rules import judge
from holdfast.models.decoding.row_state import Drafting
from holdfast.models.decoding.steps import Pooled, Positions, Region, StepView
from holdfast.models.diffusion.replay import Script, replay
from holdfast.models.hidden_states import read_windows, target_losses
from holdfast.models.model import MaskedModel
from holdfast.rollout.rows import Rollout
from holdfast.rollout.session import Session
from holdfast.study.batches import ROW_ID, Batches
from holdfast.study.rows import vectors, vectors_of

Reduce = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the pooled state of a row at each step, the state that a probe reads at each
step, and the state that predicts its first token."""


class Readers(NamedTuple):
    """What is read off the states of a row."""

    anchors: Mapping[str, AnchorSignal]  # By channel, in the coordinates of the mode.
    # Direction and offset of a refusal probe, if the study has one.
    probe: tuple[Float[Tensor, "d_model"], float] | None
    # Direction of the plain logit difference of first answer tokens.
    difference: Float[Tensor, "d_model"] | None

    @property
    def channels(self) -> list[str]:
        """Names of what is read, column by column."""
        others = {PROBE: self.probe, DIFFERENCE: self.difference}
        present = [name for name, each in others.items() if each is not None]
        return [*self.anchors, *present]

    def to(self, device: torch.device) -> "Readers":
        """Return the same where states are computed."""
        return Readers(
            {name: each.to(device) for name, each in self.anchors.items()},
            self.probe and (self.probe[0].float().to(device), self.probe[1]),
            None if self.difference is None else self.difference.float().to(device),
        )

    def read(
        self, means: Tensor, states: Tensor, first: Tensor
    ) -> Float[Tensor, "step channel"]:
        """Return what is read off one row; a `Reduce`."""
        columns = [each.logit(means[None])[0] for each in self.anchors.values()]
        if self.probe is not None:
            direction, offset = self.probe
            columns.append(torch.sigmoid(states @ direction + offset))
        if self.difference is not None:
            columns.append((first @ self.difference).expand(len(means)))
        return torch.stack(columns, -1)


class StateSource(ABC):
    """Where states step by step come from: a prefill, or steps run once more."""

    extras: tuple[str, ...]  # Channels that are not read off states.
    device: torch.device  # Where states are reduced.

    @abstractmethod
    def states(self, batch: Batch, reduce: Reduce) -> Sequence[Tensor]:
        """Return what `reduce` makes of the states of each row."""

    @abstractmethod
    def beside(self, batch: Batch) -> Float[Tensor, "example step channel"]:
        """Return the extras of each row."""

    def pooled(self, batch: Batch) -> dict[str, Float[Tensor, "example _"]]:
        """Return the pooled states of each row, one step after another."""
        means = self.states(batch, lambda means, *_: means)
        return {"states": torch.stack(list(means)).flatten(1)}

    def channels(
        self, batch: Batch, readers: Readers
    ) -> dict[str, Float[Tensor, "example step"]]:
        """Return every channel of each row."""
        read = self.states(batch, readers.to(self.device).read)
        columns = torch.cat([torch.stack(list(read)), self.beside(batch)], -1)
        names = [*readers.channels, *self.extras]
        return dict(zip(names, columns.unbind(-1), strict=True))


def read_batches(
    batches: Batches,
    items: Batch,
    work: Callable[[Batch], Mapping[str, Tensor]],
    label: str,
) -> dict[str, Float[Tensor, "example _"]]:
    """Read rows batch by batch; what `work` returned, by name, for all of them."""

    def tabled(batch: list[Watched]) -> pa.Table:
        columns = {name: vectors(each) for name, each in work(batch).items()}
        return pa.table({ROW_ID: [row.row_id for row, _ in batch]} | columns)

    table = batches.run(
        items,
        tabled,
        name=lambda item: item[0].row_id,
        length=lambda item: len(item[1].token_ids),
        label=label,
    )
    names = [name for name in table.column_names if name != ROW_ID]
    return {name: vectors_of(table, name) for name in names}


def steps_read(
    n: int, settings: SignalSettings, shares: Float[Tensor, "_"] | None = None
) -> Int[Tensor, "step"]:
    """Return which of the `n` states of a row is read at each step.

    `shares`: Share of the response that is settled by each state; by default equal.
    """
    if settings.time == "step":
        return torch.arange(settings.steps).clamp(max=n - 1)
    if shares is None:
        shares = (torch.arange(n, dtype=torch.float64) + 1) / n
    return steps_at_fractions(shares[None], settings.steps)[0]


class Prefill(StateSource):
    """States of answers, each read in one pass: attention is causal."""

    def __init__(self, session: Session, settings: SignalSettings) -> None:
        """Remember how steps are counted."""
        self._session, self._settings = session, settings
        self.extras = (TEXT, PERPLEXITY) if settings.perplexity else (TEXT,)
        self.device = session.adapter.device

    def states(self, batch: Batch, reduce: Reduce) -> Sequence[Tensor]:
        """Return what `reduce` makes of the states of each row."""

        def stepwise(states: Tensor) -> Tensor:
            at = steps_read(len(states), self._settings).to(states.device)
            return reduce(self._pooled(states, at), states[at], states[0])

        return read_windows(
            self._session.adapter,
            [window.token_ids for _, window in batch],
            [window.n for _, window in batch],
            stepwise,
            batch_size=self._session.batch_size,
        )

    def beside(self, batch: Batch) -> Float[Tensor, "example step channel"]:
        """Return the text-level signal, and the perplexity of the prompt if asked."""
        columns = [self._texts(batch)]
        if PERPLEXITY in self.extras:
            losses = _perplexities(self._session, batch)
            columns.append(losses[:, None].expand(-1, self._settings.steps))
        return torch.stack(columns, -1)

    def _pooled(
        self, states: Float[Tensor, "position d_model"], at: Int[Tensor, "step"]
    ) -> Float[Tensor, "step d_model"]:
        """Return the pooled state of a row at each step."""
        settings = self._settings
        by_step = settings.time == "step"
        means = pool_steps(
            states,
            settings.steps if by_step else len(states),
            positions_of(settings.mode, "autoregressive"),
            repeat_last=settings.mode == "repo",
        )
        return means if by_step else means[at]

    def _texts(self, batch: Batch) -> Float[Tensor, "example step"]:
        """Return 0 at each step whose text so far is a refusal, and 1 elsewhere."""
        decode, rows = self._session.adapter.tokenizer.decode, []
        for row, window in batch:
            written = row.token_ids[window.start :]
            counts = (steps_read(window.n, self._settings) + 1).tolist()
            outcomes = {
                n: judge(
                    row.prompt, decode(written[:n], skip_special_tokens=True)
                ).outcome
                for n in set(counts)
            }
            rows.append([float(outcomes[n] != "refused") for n in counts])
        return torch.tensor(rows)


def _perplexities(session: Session, batch: Batch) -> Float[Tensor, "example"]:
    """Return the mean negative log-likelihood of the prompt of each row, in nats."""
    # Not by their names: two samples of a conversation have histories of their own.
    prompts = [row.token_ids[: row.spans.prompt[1]] for row, _ in batch]
    ordered = sorted(set(prompts))
    spans = [(1, len(ids)) for ids in ordered]
    size = session.batch_size
    losses = target_losses(session.adapter, ordered, spans, batch_size=size).tolist()
    by_prompt = dict(zip(ordered, losses, strict=True))
    return torch.tensor([by_prompt[ids] for ids in prompts]).float()


class LiveSignal:
    """An observer that returns the log-odds of compliance of every row at each step.

    It costs one mean and two distances per row, on the device; no state is kept.
    """

    def __init__(
        self, anchors: AnchorSignal, positions: Positions, region: Region = "completion"
    ) -> None:
        """Choose what states are compared with, and which of them."""
        self.anchors = anchors
        self.region = region
        self._pooled = Pooled(positions, region)
        self._steps = torch.empty(0)  # Steps that were taken, per row.

    def __call__(self, look: StepView) -> Float[Tensor, "example"]:
        """Return the log-odds of compliance at this step of each row.

        It is not a number before the region begins, and after the last step that the
        anchors have.
        """
        states = self._pooled(look)
        if look.step == 0:
            self._steps = torch.zeros_like(look.rows)
        counted = look.fresh.any(-1)
        if self.region == "answer":
            counted = counted & look.answering
        step = self._steps[look.rows]
        self._steps[look.rows] = step + counted.long()
        last = self.anchors.n_steps - 1
        logit = self.anchors.logit_at(step.clamp(max=last), states)
        return logit.masked_fill(~counted | (step > last), torch.nan)


_READINGS = {"refused": HARMLESS, "complied": HARMFUL, "partial": HARMFUL}
"""What a draft of each outcome is; of any other it is unparsed."""


class Replay(StateSource):
    """States of answers at the steps that were taken, forward pass by forward pass."""

    extras = TEXT, READING, CHANGED
    device = torch.device("cpu")

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

    def states(self, batch: Batch, reduce: Reduce) -> Sequence[Tensor]:
        """Return what `reduce` makes of the states of each row."""
        known = [(row, self._drafts[row.row_id]) for row, _ in batch]
        scripts = [
            Script(row.token_ids[: row.spans.prompt[1]], how.response, how.committed_at)
            for row, how in known
        ]
        positions = positions_of(self._settings.mode, "diffusion")
        replayed = replay(
            self._masked,
            scripts,
            lambda: _PooledAndFirst(positions),
            batch_size=self._batch_size,
        )
        width, reduced = self._masked.d_model, []
        for states, (_, how) in zip(replayed, known, strict=True):
            means = states[draft_steps(how, self._settings), :width]
            reduced.append(reduce(means, means, states[0, width:]))
        return reduced

    def beside(self, batch: Batch) -> Float[Tensor, "example step channel"]:
        """Return what the rules read in the draft of each step."""
        return torch.stack([self._drafted(row) for row, _ in batch])

    def _drafted(self, row: Rollout) -> Float[Tensor, "step channel"]:
        """Return for each step: no refusal; harmless, harmful or neither; changed."""
        how = self._drafts[row.row_id]
        final = how.drafts[-1]
        known: dict[tuple[int, ...], list[float]] = {}
        rows = []
        for step in draft_steps(how, self._settings).tolist():
            draft = how.drafts[step]
            if draft not in known:
                text = self._text(draft)
                outcome = judge(row.prompt, text).outcome
                # The response itself is read as its verdict says, whole or not.
                broken = draft != final and is_half_decoded(text)
                reading = UNPARSED if broken else _READINGS.get(outcome, UNPARSED)
                columns = outcome != "refused", reading, draft != final
                known[draft] = [float(each) for each in columns]
            rows.append(known[draft])
        return torch.tensor(rows)

    def _text(self, draft: Sequence[int]) -> str:
        """Return the text of a draft up to its first stop token."""
        stops = self._masked.stop_ids
        return str(
            self._masked.tokenizer.decode(
                [*takewhile(lambda token: token not in stops, draft)],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        )


class _PooledAndFirst:
    """Keeps the pooled state, and beside it the one behind the first position."""

    def __init__(self, positions: Positions) -> None:
        self._pooled = Pooled(positions)

    def __call__(self, look: StepView) -> Tensor:
        return torch.cat([self._pooled(look), look.producing[:, 0].float()], -1)


def draft_steps(how: Drafting, settings: SignalSettings) -> Int[Tensor, "step"]:
    """Return which step of a response is read at each step of the signal."""
    counts = torch.bincount(torch.tensor(how.committed_at), minlength=how.n_steps)
    shares = counts.cumsum(0).double() / len(how.response)
    return steps_read(how.n_steps, settings, shares)


def require_no_thinking(masked: MaskedModel, settings: SignalSettings) -> None:
    """Refuse a region that a response which is written all at once does not have."""
    if masked.thinking is not None and settings.region == "answer":
        raise InputError(
            "--region completion with a masked-diffusion model that thinks, whose "
            "thinking and answer are written together",
            "--region answer",
            "Add --region completion.",
        )
