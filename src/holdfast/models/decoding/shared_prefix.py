"""Batches that are read up to some position once, and read on from many times."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from holdfast.models.batching import pad
from holdfast.models.decoding.head_swap import HeadSwap, record_heads, swap_heads
from holdfast.models.interventions import scale_heads
from holdfast.models.model import Adapter

MAX_BYTES = 1 << 30
"""Most bytes that copies of tokens may take beside the prefix they are read behind."""
Around = Callable[[slice], AbstractContextManager[Any]]
"""What is at work while tokens that follow are read; told which of them come next."""


class _Prefix:
    """What both kinds of prefix do alike."""

    adapter: Adapter

    def record(
        self, token_ids: Int[Tensor, "example position"]
    ) -> tuple[
        Float[Tensor, "example d_model"],
        dict[int, Float[Tensor, "example position _"]],
    ]:
        """Return the state after tokens that follow, and what heads write on the way.

        The tokens are not kept. Heads lie side by side, by layer.
        """
        with record_heads(self.adapter) as found:
            states = self._read_on(token_ids, 1, lambda _: nullcontext())
        return states[:, 0], {
            layer: torch.cat(passes, 1) for layer, passes in found.items()
        }

    def swapped_states(
        self, token_ids: Int[Tensor, "example position"], swap: HeadSwap
    ) -> Float[Tensor, "example copy d_model"]:
        """Return the state after tokens that follow, with heads of other runs.

        The tokens are not kept.
        """

        def around(positions: slice) -> AbstractContextManager[Any]:
            return swap_heads(self.adapter, swap, positions)

        return self._read_on(token_ids, len(swap.take), around)

    def _read_on(
        self, token_ids: Int[Tensor, "example position"], n_copies: int, around: Around
    ) -> Float[Tensor, "example copy d_model"]:
        """Return the state after each copy of tokens that follow; they are not kept."""
        raise NotImplementedError


class RepeatedPrefix(_Prefix):
    """A batch that has been read up to some position, and is read on from many times.

    Its cache is copied for every reading, row by row: any kind of layer can do that.
    """

    def __init__(self, adapter: Adapter, rows: Sequence[Sequence[int]]) -> None:
        """Read the rows up to their end."""
        batch = pad(rows, "left", adapter.device)
        self.adapter = adapter
        self.cache: Any = DynamicCache(config=adapter.model.config)
        self.mask, self.last = batch.mask, batch.positions()[:, -1:]
        inputs = {"attention_mask": batch.mask.long(), "input_ids": batch.token_ids}
        inputs["position_ids"] = batch.positions()
        adapter.base(**inputs, past_key_values=self.cache, use_cache=True)

    def extend(self, token_ids: Int[Tensor, "example position"]) -> None:
        """Read tokens that follow."""
        if token_ids.shape[1]:
            self._read(token_ids, self.cache, 1, lambda _: nullcontext())
            more = torch.ones_like(token_ids, dtype=torch.bool)
            self.mask = torch.cat([self.mask, more], -1)
            self.last = self.last + token_ids.shape[1]

    def final_states(
        self,
        token_ids: Int[Tensor, "example position"],
        tables: Float[Tensor, "table layer head"],
    ) -> Float[Tensor, "example table d_model"]:
        """Return the state after tokens that follow, under each table of factors."""
        factors = tables.repeat(len(token_ids), 1, 1)
        with scale_heads(self.adapter, factors):
            return self._read_on(token_ids, len(tables), lambda _: nullcontext())

    def _read_on(
        self, token_ids: Int[Tensor, "example position"], n_copies: int, around: Around
    ) -> Float[Tensor, "example copy d_model"]:
        cache = copy.deepcopy(self.cache)
        rows = torch.arange(len(token_ids), device=token_ids.device)
        cache.reorder_cache(rows.repeat_interleave(n_copies))
        states = self._read(token_ids, cache, n_copies, around)
        return states[:, -1].reshape(len(token_ids), n_copies, -1)

    def _read(
        self,
        token_ids: Int[Tensor, "example position"],
        cache: Any,
        n_copies: int,
        around: Around,
    ) -> Float[Tensor, "_ 1 d_model"]:
        """Read tokens one by one; return the states after the last.

        Several at a time behind a cache start anew in some state-space layers.
        """
        mask, states = self.mask, torch.empty(0)
        for step in range(token_ids.shape[1]):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
            inputs = {
                "input_ids": token_ids[:, step : step + 1],
                "attention_mask": mask.long(),
                "position_ids": self.last + step + 1,
            }
            rows = {k: v.repeat_interleave(n_copies, 0) for k, v in inputs.items()}
            with around(slice(step, step + 1)):
                states = self.adapter.base(
                    **rows, past_key_values=cache, use_cache=True
                ).last_hidden_state
        return states


def copies_at_once(
    prefix: "SharedPrefix | RepeatedPrefix", length: int, max_bytes: int = MAX_BYTES
) -> int:
    """Return how many copies of so many tokens are read in one pass."""
    # Tokens of other copies are masked, not skipped: no more of them than tokens of
    # the prefix, or most of the attention would be for nothing.
    few = max(1, prefix.mask.shape[1] // length)
    return min(few, max(1, max_bytes // _bytes_per_copy(prefix, length)))


def _bytes_per_copy(prefix: "SharedPrefix | RepeatedPrefix", length: int) -> int:
    # Attention scores where no kernel spares them, and the width of the layers.
    adapter, context = prefix.adapter, prefix.mask.shape[1] + length
    config = adapter.model.config.get_text_config()
    width = 4 * getattr(config, "intermediate_size", 4 * adapter.d_model)
    scores = adapter.n_heads * context
    copied = 0
    if isinstance(prefix, RepeatedPrefix):
        # Keys and values of every layer are copied, as for heads of their own.
        copied = 2 * adapter.n_heads * sum(adapter.head_widths) * context
    return int(len(prefix.mask) * 4 * (length * (2 * scores + width) + copied))


def read_prefix(
    adapter: Adapter, rows: Sequence[Sequence[int]]
) -> "SharedPrefix | RepeatedPrefix":
    """Read rows up to their end, into one cache that is shared as far as it can be."""
    kinds = {type(layer) for layer in DynamicCache(config=adapter.model.config).layers}
    config = adapter.model.config
    masks = config._attn_implementation in ("sdpa", "eager")
    # Chunks have a mask of their own, and are cached as windows are.
    types = getattr(config.get_text_config(), "layer_types", None) or ()
    masks = masks and "chunked_attention" not in types
    shared = masks and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
    return (SharedPrefix if shared else RepeatedPrefix)(adapter, rows)


class SharedPrefix(_Prefix):
    """A batch that has been read up to some position, and is read on from many times.

    Copies of the tokens that follow stand side by side over the one cache, which is
    never copied, and a mask keeps each copy's tokens to themselves.
    """

    def __init__(self, adapter: Adapter, rows: Sequence[Sequence[int]]) -> None:
        """Read the rows up to their end."""
        batch = pad(rows, "left", adapter.device)
        self.adapter = adapter
        # Every layer keeps all of its keys; windows are drawn in the masks.
        self.cache: Any = DynamicCache()
        self.mask = batch.mask
        self.positions = batch.positions()
        adapter.base(**batch.inputs(), past_key_values=self.cache, use_cache=True)

    def extend(self, token_ids: Int[Tensor, "example position"]) -> None:
        """Read tokens that follow."""
        if token_ids.shape[1]:
            inputs = self._inputs(token_ids, 1)
            self.adapter.base(**inputs, past_key_values=self.cache, use_cache=True)
            more = torch.ones_like(token_ids, dtype=torch.bool)
            self.mask = torch.cat([self.mask, more], -1)
            self.positions = torch.cat([self.positions, inputs["position_ids"]], -1)

    def final_states(
        self,
        token_ids: Int[Tensor, "example position"],
        tables: Float[Tensor, "table layer head"],
    ) -> Float[Tensor, "example table d_model"]:
        """Return the state after tokens that follow, under each table of factors.

        The tokens are not kept.
        """
        factors = tables.repeat_interleave(token_ids.shape[1], 0)
        with scale_heads(self.adapter, factors, positions=True):
            return self._read_on(token_ids, len(tables), lambda _: nullcontext())

    def _read_on(
        self, token_ids: Int[Tensor, "example position"], n_copies: int, around: Around
    ) -> Float[Tensor, "example copy d_model"]:
        length, shared = token_ids.shape[1], _ReadOnlyCache(self.cache)
        with around(slice(0, length)):
            states: Tensor = self.adapter.base(
                **self._inputs(token_ids, n_copies),
                past_key_values=shared,
                use_cache=True,
            ).last_hidden_state
        return states[:, length - 1 :: length]

    def _inputs(
        self, token_ids: Int[Tensor, "example position"], n_copies: int
    ) -> dict[str, Any]:
        """Return the arguments for a pass over copies of tokens that follow."""
        n_rows, length = token_ids.shape
        steps = torch.arange(length, device=token_ids.device)
        after = (self.positions[:, -1:] + 1 + steps).repeat(1, n_copies)
        copies = torch.arange(n_copies, device=token_ids.device)
        copy_of = copies.repeat_interleave(length)
        own = (copy_of[:, None] == copy_of) & (after[:1, :, None] >= after[:1, None])
        before = self.mask[:, None].expand(n_rows, len(copy_of), -1)
        seen = torch.cat([before, own.expand(n_rows, -1, -1)], -1)
        distance = after[..., None] - torch.cat([self.positions, after], -1)[:, None]
        return {
            "input_ids": token_ids.repeat(1, n_copies),
            "attention_mask": _masks(self.adapter, seen[:, None], distance[:, None]),
            "position_ids": after,
        }


def _masks(
    adapter: Adapter,
    seen: Bool[Tensor, "example 1 position _"],
    distance: Int[Tensor, "example 1 position _"],
) -> Any:
    """Return the mask of the model's layers, or one for each of their types."""
    kinds = {
        layer.sliding_window if layer.is_sliding else None
        for layer in DynamicCache(config=adapter.model.config).layers
    }
    hidden = torch.finfo(adapter.dtype).min
    masks = {}
    for window in kinds:
        name = "full_attention" if window is None else "sliding_attention"
        near = seen if window is None else seen & (distance < window)
        # Added to the scores, which every kernel with a mask understands.
        added = torch.zeros(near.shape, dtype=adapter.dtype, device=near.device)
        masks[name] = added.masked_fill_(~near, hidden)
    return masks if len(masks) > 1 else next(iter(masks.values()))


class _ReadOnlyCache(Cache):  # type: ignore[misc]
    """A cache that is read many times and never written.

    What a pass adds is joined for that pass alone, layer by layer.
    """

    def __init__(self, cache: Any) -> None:
        super().__init__(layers=list(cache.layers))

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *arguments: Any,
        **named: Any,
    ) -> Any:
        """Return the prefix and these tokens, side by side, and keep neither."""
        layer = copy.copy(self.layers[layer_idx])
        return layer.update(key_states, value_states, *arguments, **named)
