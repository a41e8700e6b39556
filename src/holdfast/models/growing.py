"""A cache that grows without being copied at every step.

The cache of transformers joins old and new keys at each token, which copies all of
them; for a small model that is a large part of a step. Here there is room for tokens
to come, and the layer shows as much of it as is used: the same numbers, bit for bit.
"""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens that a layer makes room for when it is full."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of the cache with room for tokens to come."""

    def __init__(self) -> None:
        """Start without any room."""
        super().__init__()
        self._rooms: tuple[Tensor, Tensor] | None = None
        self._shown: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values of new tokens, and return those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        used = self.keys.shape[-2]
        total = used + key_states.shape[-2]
        rooms = self._rooms_for(total)
        for room, new in zip(rooms, (key_states, value_states), strict=True):
            room[..., used:total, :] = new
        self.keys, self.values = (room[..., :total, :] for room in rooms)
        self._rooms, self._shown = rooms, (self.keys, self.values)
        return self.keys, self.values

    def _rooms_for(self, total: int) -> tuple[Tensor, Tensor]:
        """Return room for so many tokens, with those that are there."""
        rooms, shown = self._rooms, self._shown
        # Whoever takes rows out of the cache puts other tensors in its place.
        same = shown and self.keys is shown[0] and self.values is shown[1]
        if rooms is not None and same and total <= rooms[0].shape[-2]:
            return rooms
        made = []
        for old in (self.keys, self.values):
            *front, used, width = old.shape
            room = torch.zeros(
                (*front, total + ROOM, width), dtype=old.dtype, device=old.device
            )
            room[..., :used, :] = old
            made.append(room)
        return made[0], made[1]


def growing_cache(config: Any) -> DynamicCache:
    """Return an empty cache for a model, whose layers that keep all tokens grow.

    Args:
        config: Configuration of the model.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        GrowingLayer() if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache


def without_padding(
    cache: DynamicCache, mask: Int[Tensor, "example position"]
) -> Int[Tensor, "example _"]:
    """Take away what is padding in all rows, once those that needed it are gone.

    Args:
        cache: The cache; it is changed, unless a layer of it forgets tokens, which
            counts places itself.
        mask: 1 at the tokens of each row, the one that is read next included.

    Returns:
        The mask of what is left.
    """
    if any(layer.is_sliding for layer in cache.layers):
        return mask
    lead = int((mask.cumsum(-1) == 0).sum(-1).min())
    if lead:
        for layer in cache.layers:
            layer.keys = layer.keys[..., lead:, :]
            layer.values = layer.values[..., lead:, :]
    return mask[:, lead:]
