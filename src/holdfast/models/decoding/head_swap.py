"""Put what heads write in one run into another, while the model runs.

As for scaling, the place is the *input* of the output projection, where the heads lie
side by side: gates and factors of a family in front of it belong to the head.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from holdfast.errors import SettingsError
from holdfast.models.model import Adapter

KEEP = -1
"""In `HeadSwap.take`: the head stays as this pass computes it."""


@dataclass(frozen=True, eq=False)
class HeadSwap:
    """What is put in the place of heads, for copies of the same tokens."""

    # Which source each head of each copy is taken from, or `KEEP`.
    take: Int[Tensor, "copy layer head"]
    # By layer: the heads side by side, as another run has written them.
    sources: Mapping[int, Float[Tensor, "source example position _"]]
    # Where a source has something to give; elsewhere a head stays as it is.
    known: Bool[Tensor, "source example position"]

    def __post_init__(self) -> None:
        """Refuse a source that is not there."""
        most = int(self.take.max())
        if not KEEP <= int(self.take.min()) <= most < len(self.known):
            raise SettingsError(
                f"sources from 0 to {len(self.known) - 1}, or {KEEP} for none",
                f"{int(self.take.min())} to {most}",
                "Give what each source has written.",
            )

    def of(self, copies: slice) -> "HeadSwap":
        """Return the same for some of the copies."""
        return HeadSwap(self.take[copies], self.sources, self.known)

    @property
    def layers(self) -> list[int]:
        """Layers in which a head is exchanged."""
        return torch.argwhere((self.take != KEEP).any(-1).any(0))[:, 0].tolist()


@contextmanager
def swap_heads(
    adapter: Adapter, swap: HeadSwap, positions: slice = slice(None)
) -> Iterator[None]:
    """Exchange heads for as long as the context lasts.

    The copies of a row follow on each other, as rows of a batch or side by side along
    its positions; both are the same numbers in the same order.

    `positions`: Which of the positions of the sources the next pass reads.

    Raises:
        AdapterError: If heads of this model cannot be read.
    """
    adapter.require("heads")
    with ExitStack() as stack:
        for layer in swap.layers:
            hook = _Exchange(adapter, swap, layer, positions)
            projection = adapter.output_projection(layer)
            stack.enter_context(projection.register_forward_pre_hook(hook))
        yield


class _Exchange:
    """The hook of one layer; masks are made once, since a pass has many layers."""

    def __init__(
        self, adapter: Adapter, swap: HeadSwap, layer: int, positions: slice
    ) -> None:
        sources = swap.sources[layer][:, :, positions]
        take = swap.take[:, layer].repeat_interleave(adapter.head_widths[layer], -1)
        self.sources = sources
        self.take = take.to(sources.device)
        self.known = swap.known[:, :, positions].to(sources.device)
        self.used = sorted(set(swap.take[:, layer].flatten().tolist()) - {KEEP})

    def __call__(
        self, _: nn.Module, arguments: tuple[Any, ...]
    ) -> tuple[Tensor, Any] | tuple[Any, ...]:
        heads, *rest = arguments
        n_rows, n_copies = self.known.shape[1], len(self.take)
        # [row, copy, position, heads], whichever way the copies lie.
        apart = heads.reshape(n_rows, n_copies, -1, heads.shape[-1])
        for source in self.used:
            taken = (self.take == source)[None, :, None]
            taken = taken & self.known[source][:, None, :, None]
            given = self.sources[source][:, None].to(apart)
            apart = torch.where(taken, given, apart)
        return (apart.reshape(heads.shape), *rest)


@contextmanager
def record_heads(adapter: Adapter) -> Iterator[dict[int, list[Tensor]]]:
    """Keep what heads write, pass by pass, for as long as the context lasts.

    Yields:
        By layer with heads, `[example, position, heads]` of each pass.

    Raises:
        AdapterError: If heads of this model cannot be read.
    """
    adapter.require("heads")
    found: dict[int, list[Tensor]] = {each: [] for each in adapter.layers_with_heads}
    with ExitStack() as stack:
        for layer, passes in found.items():

            def keep(
                _: nn.Module, arguments: tuple[Any, ...], passes: list[Tensor] = passes
            ) -> None:
                # The tensor itself, which the projection reads and nobody writes.
                passes.append(arguments[0].detach())

            projection = adapter.output_projection(layer)
            stack.enter_context(projection.register_forward_pre_hook(keep))
        yield found
