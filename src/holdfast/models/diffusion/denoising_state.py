"""The responses of a batch on their way from masks to text.

Each row has its own length, schedule and random numbers, and attends to no padding.
"""

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from holdfast.models.batching import pad
from holdfast.models.decoding.steps import NOTHING, Step, StepView
from holdfast.models.diffusion.unmasking import (
    Committed,
    Predicted,
    UnmaskingSchedule,
    commit_above,
    commit_best,
    predict,
)
from holdfast.models.finite import check_finite
from holdfast.models.model import MaskedModel

MAX_LOGITS = 1 << 22
"""Logits in float64 that are looked at together, which bounds their memory."""


class Job(NamedTuple):
    """A response that is to be written."""

    place: int  # Which prompt it answers.
    prompt: tuple[int, ...]  # Tokens of the prompt.
    seed: int  # Seed of the row's random numbers.
    length: int  # Tokens of the response.


class _Rows(NamedTuple):
    """What belongs to each row; the first axis of everything is the example."""

    number: Int[Tensor, "example"]
    token_ids: Int[Tensor, "example _"]
    attended: Bool[Tensor, "example _"]
    real: Bool[Tensor, "example position"]
    open: Bool[Tensor, "example position"]
    block: Int[Tensor, "example"]
    quotas: Int[Tensor, "example step"]
    ends: Int[Tensor, "example step"]
    lots: Float[Tensor, "example position"]


class DenoisingState:
    """The rows of a batch that are still being denoised, side by side."""

    def __init__(
        self, masked: MaskedModel, jobs: Sequence[Job], sampler: UnmaskingSchedule
    ) -> None:
        """Put prompts on the left and masks on the right."""
        self.masked, self.sampler = masked, sampler
        # Float64 is missing on some accelerators, and there choices are made here.
        on_cuda = masked.device.type == "cuda"
        self.desk = masked.device if on_cuda else torch.device("cpu")
        self.places = tuple(job.place for job in jobs)
        self.generators = [
            torch.Generator(self.desk).manual_seed(job.seed) for job in jobs
        ]
        self.step = 0
        prompts = pad([job.prompt for job in jobs], "left", masked.device)
        self.start = prompts.token_ids.shape[1]
        plans = [sampler.plan(job.length) for job in jobs]
        lengths = torch.tensor([job.length for job in jobs])
        real = (torch.arange(int(lengths.max())) < lengths[:, None]).to(masked.device)
        masks = torch.full_like(real, masked.mask_id, dtype=torch.long)
        self.rows = _Rows(
            number=torch.arange(len(jobs), device=masked.device),
            token_ids=torch.cat([prompts.token_ids, masks * real], 1),
            attended=torch.cat([prompts.mask, real], 1),
            real=real,
            open=real,
            block=torch.tensor([plan.block for plan in plans], device=self.desk),
            quotas=torch.tensor([plan.quotas for plan in plans], device=self.desk),
            ends=torch.tensor([plan.ends for plan in plans], device=self.desk),
            lots=self._draw_lots(lengths.tolist()),
        )
        self.padded = not bool(self.rows.attended.all())

    def _draw_lots(self, lengths: Sequence[int]) -> Float[Tensor, "example position"]:
        """Draw a priority for every position, once, for random remasking.

        The order of fixed lots is as random as that of lots drawn anew each step.
        """
        lots = torch.zeros(
            len(lengths), max(lengths), dtype=torch.float64, device=self.desk
        )
        if self.sampler.remasking == "random":
            for row, length in enumerate(lengths):
                torch.rand(
                    length, generator=self.generators[row], out=lots[row, :length]
                )
        return lots

    @property
    def done(self) -> bool:
        """Whether every position of every row is committed to."""
        if self.sampler.steps is not None:
            return self.step >= self.sampler.steps
        return not bool(self.rows.open.any())

    def advance(self) -> tuple[StepView, Step, Float[Tensor, "example 2"]]:
        """Run one step: a forward pass, and commitments in each row.

        Returns what an observer may see, the step without an observation, and for each
        row how close it was: the least lead of a token over the second where it was
        committed to, and of the last position that was chosen over the first that was
        not.
        """
        rows, hidden = self.rows, self._forward()
        n_rows, shift = len(rows.number), int(self.masked.shift)
        producing = hidden[:, self.start - shift : hidden.shape[1] - shift]
        where = rows.open.nonzero(as_tuple=True)
        found = self._predict(producing, where)
        confidence = self._spread(found.confidence, where, torch.nan)
        chosen = self._commit(self._spread(found.priority, where, -1.0), confidence)
        gaps = self._spread(found.gaps, where, torch.inf)
        gaps = gaps.masked_fill(~chosen.fresh, torch.inf).amin(-1)
        fresh = chosen.fresh.to(rows.open.device)
        response = rows.token_ids[:, self.start :]
        predicted = response.masked_fill(~rows.real, NOTHING)
        predicted[where] = found.tokens.to(predicted.device)
        response.copy_(torch.where(fresh, predicted, response))
        self.rows = rows._replace(open=rows.open & ~fresh)
        committed = rows.real & ~self.rows.open
        look = StepView(
            kind="diffusion",
            step=self.step,
            rows=rows.number,
            states=hidden[:n_rows, self.start :],
            producing=producing[:n_rows],
            real=rows.real,
            committed=committed,
            fresh=fresh,
            answering=torch.ones_like(rows.number, dtype=torch.bool),
        )
        confidence = confidence.float().to(fresh.device)
        step = Step(
            self.step, self.places, predicted, confidence, committed, fresh, None
        )
        self.step += 1
        return look, step, torch.stack([gaps, chosen.margins], -1)

    def _forward(self) -> Float[Tensor, "_ position d_model"]:
        """Return the last states, with guidance those without the prompt below."""
        token_ids, attended = self.rows.token_ids, self.rows.attended
        if self.sampler.cfg_scale > 0:
            blind = token_ids.clone()
            prompt = attended[:, : self.start]
            blind[:, : self.start][prompt] = self.masked.mask_id
            token_ids = torch.cat([token_ids, blind])
            attended = torch.cat([attended, attended])
        inputs = {}
        if self.padded:
            positions = (attended.long().cumsum(-1) - 1).clamp(min=0)
            inputs = {"attention_mask": attended.long(), "position_ids": positions}
        states: Tensor = self.masked.base(
            input_ids=token_ids, **inputs
        ).last_hidden_state
        return states

    def _predict(
        self,
        producing: Float[Tensor, "_ position d_model"],
        where: tuple[Tensor, ...],
    ) -> Predicted:
        """Predict a token at every open position, a few of them at a time."""
        rows, columns = where
        parts = []
        for part, generator in self._portions(rows):
            here = rows[part], columns[part]
            logits = self._logits(producing[here])
            if self.sampler.cfg_scale > 0:
                blind = self._logits(
                    producing[here[0] + len(self.rows.number), here[1]]
                )
                logits = blind + (self.sampler.cfg_scale + 1) * (logits - blind)
            # The mask is what a position holds while it is open, and no word.
            logits[:, self.masked.mask_id] = -torch.inf
            parts.append(predict(logits, self.sampler, generator))
        return Predicted(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def _portions(
        self, rows: Int[Tensor, "position"]
    ) -> Iterator[tuple[slice, torch.Generator | None]]:
        """Yield open positions in portions; with noise a row each, for its own."""
        if self.sampler.temperature == 0:
            size = max(1, MAX_LOGITS // self.masked.embedding.num_embeddings)
            for begin in range(0, len(rows), size):
                yield slice(begin, begin + size), None
            return
        begin = 0
        counts = torch.bincount(rows, minlength=len(self.rows.number)).tolist()
        for count, generator in zip(counts, self.generators, strict=True):
            if count:
                yield slice(begin, begin + count), generator
            begin += count

    def _logits(
        self, states: Float[Tensor, "position d_model"]
    ) -> Float[Tensor, "position vocab"]:
        logits: Tensor = self.masked.lm_head(states).to(self.desk, torch.float64)
        check_finite(logits.sum(), f"logits at step {self.step} of the denoising")
        return logits

    def _spread(
        self, values: Tensor, where: tuple[Tensor, ...], elsewhere: float
    ) -> Float[Tensor, "example position"]:
        spread = values.new_full(self.rows.open.shape, elsewhere)
        spread[tuple(index.to(self.desk) for index in where)] = values
        return spread

    def _commit(
        self,
        priority: Float[Tensor, "example position"],
        confidence: Float[Tensor, "example position"],
    ) -> Committed:
        rows, sampler = self.rows, self.sampler
        still = rows.open.to(self.desk)
        columns = torch.arange(still.shape[1], device=self.desk)
        if sampler.threshold is not None:
            # A block is worked on until it is finished, however long that takes.
            end = (still.int().argmax(-1) // rows.block + 1) * rows.block
            allowed = still & (columns < end[:, None])
            return commit_above(confidence, allowed, sampler.threshold)
        if sampler.remasking == "random":
            priority = rows.lots
        allowed = still & (columns < rows.ends[:, self.step, None])
        return commit_best(priority, allowed, rows.quotas[:, self.step])

    def drop_finished(self) -> None:
        """Take rows out once half of them are done, which changes no other."""
        going = self.rows.open.any(-1)
        if 2 * int(going.sum()) > len(self.places):
            return
        self.rows = _Rows(*(values[going.to(values.device)] for values in self.rows))
        keep = going.tolist()
        self.places = tuple(compress(self.places, keep))
        self.generators = list(compress(self.generators, keep))
