"""Rows in a seeded endless order that is known at every place, so nothing is kept."""

from functools import lru_cache
from typing import Final

import torch

STRIDE: Final = 0x9E3779B97F4A7C15


class Draws:
    """Goes through rows again and again, each time in another order.

    What is drawn at a place depends on seed and place alone. A run that was stopped
    draws on as if it had not been.
    """

    def __init__(self, n: int, seed: int) -> None:
        """Remember what the order depends on.

        Args:
            n: Rows, at least one.
            seed: Seed.
        """
        self._n, self._seed = n, seed
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def take(self, number: int, size: int) -> list[int]:
        """Return the rows of one draw.

        Args:
            number: Draws of this size before it.
            size: Rows a draw.

        Returns:
            Their numbers. A row comes again once all others have come.
        """
        places = range(number * size, (number + 1) * size)
        return [self._order(place // self._n)[place % self._n] for place in places]

    def _shuffled(self, cycle: int) -> list[int]:
        seed = (self._seed * STRIDE + cycle) % 2**63
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self._n, generator=generator).tolist()
