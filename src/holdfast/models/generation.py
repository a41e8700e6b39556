"""Batched decoding whose results do not depend on the plan of the batches.

Every row draws from its own random numbers, one a step, whatever stands beside it.
Rows are padded on the left, share one cache, and leave it when they are done. What a
model's `generation_config` says about sampling is not used, only its stop tokens.

Where it is known what a row will probably say, that draft is read in one pass and
kept as far as the row would have drawn it itself: the same rows, in fewer passes.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from holdfast.errors import InputError, SettingsError
from holdfast.models.batching import halving_batches, longest_first, pad
from holdfast.models.choices import choose, uniforms_of
from holdfast.models.drafts import fits_drafts, keep_prefixes, take_drafts
from holdfast.models.edits import HeadEdit, LiveEdit, editing
from holdfast.models.growing import growing_cache, without_padding
from holdfast.models.parts import Adapter
from holdfast.models.rows import Choice, Completion, Row, Rules, Sampling
from holdfast.models.sharing import distinct, shared_rows

__all__ = ["Completion", "Sampling", "generate", "stop_tokens"]


class _Job(NamedTuple):
    place: int
    prompt: tuple[int, ...]
    seed: int
    draft: tuple[int, ...]

    @property
    def read(self) -> tuple[int, ...]:
        """What the first pass reads; the last token of a draft is only compared."""
        return (*self.prompt, *self.draft[:-1])


def generate(
    adapter: Adapter,
    prompts: Sequence[tuple[str | Sequence[int], int]],
    sampling: Sampling,
    *,
    batch_size: int = 32,
    stop_ids: Collection[int] | None = None,
    edit: HeadEdit | None = None,
    thinking_done: bool = False,
    drafts: Sequence[Sequence[int]] | None = None,
) -> Iterator[list[Completion]]:
    """Complete prompts, batch by batch, the longest prompts first.

    Args:
        adapter: The model.
        prompts: Rendered prompts, as text or tokens, each with the seed of its row.
            Text is tokenised without special tokens, since templates write them.
        sampling: How tokens are drawn, and how many.
        batch_size: Rows decoded together; halved whenever memory runs out.
        stop_ids: Tokens that end a row; those of the model by default.
        edit: Heads to scale while decoding; its ranges, if it has any, are one for
            each prompt and count the tokens of that row from 0, and so are its
            tables of factors, if it has several.
        thinking_done: Whether the prompts hold their thinking and its end, so that
            the answer begins at once. Spans count all of it as prompt then.
        drafts: Tokens that probably follow each prompt, such as those that followed
            it without the edit. They make rows faster and change none; where
            they could not be kept from it they are not used (see `fits_drafts`).

    Returns:
        An iterator over batches of completions; `index` gives the order of the
        prompts. A row depends on its prompt, its seed and `sampling` alone, except
        where a choice was closer than rounding (`min_top2_gap`, `min_margin`).

    Raises:
        InputError: If a prompt is empty or leaves no room for `sampling`, if there
            is no tokenizer, or if nothing is known to stop a row. Raised before
            anything is decoded.
        SettingsError: If the batch size is not positive, or the edit does not fit.
        EnvironmentProblem: If one row alone does not fit in memory.
    """
    if adapter.tokenizer is None:
        raise InputError(
            "a tokenizer to read prompts and write answers",
            f"none with {adapter.identity.model_id}",
            "Give `adapt` the tokenizer of the model.",
        )
    stops = stop_tokens(adapter) if stop_ids is None else frozenset(stop_ids)
    if not stops:
        raise InputError(
            "a token that ends an answer",
            "none in the model's generation_config or tokenizer",
            "Add `eos_token_id` to the model's generation_config.json.",
        )
    _check_rows(edit, drafts, len(prompts))
    thinking = None if thinking_done else adapter.thinking
    rules = Rules(adapter.tokenizer, thinking, sampling, stops)
    known = drafts if drafts is not None and fits_drafts(adapter, edit) else ()
    jobs = [
        _job(adapter, rules, index, prompt, seed, known[index] if known else ())
        for index, (prompt, seed) in enumerate(prompts)
    ]
    ordered = [jobs[i] for i in longest_first([job.read for job in jobs])]
    batches = halving_batches(
        lambda batch: _decode(adapter, rules, batch, edit), ordered, batch_size
    )
    return (completions for completions, _ in batches)


def stop_tokens(adapter: Adapter) -> frozenset[int]:
    """Return the tokens that end an answer, by generation_config and tokenizer."""
    configured = adapter.model.generation_config.eos_token_id
    if configured is None:
        configured = []
    elif isinstance(configured, int):
        configured = [configured]
    of_tokenizer = getattr(adapter.tokenizer, "eos_token_id", None)
    found = {int(token) for token in configured}
    return frozenset(found if of_tokenizer is None else {*found, int(of_tokenizer)})


def _job(
    adapter: Adapter,
    rules: Rules,
    index: int,
    prompt: str | Sequence[int],
    seed: int,
    draft: Sequence[int],
) -> _Job:
    token_ids: Sequence[int]
    if isinstance(prompt, str):
        token_ids = adapter.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        token_ids = prompt
    room = adapter.max_positions - rules.budget
    if not 0 < len(token_ids) <= room:
        raise InputError(
            f"prompts of 1 to {room} tokens, which leaves room for "
            f"{rules.budget} more in the model's {adapter.max_positions}",
            f"{len(token_ids)} tokens in prompt {index}",
            "Shorten the prompt, or lower the limits on thinking and answer.",
        )
    return _Job(index, tuple(token_ids), seed, tuple(draft[: rules.budget]))


class _Decoder:
    """The rows of a batch that are still in the cache, side by side."""

    def __init__(
        self, adapter: Adapter, rules: Rules, jobs: Sequence[_Job], live: LiveEdit
    ) -> None:
        self.adapter = adapter
        self.live = live
        self.rows = [Row(job.place, job.prompt, rules) for job in jobs]
        self.drafts = [job.draft for job in jobs]
        batch = pad([job.prompt for job in jobs], "left", adapter.device)
        self.token_ids, self.positions = batch.token_ids, batch.positions()
        self.mask = batch.mask.long()
        self.cache: Any = growing_cache(adapter.model.config)
        self.step = 0
        # Float64 is missing on some accelerators, and there choices are made here.
        self.desk = adapter.device if adapter.device.type == "cuda" else "cpu"
        self.sampling = rules.sampling
        uniforms = [uniforms_of(job.seed, rules.budget) for job in jobs]
        self.uniforms = torch.stack(uniforms).to(self.desk)

    def advance(self) -> None:
        """Run one step: a forward pass, then one token for each row."""
        self.live.locate(self.positions)
        logits = self.adapter.model(
            input_ids=self.token_ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        chosen = choose(
            logits.to(self.desk, torch.float32),
            self.uniforms[:, self.step],
            self.sampling,
        )
        # One table, so that an accelerator is waited for once a step.
        table = torch.stack([chosen.tokens.double(), *chosen[1:]], -1).tolist()
        taken = [
            # A finished row runs along, unread, until the cache is compacted.
            0 if row.finish else row.push(Choice(int(token), gap, margin))
            for row, (token, gap, margin) in zip(self.rows, table, strict=True)
        ]
        self.token_ids = torch.tensor(taken, device=self.mask.device)[:, None]
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], -1)
        self.step += 1

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


@torch.inference_mode()
def _decode(
    adapter: Adapter, rules: Rules, jobs: Sequence[_Job], edit: HeadEdit | None
) -> list[Completion]:
    finished: list[Row] = []
    with editing(adapter, edit, [job.place for job in jobs]) as live:
        decoder = _Decoder(adapter, rules, jobs, live)
        if any(job.draft for job in jobs):
            finished += decoder.check_drafts()
        while decoder.rows:
            decoder.advance()
            finished += decoder.drop_finished()
    completions = {row.index: row.complete() for row in finished}
    return [completions[job.place] for job in jobs]


def _check_rows(
    edit: HeadEdit | None, drafts: Sequence[Sequence[int]] | None, n_prompts: int
) -> None:
    n_rows = edit.n_rows() if edit is not None else None
    if n_rows not in (None, n_prompts):
        raise SettingsError(
            f"one range of positions, or table of factors, for each of {n_prompts} "
            "prompts",
            f"{n_rows} in the edit",
            "Give each prompt its own, or edit all alike.",
        )
    if drafts is not None and len(drafts) != n_prompts:
        raise SettingsError(
            f"one draft for each of {n_prompts} prompts",
            f"{len(drafts)} drafts",
            "Give an empty one where nothing is known.",
        )
