"""Prompts that share most of their tokens: what they share is read once.

A trunk is a sequence that many prompts follow for a while, each up to its own place:
a thinking that is cut at several places, and answered several times from each. Its
keys and values are cropped for every prompt, so that only what stands behind the place
is read again.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from holdfast.models.batching import pad
from holdfast.models.decoding.decoder import Decoder, take_drafts
from holdfast.models.decoding.jobs import Job
from holdfast.models.decoding.kv_cache import expect, preallocated_cache
from holdfast.models.decoding.row_state import GenerationState
from holdfast.models.model import Adapter

Trunk = tuple[int, ...]
AHEAD = 8
"""Trunks that are read side by side."""


class Trunks:
    """The trunks of prompts, each read when the first of its prompts is."""

    def __init__(
        self, adapter: Adapter, of: Sequence[Trunk], jobs: Sequence[Job]
    ) -> None:
        """Remember which prompt follows which trunk; nothing is read yet.

        `of`: The trunk of each prompt, by its place.
        `jobs`: The prompts in the order in which they will be asked for.
        """
        self.adapter, self._of = adapter, of
        self._left = Counter(of[job.place] for job in jobs)
        self._waiting = list(dict.fromkeys(of[job.place] for job in jobs))
        self._read: dict[Trunk, list[tuple[Tensor, Tensor]]] = {}

    def of(self, job: Job) -> Trunk:
        """Return the trunk of a prompt."""
        return self._of[job.place]

    def layers(self, trunk: Trunk) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of a trunk, layer by layer, in one row."""
        if trunk not in self._read:
            # In the order in which they are needed, so it is among the first.
            self._waiting.remove(trunk)
            batch = [trunk, *self._waiting[: AHEAD - 1]]
            self._waiting = self._waiting[AHEAD - 1 :]
            self._read |= zip(batch, self._rows(batch), strict=True)
        return self._read[trunk]

    def done(self, jobs: Sequence[Job]) -> None:
        """Let go of trunks whose prompts have all been read."""
        self._left.subtract(self.of(job) for job in jobs)
        for trunk in [each for each in self._read if self._left[each] <= 0]:
            del self._read[trunk]

    def _rows(self, trunks: Sequence[Trunk]) -> list[list[tuple[Tensor, Tensor]]]:
        """Read trunks in one pass; padding behind them needs no mask."""
        batch = pad(trunks, "right", self.adapter.device)
        places = torch.arange(batch.token_ids.shape[1], device=self.adapter.device)
        cache: Any = DynamicCache(config=self.adapter.model.config)
        self.adapter.base(
            input_ids=batch.token_ids,
            position_ids=places[None],
            past_key_values=cache,
            use_cache=True,
        )
        return [
            [
                # Copied, so that a trunk that is done frees its memory.
                (each.keys[row, :, :n].clone(), each.values[row, :, :n].clone())
                for each in cache.layers
            ]
            for row, n in enumerate(map(len, trunks))
        ]


def read_branches(
    decoder: Decoder, jobs: Sequence[Job], trunks: Trunks
) -> list[GenerationState]:
    """Read prompts behind their trunks, and draw the first token of each.

    What `Decoder.read_prompts` does, and the same rows but for rounding; prompts with
    drafts have no trunk. Equal prompts are read once.

    Returns: The rows that have ended.
    """
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    trunk_of = {job.prompt: trunks.of(job) for job in jobs}
    # All are read by as many tokens, so that those of a trunk's end may be read again.
    count = max(len(each) - _common(each, trunk_of[each]) for each in prompts)
    starts = [len(each) - count for each in prompts]
    if min(starts) < 0:
        trunks.done(jobs)
        return decoder.read_prompts()
    width, device = max(starts), decoder.mask.device
    cache = _cropped(decoder.adapter, trunks, [*map(trunk_of.get, prompts)], starts)
    trunks.done(jobs)
    lengths = torch.tensor(starts, device=device)[:, None]
    steps = torch.arange(width + count, device=device)
    mask = (steps >= width - lengths).long()
    tokens = [each[start:] for each, start in zip(prompts, starts, strict=True)]
    expect(cache, width + count)
    states = decoder.adapter.base(
        input_ids=torch.tensor(tokens, device=device),
        attention_mask=mask,
        position_ids=lengths + torch.arange(count, device=device),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1:]
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    copy_of = torch.tensor([row_of[job.prompt] for job in jobs], device=device)
    decoder.cache = cache
    states = states[copy_of.to(states.device)]
    decoder.prompt_states = states[:, 0]
    take_drafts(
        decoder.adapter,
        states,
        torch.zeros(len(jobs), dtype=torch.long),
        decoder.rows,
        decoder.drafts,
        decoder.uniforms,
        decoder.sampling,
    )
    return decoder.begin_steps(lambda keep: _grow(cache, mask, copy_of[keep]))


def _common(prompt: Sequence[int], trunk: Sequence[int]) -> int:
    """Return the length of what a prompt shares with its trunk, without its end."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, trunk, strict=False))
    return min(sum(1 for _ in same), len(prompt) - 1)


def _cropped(
    adapter: Adapter, trunks: Trunks, of: Sequence[Any], lengths: Sequence[int]
) -> Any:
    """Return a cache of the first tokens of trunks, padded on the left."""
    cache: Any = preallocated_cache(adapter.model.config)
    width, known = max(lengths), [trunks.layers(trunk) for trunk in of]
    for place, layer in enumerate(cache.layers):
        rows = [layers[place] for layers in known]
        for name, columns in zip(
            ("keys", "values"), zip(*rows, strict=True), strict=True
        ):
            one = columns[0]
            made = one.new_zeros((len(rows), one.shape[0], width, one.shape[-1]))
            for row, (column, n) in enumerate(zip(columns, lengths, strict=True)):
                made[row, :, width - n :] = column[:, :n]
            if name == "keys":
                keys = made
        layer.lazy_initialization(keys, made)
        layer.keys, layer.values = keys, made
    return cache


def _grow(cache: Any, mask: Tensor, lines: Tensor) -> Tensor:
    """Make one row of the cache for each prompt; return where its tokens lie."""
    for layer in cache.layers:
        keys, values, here = layer.keys, layer.values, lines.to(layer.keys.device)
        layer.drop_room()
        layer.keys, layer.values = keys[here], values[here]
    return mask[lines]
