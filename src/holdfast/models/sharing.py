"""Rows that are the same up to some block are read once that far, and then copied.

Where rows differ in nothing but the heads that are scaled in later blocks, everything
before those blocks would be computed again and again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from holdfast.models.parts import Adapter


@contextmanager
def shared_rows(
    adapter: Adapter, layer: int, copy_of: Int[Tensor, "example"]
) -> Iterator[None]:
    """Copy rows in front of a block, for passes over the distinct ones.

    Args:
        adapter: The model.
        layer: The block from which on rows differ.
        copy_of: For each row that is wanted, which of the rows that are read it is.

    Yields:
        Nothing; the hook is gone when the context ends.
    """
    n_read = int(copy_of.max()) + 1

    def copied(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(copied(each) for each in value)
        # Masks and positions may have one row for all, which serves as it is.
        rows = isinstance(value, Tensor) and value.dim() > 1 and len(value) == n_read
        return value[copy_of.to(value.device)] if rows and n_read > 1 else value

    def copy(
        _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = dict(named)
        states = arguments[0] if arguments else named.pop("hidden_states")
        rest = [copied(each) for each in arguments[1:]]
        others = {name: copied(value) for name, value in named.items()}
        return (states[copy_of.to(states.device)], *rest), others

    handle = adapter.layers[layer].register_forward_pre_hook(copy, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def distinct(
    token_ids: Int[Tensor, "example position"],
) -> tuple[Int[Tensor, "_ position"], Int[Tensor, "example"]]:
    """Return the distinct rows, and for each row which of them it is."""
    rows, copy_of = torch.unique(token_ids, dim=0, return_inverse=True)
    return rows, copy_of
