"""What takes the sink mass of a forward pass, layer by layer."""

from collections.abc import Collection, Mapping
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from holdfast.errors import InputError, ModelError

ARGUMENT: Final = "sink_probe"
"""Argument of a forward pass that takes the probe."""


class SinkProbe:
    """Takes the sink mass of one forward pass (see `holdfast.models.attention`).

    The sink is the first real token of each row. A query that cannot see it (padding,
    and late queries of a sliding window) has no part in a mean. Means are taken in
    float32, whatever the model runs in.

    Attributes:
        sink: Place of the sink in each row, `[example]`.
        counted: Queries that are averaged where they see the sink,
            `[example, position]`.
    """

    def __init__(
        self,
        mask: Bool[Tensor, "example position"],
        *,
        counted: Bool[Tensor, "example position"] | None = None,
        layers: Collection[int] | None = None,
        by_position: bool = False,
    ) -> None:
        """Find the sinks.

        Args:
            mask: True at real tokens; padding may be on either side.
            counted: Queries to average. Default: all real ones. The sink, which can
                look at nothing but itself, is never counted.
            layers: Blocks to look at, from 0; the others run plain attention.
                Default: all.
            by_position: Keep the mass of every query as well, for `positions`.

        Raises:
            InputError: If a row has no real token.
        """
        if not bool(mask.any(-1).all()):
            raise InputError(
                "a real token in every row", "a row of padding", "Leave that row out."
            )
        self.sink = mask.long().argmax(-1)
        place = torch.arange(mask.shape[1], device=mask.device)
        chosen = mask if counted is None else mask & counted
        self.counted = chosen & (place != self.sink[:, None])
        self._mask, self._by_position = mask, by_position
        self._layers = None if layers is None else frozenset(layers)
        self._with_gradient = torch.is_grad_enabled()
        self._means: dict[int, Tensor] = {}
        self._seen: dict[int, Tensor] = {}
        self._positions: dict[int, Tensor] = {}
        self._markers: dict[tuple[Any, ...], Tensor] = {}

    def mass(self) -> Float[Tensor, "example layer head"]:
        """Return the mean sink mass of every head, with its gradient.

        A row none of whose counted queries sees the sink of a layer has mass 0 there;
        `seen` tells it from a head that looks elsewhere.

        Raises:
            ModelError: If a layer has not handed in its mass.
        """
        return self._stacked(self._means)

    def seen(self) -> Int[Tensor, "example layer"]:
        """Return how many queries the mean of each row and layer is over.

        Raises:
            ModelError: As `mass`.
        """
        return self._stacked(self._seen)

    def positions(self) -> Float[Tensor, "example layer head position"]:
        """Return the sink mass of every query; 0 where it does not see the sink.

        What stands at padding means nothing.

        Raises:
            InputError: If the probe was made without `by_position`.
            ModelError: As `mass`.
        """
        if not self._by_position:
            raise InputError(
                "a probe that keeps positions",
                "one that keeps means alone",
                "Make it with by_position=True.",
            )
        return self._stacked(self._positions)

    def wants(self, layer: int) -> bool:
        """Return whether a block, counted from 0, is looked at."""
        return self._layers is None or layer in self._layers

    def check(
        self, query: Tensor, key: Tensor, layer: int, places: Tensor | None
    ) -> None:
        """Refuse a pass that is not one whole pass over the rows of the mask.

        Args:
            query: Queries of a layer, `[example, head, position, d_head]`.
            key: Its keys.
            layer: Block, counted from 0.
            places: Positions of the tokens, where the model hands them on.

        Raises:
            InputError: If shapes differ, rows hold several sequences, or the probe
                has been through a pass.
            ModelError: If no gradient will reach the mass, though it was asked for.
        """
        rows, length = self._mask.shape
        if (query.shape[0], query.shape[2], key.shape[2]) != (rows, length, length):
            raise InputError(
                f"one pass over all {length} positions of {rows} rows",
                f"{query.shape[2]} queries and {key.shape[2]} keys in "
                f"{query.shape[0]} rows",
                "Run the rows of the mask whole, with use_cache=False.",
            )
        if layer in self._means and not _in_backward():
            raise InputError(
                "a probe for each forward pass",
                "one that has taken a pass already",
                "Make another SinkProbe.",
            )
        if self._with_gradient and not torch.is_grad_enabled():
            raise ModelError(
                "a forward pass that records gradients, as where the probe was made",
                "one that does not",
                "Checkpoint activations with use_reentrant=False; or make the probe "
                "under no_grad as well.",
            )
        if not self._means and places is not None and self._are_packed(places):
            raise InputError(
                "one sequence a row, with positions that count its tokens",
                "rows in which positions start anew",
                "Give each sequence a row of its own, padded.",
            )

    def marker(self, value: Tensor, width: int) -> Tensor:
        """Return channels to put beside the values, the first marking the sink.

        Args:
            value: Values of a layer, `[example, head, position, d_head]`.
            width: Channels to add.
        """
        key = (value.device, value.dtype, width)
        if key not in self._markers:
            rows, _, length, _ = value.shape
            made = value.new_zeros((rows, 1, length, width))
            at = torch.arange(rows, device=value.device)
            made[at, 0, self.sink.to(value.device), 0] = 1
            self._markers[key] = made
        return self._markers[key].expand(-1, value.shape[1], -1, -1)

    def take(self, layer: int, mass: Tensor, visible: Tensor | None) -> None:
        """Take the attention weight of the sink in one layer.

        Args:
            layer: Block, counted from 0.
            mass: The weight at every query, `[example, position, head]`.
            visible: Queries that see the sink, `[example, position]`; None if all
                real ones do.
        """
        counted = self.counted.to(mass.device)
        if visible is not None:
            counted = counted & visible
        seen = counted.sum(-1)
        exact = mass.float()
        mean = (exact * (counted / seen.clamp(min=1)[:, None])[:, :, None]).sum(1)
        # Gradient checkpointing runs a layer again, and what comes then is no news.
        if layer in self._means:
            return
        self._means[layer], self._seen[layer] = mean, seen
        if self._by_position:
            self._positions[layer] = exact.transpose(1, 2)

    def _are_packed(self, places: Tensor) -> bool:
        both = self._mask[:, 1:] & self._mask[:, :-1]
        return bool(((places.diff(dim=-1) != 1) & both.to(places.device)).any())

    def _stacked(self, found: Mapping[int, Tensor]) -> Tensor:
        expected = self._layers
        if expected is None:
            expected = frozenset(range(max(found, default=0) + 1))
        missing = sorted(expected - set(found))
        if missing:
            raise ModelError(
                f"the sink mass of layer {', '.join(map(str, missing))}",
                "none: its attention was not handed the probe",
                f"Run the model inside `tapped`, with {ARGUMENT}=probe. A model that "
                "keeps such arguments from its attention, or has layers without "
                "attention, cannot be tapped.",
            )
        place = self.sink.device
        return torch.stack([found[layer].to(place) for layer in sorted(found)], 1)


def _in_backward() -> bool:
    """Tell whether a backward pass is running, which may compute layers again."""
    return int(torch._C._current_graph_task_id()) >= 0
