"""Caches of keys and values: with room for tokens to come, and shared by many passes.

The cache of transformers joins old and new keys at each token, which copies all of
them; for a small model that is a large part of a step. Here there is room for tokens
to come, and the layer shows as much of it as is used: the same numbers, bit for bit.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from holdfast.models.batching import pad
from holdfast.models.interventions import scale_heads
from holdfast.models.model import Adapter

ROOM = 64
"""Most tokens that a layer makes room for when it is full."""
LEAD = 8
"""Padding in front of all rows is dropped once it is this part of the columns."""


@dataclass
class Room:
    """What one step reads of a cache: all of its room, where a mask hides the rest."""

    columns: int  # Tokens that there is room for.
    used: int  # Tokens that are there, the one that is read included.
    mask: Tensor | None = None  # What is added to scores, once a model asks for it.


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of the cache with room for tokens, and rows, to come.

    Attributes:
        room: The room of the step that is being run, if it is read whole.
        longest: Most tokens that will be here, if that is known.
        n_rows: Rows that room is made for, where more are to join.
    """

    def __init__(self) -> None:
        """Start without any room."""
        super().__init__()
        self.room: Room | None = None
        self.longest: int | None = None
        self.n_rows = 0
        self._rooms: tuple[Tensor, Tensor] | None = None
        self._shown: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values of new tokens, and return those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        used, count = self.keys.shape[-2], len(self.keys)
        total = used + key_states.shape[-2]
        rooms = self._rooms_for(total)
        for room, new in zip(rooms, (key_states, value_states), strict=True):
            room[:count, :, used:total] = new
        self._show(count, total)
        # Whoever was handed no mask for the whole room must not be shown it.
        if self.room is not None and self.room.mask is not None:
            return rooms[0][:count], rooms[1][:count]
        return self.keys, self.values

    def move_rows(self, to: Tensor, of: Tensor, count: int) -> None:
        """Put rows in the place of others, and keep the first ones.

        Nothing else is copied; the room is let go when it is full.
        """
        used = self.keys.shape[-2]
        for room in self._rooms_for(used):
            room[to] = room[of]
        self._show(count, used)

    def join(self, other: "PreallocatedLayer") -> None:
        """Take in the rows of another layer, behind these.

        All end at the same column, so that zeros stand in front of the shorter ones.
        Only the new rows are copied, as long as there is room.
        """
        before, added = len(self.keys), other.keys.shape[-2]
        count, end = before + len(other.keys), max(self.keys.shape[-2], added)
        rooms = self._rooms_for(end, count, end)
        for room, new in zip(rooms, (other.keys, other.values), strict=True):
            rows = room[before:count]
            rows[..., : end - added, :] = 0
            rows[..., end - added : end, :] = new
            rows[..., end:, :] = 0
        self._show(count, end)

    def make_room(self, count: int) -> int:
        """Make room for tokens to come, and return for how many there is room now."""
        used = self.keys.shape[-2]
        rooms = self._rooms_for(used + count)
        self._show(len(self.keys), used)
        return int(rooms[0].shape[-2])

    def drop_room(self) -> None:
        """Hold nothing but keys and values, for whoever puts others in their place."""
        self._rooms = self._shown = None

    def _show(self, count: int, used: int) -> None:
        """Let keys and values be what is used of the room."""
        assert self._rooms is not None
        self.keys, self.values = (room[:count, :, :used] for room in self._rooms)
        self._shown = self.keys, self.values

    def _rooms_for(
        self, total: int, count: int = 0, end: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return room for so many tokens, and rows, with those that are there.

        `end`: Column at which those shall end; by default where they do.
        """
        used, count = self.keys.shape[-2], max(count, len(self.keys))
        end = used if end is None else end
        shown = self._shown
        # Whoever takes rows out of the cache puts other tensors in its place.
        same = shown and self.keys is shown[0] and self.values is shown[1]
        if self._rooms is not None and same and end == used:
            rows, _, columns, _ = self._rooms[0].shape
            if count <= rows and total <= columns:
                return self._rooms
        self._rooms = None
        keys = self._copied(self.keys, total, count, end)
        self.keys = keys[: len(self.keys), :, :used]
        self._rooms = keys, self._copied(self.values, total, count, end)
        self._show(len(self.keys), end)
        return self._rooms

    def _copied(self, old: Tensor, total: int, count: int, end: int) -> Tensor:
        """Return room with what is there, in front of a column.

        Little more than is asked for, since a step may read all of it, but more where
        the tokens are many, so that they are seldom copied; and room for all that will
        be here, where that is near.
        """
        rows, heads, used, width = old.shape
        more = min(ROOM, max(ROOM // 4, total // 8))
        if self.longest is not None and self.longest - total <= ROOM:
            more = max(0, self.longest - total)
        room = old.new_empty((max(count, self.n_rows), heads, total + more, width))
        # Hidden by a mask, but no numbers would be seen through it.
        room[:rows, :, : end - used] = 0
        room[:rows, :, end - used : end] = old
        room[:rows, :, end:] = 0
        return room


def preallocated_cache(config: Any) -> DynamicCache:
    """Return an empty cache with room, in the layers that keep all tokens."""
    cache = DynamicCache(config=config)
    cache.layers = [
        PreallocatedLayer() if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache


def expect(cache: Any, n_tokens: int, n_rows: int = 0) -> None:
    """Tell a cache how many tokens and rows it will come to, so that it has room."""
    for layer in cache.layers:
        if isinstance(layer, PreallocatedLayer):
            layer.longest, layer.n_rows = n_tokens, n_rows


class Opening(NamedTuple):
    """What all prompts begin with, read once."""

    length: int  # Tokens.
    layers: tuple[tuple[Tensor, Tensor], ...]  # Keys and values of one row.

    def cache(self, config: Any, n_rows: int) -> DynamicCache:
        """Return a cache of so many rows that have read it."""
        cache = preallocated_cache(config)
        for layer, (keys, values) in zip(cache.layers, self.layers, strict=True):
            layer.lazy_initialization(keys, values)
            # One row in memory; the first tokens that follow make it one for each.
            layer.keys = keys.expand(n_rows, -1, -1, -1)
            layer.values = values.expand(n_rows, -1, -1, -1)
        return cache


LEAST_SAVED = 256
"""Tokens that an opening must save to be read by itself."""


def read_opening(adapter: Adapter, prompts: Sequence[Sequence[int]]) -> Opening | None:
    """Read what all prompts begin with; None where that saves little.

    At least one token of each prompt is left. All layers must keep all tokens.
    """
    rows = sorted(map(tuple, prompts))
    first, last = rows[0], rows[-1]
    same = [a == b for a, b in zip(first, last, strict=False)]
    length = (*same, False).index(False)
    length = min(length, min(map(len, prompts)) - 1)
    if length * (len(prompts) - 1) < LEAST_SAVED:
        return None
    cache: Any = DynamicCache(config=adapter.model.config)
    tokens = torch.tensor([list(first[:length])], device=adapter.device)
    adapter.base(input_ids=tokens, past_key_values=cache, use_cache=True)
    return Opening(length, tuple((each.keys, each.values) for each in cache.layers))


def keeps_all_tokens(cache: Any) -> bool:
    """Return whether every layer of a cache holds keys and values of all tokens.

    A sliding window has forgotten some, and a state-space layer holds none of them.
    """
    return all(
        type(layer) in (DynamicLayer, PreallocatedLayer) for layer in cache.layers
    )


def without_padding(
    cache: DynamicCache, mask: Int[Tensor, "example position"]
) -> Int[Tensor, "example _"]:
    """Drop leading columns that have become padding in all rows.

    `mask`: 1 at the tokens of each row, the one that is read next included.
    """
    if not keeps_all_tokens(cache):
        return mask
    lead = int((mask.cumsum(-1) == 0).sum(-1).min())
    # All that is left is copied for it, so that a few columns are not worth it.
    if not lead or LEAD * lead < mask.shape[1]:
        return mask
    for layer in cache.layers:
        layer.keys = layer.keys[..., lead:, :]
        layer.values = layer.values[..., lead:, :]
    return mask[:, lead:]


def keep_prefixes(
    cache: Any,
    rows: Int[Tensor, "example"],
    lengths: Int[Tensor, "example"],
    copy_of: Int[Tensor, "_"],
    first: int,
) -> Bool[Tensor, "example position"]:
    """Forget all rows but these, and of these all that follows their first tokens.

    `copy_of`: Which of the distinct rows each row is.
    `first`: The block from which on the cache has all rows, and not distinct ones.

    Returns:
        Where the tokens lie now: padded on the left, as before a first step.
    """
    width = int(lengths.max())
    steps = torch.arange(width, device=lengths.device)
    columns = (lengths[:, None] - width + steps).clamp(min=0)
    for place, layer in enumerate(cache.layers):
        lines = rows if place >= first else copy_of[rows]
        here = lines.to(layer.keys.device)[:, None], columns.to(layer.keys.device)
        keys, values = layer.keys, layer.values
        if isinstance(layer, PreallocatedLayer):
            layer.drop_room()
        layer.keys = keys[here[0], :, here[1]].transpose(1, 2)
        del keys
        layer.values = values[here[0], :, here[1]].transpose(1, 2)
    return steps >= width - lengths[:, None]


class RepeatedPrefix:
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
            self._read(token_ids, self.cache, 1)
            more = torch.ones_like(token_ids, dtype=torch.bool)
            self.mask = torch.cat([self.mask, more], -1)
            self.last = self.last + token_ids.shape[1]

    def final_states(
        self,
        token_ids: Int[Tensor, "example position"],
        tables: Float[Tensor, "table layer head"],
    ) -> Float[Tensor, "example table d_model"]:
        """Return the state after tokens that follow, under each table of factors."""
        cache, n = copy.deepcopy(self.cache), len(tables)
        rows = torch.arange(len(token_ids), device=token_ids.device)
        cache.reorder_cache(rows.repeat_interleave(n))
        factors = tables.repeat(len(token_ids), 1, 1)
        with scale_heads(self.adapter, factors):
            states = self._read(token_ids, cache, n)
        return states[:, -1].reshape(len(token_ids), n, -1)

    def _read(
        self, token_ids: Int[Tensor, "example position"], cache: Any, n_copies: int
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
            states = self.adapter.base(
                **rows, past_key_values=cache, use_cache=True
            ).last_hidden_state
        return states


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


class SharedPrefix:
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
        length, shared = token_ids.shape[1], _ReadOnlyCache(self.cache)
        factors = tables.repeat_interleave(length, 0)
        with scale_heads(self.adapter, factors, positions=True):
            states: Tensor = self.adapter.base(
                **self._inputs(token_ids, len(tables)),
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
