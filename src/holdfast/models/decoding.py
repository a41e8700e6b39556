"""The rows of a batch while they are written left to right, around one cache."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.models.batching import pad
from holdfast.models.choices import choose, uniforms_of
from holdfast.models.drafts import keep_prefixes, take_drafts
from holdfast.models.edits import LiveEdit
from holdfast.models.growing import growing_cache, without_padding
from holdfast.models.parts import Adapter
from holdfast.models.rows import Choice, Row, Rules
from holdfast.models.sharing import distinct, shared_rows


class Job(NamedTuple):
    """A row that is to be written.

    Attributes:
        place: Which prompt it follows.
        prompt: Tokens of the prompt.
        seed: Seed of the row's random numbers.
        draft: What it will probably say; may be empty.
        rules: When its thinking closes and it ends.
    """

    place: int
    prompt: tuple[int, ...]
    seed: int
    draft: tuple[int, ...]
    rules: Rules

    @property
    def read(self) -> tuple[int, ...]:
        """What the first pass reads; the last token of a draft is only compared."""
        return (*self.prompt, *self.draft[:-1])


class Tick(NamedTuple):
    """What one forward pass of a batch did.

    Attributes:
        finished: Rows that it ended.
        written: Tokens that it wrote, over all rows.
        read: Tokens that it read, padding included.
        is_prompt: Whether it read the prompts.
    """

    finished: int
    written: int
    read: int
    is_prompt: bool


class Drawn(NamedTuple):
    """What one step drew, and from what.

    Attributes:
        states: After the final norm, of the last token that was read.
        logits: What the token was drawn from.
        tokens: The token each row took; a forced one may stand for the drawn one.
        going: Whether each row was still being written.
    """

    states: Float[Tensor, "example d_model"]
    logits: Float[Tensor, "example vocab"]
    tokens: Int[Tensor, "example 1"]
    going: tuple[bool, ...]


class Decoder:
    """The rows of a batch that are still in the cache, side by side."""

    def __init__(
        self, adapter: Adapter, rules: Rules, jobs: Sequence[Job], live: LiveEdit
    ) -> None:
        """Put the prompts side by side; nothing is read yet.

        Args:
            adapter: The model.
            rules: What all rows have in common; each job has its own within them.
            jobs: The rows to write.
            live: The edit that is in force.
        """
        self.adapter = adapter
        self.live = live
        self.rows = [Row(job.place, job.prompt, job.rules) for job in jobs]
        self.drafts = [job.draft for job in jobs]
        batch = pad([job.prompt for job in jobs], "left", adapter.device)
        self.token_ids, self.positions = batch.token_ids, batch.positions()
        self.mask = batch.mask.long()
        self.cache: Any = growing_cache(adapter.model.config)
        self.step = 0
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
        states = self.adapter.base(
            input_ids=self.token_ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        logits = self.adapter.lm_head(states)
        chosen = choose(
            logits.to(self.desk, torch.float32),
            self.uniforms[:, self.step],
            self.sampling,
        )
        # One table, so that an accelerator is waited for once a step.
        table = torch.stack([chosen.tokens.double(), *chosen[1:]], -1).tolist()
        going = tuple(row.finish is None for row in self.rows)
        taken = [
            # A finished row runs along, unread, until the cache is compacted.
            0 if row.finish else row.push(Choice(int(token), gap, margin))
            for row, (token, gap, margin) in zip(self.rows, table, strict=True)
        ]
        self.token_ids = torch.tensor(taken, device=self.mask.device)[:, None]
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], -1)
        self.step += 1
        return Drawn(states, logits, self.token_ids, going)

    def check_drafts(self) -> list[Row]:
        """Read all drafts in one pass, and return the rows that end within them."""
        # Padding on the right needs no mask, which is the fast path of attention.
        read = [
            (*row.token_ids, *draft[:-1])
            for row, draft in zip(self.rows, self.drafts, strict=True)
        ]
        batch = pad(read, "right", self.adapter.device)
        self.live.locate(batch.positions())
        # Up to the first block with a scaled head, the same tokens are the same row.
        rows, copy_of = distinct(batch.token_ids)
        first = min(self.live.columns, default=self.adapter.n_layers - 1)
        with shared_rows(self.adapter, first, copy_of):
            states = self.adapter.base(
                input_ids=rows, past_key_values=self.cache, use_cache=True
            ).last_hidden_state
        taken = take_drafts(
            self.adapter, states, self.rows, self.drafts, self.uniforms, self.sampling
        )
        going = [place for place, row in enumerate(self.rows) if row.finish is None]
        finished = [row for row in self.rows if row.finish is not None]
        self.rows = [self.rows[place] for place in going]
        if going:
            keep = torch.tensor(going, device=self.mask.device)
            lengths = torch.tensor([len(row.token_ids) - 1 for row in self.rows])
            lengths = lengths.to(self.mask.device)
            past = keep_prefixes(self.cache, keep, lengths, copy_of, first)
            self.live.keep(keep)
            self.token_ids = torch.tensor([[row.token_ids[-1]] for row in self.rows])
            self.token_ids = self.token_ids.to(self.mask.device)
            self.positions = lengths[:, None]
            self.mask = torch.cat([past, torch.ones_like(past[:, :1])], -1).long()
            places = torch.tensor([taken[place] for place in going])[:, None]
            places = places + torch.arange(self.uniforms.shape[1])
            # Only rows that have ended look beyond their last number.
            places = places.clamp(max=self.uniforms.shape[1] - 1).to(self.desk)
            self.uniforms = self.uniforms[keep.to(self.desk)].gather(1, places)
        return finished

    def drop_finished(self) -> list[Row]:
        """Take finished rows out of the cache once they are half of it."""
        going = [place for place, row in enumerate(self.rows) if row.finish is None]
        if 2 * len(going) > len(self.rows):
            return []
        finished = [row for row in self.rows if row.finish is not None]
        self.rows = [self.rows[place] for place in going]
        if going:
            keep = torch.tensor(going, device=self.mask.device)
            self.cache.batch_select_indices(keep)
            self.live.keep(keep)
            self.token_ids = self.token_ids[keep]
            self.positions = self.positions[keep]
            self.mask = without_padding(self.cache, self.mask[keep])
            self.uniforms = self.uniforms[keep.to(self.uniforms.device)]
        return finished
