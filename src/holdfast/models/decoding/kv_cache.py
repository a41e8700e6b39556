"""Caches of keys and values with room for tokens, and rows, to come.

The cache of transformers joins old and new keys at each token, which copies all of
them; for a small model that is a large part of a step. Here there is room for tokens
to come, and the layer shows as much of it as is used: the same numbers, bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

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
