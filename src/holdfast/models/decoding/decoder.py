"""The rows of a batch while they decode, around one key-value cache.

Each row still draws every token by itself, from the logits after its own tokens and
with its own random number; a draft only makes it possible to have the logits of many
steps from one pass. Where a row draws something else, the rest of its draft is
forgotten. So a draft cannot change a row, but for rounding, as another batch may.

Source: greedy and sampled speculative decoding, https://arxiv.org/abs/2211.17192,
with a known text in place of a small model, and with the random number of each step
fixed beforehand, so that rows are the same and not only equally likely.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.models.batching import pad
from holdfast.models.decoding.jobs import Job
from holdfast.models.decoding.kv_cache import (
    Opening,
    expect,
    keep_prefixes,
    keeps_all_tokens,
    preallocated_cache,
    without_padding,
)
from holdfast.models.decoding.row_state import (
    Choice,
    Chosen,
    GenerationState,
    Sampling,
    StoppingRules,
    sample_token,
    uniforms_of,
)
from holdfast.models.decoding.step_attention import stepping
from holdfast.models.interventions import LiveEdit, distinct, shared_rows
from holdfast.models.model import Adapter


class Drawn(NamedTuple):
    """What one step drew, and from what."""

    # After the final norm, of the last token that was read.
    states: Float[Tensor, "example d_model"]
    logits: Float[Tensor, "example vocab"]  # What the token was drawn from.
    # The token each row took; a forced one may stand for the drawn one.
    tokens: Int[Tensor, "example 1"]
    going: tuple[bool, ...]  # Whether each row was still being written.


def begin_row(job: Job) -> GenerationState:
    """Return the row of a job before anything is written."""
    return GenerationState(job.place, job.prompt, job.rules)


Control = Callable[
    [Sequence[GenerationState], Float[Tensor, "example d_model"], LiveEdit],
    Mapping[int, int],
]
"""Who may act between the reading of a token and the choice of the next: from the rows
of the batch, the state of the last token that each has read and the edit at work, to
the tokens that some rows have to take, by their number in the batch. It may end a row
(`finish`); rows that have ended run along and are not to be looked at."""
WASTED = 0.1
"""Steps of a whole batch that finished rows may cost before they are taken out."""


class Decoder:
    """The rows of a batch that are still in the cache, side by side."""

    def __init__(
        self,
        adapter: Adapter,
        rules: StoppingRules,
        jobs: Sequence[Job],
        live: LiveEdit,
        *,
        step_attention: bool = False,
        control: Control | None = None,
        begin: Callable[[Job], GenerationState] = begin_row,
    ) -> None:
        """Put the prompts side by side; nothing is read yet.

        `step_attention`: Whether the model's attention is that of `step_attention`.
        `control`: Who may act on rows at every pass.
        `begin`: Makes the row of a job.
        """
        self.adapter, self.step_attention = adapter, step_attention
        self.control = control
        self.live = live
        self.rows = [begin(job) for job in jobs]
        self.drafts = [job.draft for job in jobs]
        batch = pad([job.prompt for job in jobs], "left", adapter.device)
        self.token_ids, self.positions = batch.token_ids, batch.positions()
        self.mask = batch.mask.long()
        self.live.take([job.place for job in jobs])
        self.cache: Any = preallocated_cache(adapter.model.config)
        # Steps that rows ran along after their end, as a share of the batch.
        self.wasted = 0.0
        # State of the last token of each prompt, once these have been read.
        self.prompt_states: Float[Tensor, "example d_model"] | None = None
        self.step, self._reads_states = 0, adapter.lacks("states") is None
        # Float64 is missing on some accelerators, and there choices are made here.
        self.desk = adapter.device if adapter.device.type == "cuda" else "cpu"
        self.sampling = rules.sampling
        # No row goes beyond the context, whatever budget was asked for.
        steps = min(rules.budget, adapter.max_positions)
        uniforms = [uniforms_of(job.seed, steps) for job in jobs]
        self.uniforms = torch.stack(uniforms).to(self.desk)

    def advance(self) -> Drawn:
        """Run one step: a forward pass, then one token for each row."""
        self.live.locate(self.positions)
        # The first pass reads prompts, and the cache is empty before it.
        step = self.step_attention and self.cache.get_seq_length() > 0
        with stepping(self.cache) if step else nullcontext():
            states, logits = self._read()
        forced = self.control(self.rows, states, self.live) if self.control else {}
        chosen = self.choose(logits.to(self.desk, torch.float32))
        # One table, so that an accelerator is waited for once a step.
        table = torch.stack([chosen.tokens.double(), *chosen[1:]], -1).tolist()
        going = tuple([row.finish is None for row in self.rows])
        taken = [
            # A finished row runs along, unread, until the cache is compacted.
            0
            if row.finish
            else row.push(
                Choice(forced[number], torch.inf, torch.inf)
                if number in forced
                else Choice(int(token), gap, margin)
            )
            for number, (row, (token, gap, margin)) in enumerate(
                zip(self.rows, table, strict=True)
            )
        ]
        self.token_ids = torch.tensor(taken, device=self.mask.device)[:, None]
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], -1)
        self.step += 1
        return Drawn(states, logits, self.token_ids, going)

    def choose(self, logits: Float[Tensor, "example vocab"]) -> Chosen:
        """Choose the next token of each row, on the device where choices are made."""
        return sample_token(logits, self.uniforms[:, self.step], self.sampling)

    def _read(self) -> tuple[Tensor, Tensor]:
        """Run one pass; return state and logits of the last token of each row."""
        inputs = {
            "input_ids": self.token_ids,
            "attention_mask": self.mask,
            "position_ids": self.positions,
            "past_key_values": self.cache,
            "use_cache": True,
        }
        if self._reads_states:
            states = self.adapter.base(**inputs).last_hidden_state[:, -1]
            return states, self.adapter.lm_head(states)
        # Of some models the logits are known, and not which state they come from.
        logits = self.adapter.model(**inputs, logits_to_keep=1).logits[:, -1]
        return logits[:, :0], logits

    def read_prompts(self, opening: Opening | None = None) -> list[GenerationState]:
        """Read prompts and drafts in one pass; return the rows that end within them.

        `opening`: What all prompts begin with, if that is read already.
        """
        # Padding on the right needs no mask, which is the fast path of attention.
        start = 0 if opening is None else opening.length
        read = [
            (*row.token_ids[start:], *draft[:-1])
            for row, draft in zip(self.rows, self.drafts, strict=True)
        ]
        batch = pad(read, "right", self.adapter.device)
        self.live.locate(batch.positions())
        # Up to the first block with a scaled head, the same tokens are the same row.
        rows, copy_of = distinct(batch.token_ids)
        first = min(self.live.columns, default=self.adapter.n_layers - 1)
        # Where all rows begin alike, one line of keys stands for all of them.
        if opening is not None:
            config = self.adapter.model.config
            self.cache, first = opening.cache(config, len(rows)), self.adapter.n_layers
        expect(self.cache, rows.shape[1] + start)
        # One line of positions for all rows, so that layers may have more of them.
        places = torch.arange(rows.shape[1], device=rows.device)[None] + start
        share = shared_rows(self.adapter, first, copy_of)
        with share if first < self.adapter.n_layers else nullcontext():
            states = self.adapter.base(
                input_ids=rows,
                position_ids=places,
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
        if first == self.adapter.n_layers:
            states = states[copy_of.to(states.device)]
        starts = torch.tensor([row.n_prompt - 1 - start for row in self.rows])
        lines = torch.arange(len(states), device=states.device)
        self.prompt_states = states[lines, starts.to(states.device)]
        take_drafts(
            self.adapter,
            states,
            starts,
            self.rows,
            self.drafts,
            self.uniforms,
            self.sampling,
        )
        return self.begin_steps(
            lambda keep: keep_prefixes(
                self.cache, keep, self._lengths(), copy_of, first
            )
        )

    def begin_steps(
        self, keep_rows: Callable[[Int[Tensor, "_"]], Tensor]
    ) -> list[GenerationState]:
        """Go on step by step with rows that have drawn; return those that have ended.

        `keep_rows`: Keeps rows of the cache, without the token that each drew last,
        and returns where their tokens lie.
        """
        keep, finished = self._part()
        if self.rows:
            past = keep_rows(keep)
            self.live.take([row.index for row in self.rows])
            self.token_ids = torch.tensor([[row.token_ids[-1]] for row in self.rows])
            self.token_ids = self.token_ids.to(self.mask.device)
            self.positions = self._lengths()[:, None]
            self.mask = torch.cat([past, torch.ones_like(past[:, :1])], -1).long()
            steps = torch.tensor([row.n_written for row in self.rows])[:, None]
            steps = steps + torch.arange(self.uniforms.shape[1])
            # Only rows that have ended look beyond their last number.
            steps = steps.clamp(max=self.uniforms.shape[1] - 1).to(self.desk)
            self.uniforms = self.uniforms[keep.to(self.desk)].gather(1, steps)
        return finished

    def _lengths(self) -> Int[Tensor, "example"]:
        """Return how many tokens of each row have been read."""
        lengths = torch.tensor([len(row.token_ids) - 1 for row in self.rows])
        return lengths.to(self.mask.device)

    def join(self, other: "Decoder") -> None:
        """Take in the rows of another decoder, whose prompts and drafts were read."""
        self.rows = [*self.rows, *other.rows]
        self.live.take([row.index for row in self.rows])
        if not other.rows:
            return
        for layer, added in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.join(added)
        self.mask = _side_by_side(self.mask, other.mask, -1)
        self.token_ids = torch.cat([self.token_ids, other.token_ids])
        self.positions = torch.cat([self.positions, other.positions])
        # Turned round, as random numbers are missing at the end of a row.
        mine, others = (
            each.uniforms[:, each.step :].flip(-1) for each in (self, other)
        )
        self.uniforms = _side_by_side(mine, others, -1).flip(-1)
        self.step = 0

    def expect(self, n_rows: int) -> None:
        """Let the cache have room for what is left to write, and for so many rows."""
        left = max(row.longest - len(row.token_ids) for row in self.rows)
        expect(self.cache, self.mask.shape[1] - 1 + left, n_rows)

    def drop_finished(self) -> list[GenerationState]:
        """Take finished rows out of the cache once they cost more than that.

        Where a cache can only be copied whole, that is once they are half of it.
        """
        over = sum([row.finish is not None for row in self.rows])
        self.wasted += over / len(self.rows)
        in_place = keeps_all_tokens(self.cache)
        enough = self.wasted >= WASTED if in_place else 2 * over >= len(self.rows)
        if not over or not (enough or over == len(self.rows)):
            return []
        self.wasted = 0.0
        keep, finished = self._part(in_place=in_place)
        if not self.rows:
            return finished
        self.live.take([row.index for row in self.rows])
        self.token_ids = self.token_ids[keep]
        self.positions = self.positions[keep]
        self.uniforms = self.uniforms[keep.to(self.uniforms.device)]
        if in_place:
            moved = keep != torch.arange(len(keep), device=keep.device)
            to, of = moved.nonzero()[:, 0], keep[moved]
            for layer in self.cache.layers:
                place = layer.keys.device
                layer.move_rows(to.to(place), of.to(place), len(keep))
        else:
            # The one way to choose rows that every kind of layer has.
            self.cache.reorder_cache(keep)
        self.mask = without_padding(self.cache, self.mask[keep])
        return finished

    def _part(
        self, *, in_place: bool = False
    ) -> tuple[Int[Tensor, "_"], list[GenerationState]]:
        """Keep the rows that go on; return which they were, and those that ended.

        `in_place`: Put the last of those that go on in the places of those that ended,
        and leave the others where they are.
        """
        going = [index for index, row in enumerate(self.rows) if row.finish is None]
        finished = [row for row in self.rows if row.finish is not None]
        if in_place:
            stay = [index for index in going if index < len(going)]
            last = iter(going[len(stay) :])
            held = set(stay)
            going = [i if i in held else next(last) for i in range(len(going))]
        self.rows = [self.rows[index] for index in going]
        keep = torch.tensor(going, dtype=torch.long, device=self.mask.device)
        return keep, finished


def _side_by_side(one: Tensor, other: Tensor, axis: int) -> Tensor:
    """Join rows of two batches, zeros in front of the shorter ones."""
    width = max(one.shape[axis], other.shape[axis])
    padded = []
    for rows in (one, other):
        missing = list(rows.shape)
        missing[axis] = width - rows.shape[axis]
        padded.append(torch.cat([rows.new_zeros(missing), rows], axis))
    return torch.cat(padded)


MAX_LOGITS = 1 << 24
"""Logits that are looked at together, which bounds their memory."""


def take_drafts(
    adapter: Adapter,
    states: Float[Tensor, "example position d_model"],
    starts: Int[Tensor, "example"],
    rows: Sequence[GenerationState],
    drafts: Sequence[Sequence[int]],
    uniforms: Float[Tensor, "example step"],
    sampling: Sampling,
) -> None:
    """Let each row draw along its draft, until it draws something else or ends.

    `states`: After the final norm, of each prompt and all of its draft but the last
    token, padded on the right.
    `starts`: Where the last token of each prompt stands.
    `uniforms`: Random numbers of each row, on the device where choices are made.
    """
    ends = torch.tensor([max(1, len(draft)) for draft in drafts])
    following, step = list(range(len(rows))), 0
    while following:
        vocab = adapter.model.config.get_text_config().vocab_size
        stop = step + max(1, MAX_LOGITS // (len(following) * vocab))
        stop = min(stop, int(ends[following].max()))
        places = starts[following, None] + torch.arange(step, stop)
        # A row whose draft has ended is looked at no more.
        places = places.clamp(max=states.shape[1] - 1).to(states.device)
        chosen_rows = torch.tensor(following, device=states.device)
        logits = adapter.lm_head(states[chosen_rows[:, None], places])
        chosen = sample_token(
            logits.flatten(0, 1).to(uniforms.device, torch.float32),
            uniforms[chosen_rows.to(uniforms.device), step:stop].flatten(),
            sampling,
        )
        table = torch.stack([chosen.tokens.double(), *chosen[1:]], -1)
        shape = (len(following), stop - step, 3)
        still = []
        for row, choices in zip(following, table.reshape(shape).tolist(), strict=True):
            if _follow(rows[row], drafts[row], choices, step):
                still.append(row)
        following, step = still, stop


def _follow(
    row: GenerationState,
    draft: Sequence[int],
    choices: Sequence[Sequence[float]],
    step: int,
) -> bool:
    """Take choices while they are those of the draft; return whether to go on."""
    for at, (token, gap, margin) in enumerate(choices, step):
        drawn = row.push(Choice(int(token), gap, margin))
        if row.finish is not None or at + 1 >= len(draft) or drawn != draft[at]:
            return False
    return True
