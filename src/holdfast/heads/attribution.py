"""Direct logit attribution: what each part adds to the probe's logit.

The state after the final norm is a sum: token embedding, heads, attention biases,
mixers that are no softmax attention, and MLPs, times the norm's weight, over the
token's own root mean square. So its product with a direction is a sum too, of one
number for each part. A head's number is read off the *input* of its output projection,
by the product of the projection's columns with the weighted direction, which is
computed once. A norm between attention and residual stream is folded in the same way:
its weight into that product, and the token's own root mean square of the attention's
output afterwards. Factors of a family are part of the product (see `models.Block`).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from holdfast.errors import AdapterError, InputError, SettingsError
from holdfast.models.batching import Batch, Side, longest_first, pad, with_batch_halving
from holdfast.models.folds import inverse_rms, projection_weight, rms_weight
from holdfast.models.hidden_states import check_lengths
from holdfast.models.model import Adapter, Block

# Largest gap between the sum of the parts and the logit, relative to the sum of their
# sizes. In 16 bits the residual stream itself is rounded after every block.
GAP_LIMITS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Parts(NamedTuple):
    """What each part of the model adds; the axes before the last are the caller's."""

    heads: Float[Tensor, "*position layer head"]  # Contribution of each head.
    mlps: Float[Tensor, "*position layer"]  # Contribution of the MLP of each layer.
    # Contribution of the bias of each output projection.
    biases: Float[Tensor, "*position layer"]
    embedding: Float[Tensor, "*position"]  # Contribution of the token's embedding.
    # Contribution of what else mixes tokens in each layer: linear attention, a
    # convolution, a state-space model; 0 in layers without.
    mixers: Float[Tensor, "*position layer"]

    def total(self) -> Float[Tensor, "*position"]:
        """Return the sum over all parts: the logit without the probe's offset."""
        layers = self.heads.sum(-1) + self.mlps + self.biases + self.mixers
        return layers.sum(-1) + self.embedding


@dataclass(frozen=True, eq=False)
class Attribution:
    """Contributions to the logit along one sequence, in float32 on the CPU."""

    plateau: Parts  # Mean over the plateau, each token under its own RMS.
    # The same mean of the heads, before division by the RMS.
    plateau_unscaled: Float[Tensor, "layer head"]
    plateau_inverse_rms: float  # Mean of 1 / RMS over the plateau.
    plateau_logit: float  # Mean logit over the plateau, as the model has it.
    tail: Parts  # Contributions at the last positions, each under its own RMS.
    # 1 / RMS of what enters the final norm there.
    tail_inverse_rms: Float[Tensor, "position"]
    tail_logits: Float[Tensor, "position"]  # Logits there, as the model has them.
    # Of each head at the last position, what it writes along the direction of unit
    # length, before the final norm and without its weight.
    published: Float[Tensor, "layer head"]
    offset: float  # Constant of the logit.
    # Largest difference of the sum of the parts and the logit over *all* tokens of the
    # sequence, relative to the sum of the parts' sizes.
    gap: float


class _Pass(NamedTuple):
    """What the hooks of one pass write into, one column per part (see `Readout`)."""

    columns: Float[Tensor, "example position _"]
    published: Float[Tensor, "example _"]
    norm: Float[Tensor, "2 example position"]
    """1 / RMS, and the logit."""


class Readout:
    """Direction and weights, multiplied once, and the hooks that read with them.

    A token's columns are: heads layer by layer, MLPs, biases, mixers, embedding.
    """

    @torch.no_grad()
    def __init__(
        self, adapter: Adapter, direction: Float[Tensor, "d_model"], offset: float
    ) -> None:
        """Multiply the direction into the weights, once."""
        self.adapter, self.offset = adapter, offset
        place = next(adapter.final_norm.parameters(), adapter.embedding.weight).device
        weight, self.epsilon = rms_weight(adapter.final_norm, adapter.d_model, place)
        self.direction = direction.to(place)
        self.weighted = weight * self.direction
        unit = self.direction / self.direction.norm()
        # What a layer adds is multiplied by every factor of the stream from there on.
        scales = [block.stream_scale for block in adapter.blocks]
        self.scales = [math.prod(scales[layer:]) for layer in range(len(scales) + 1)]
        self.folds = {
            layer: _Fold.of(adapter, layer, self.scales[layer] * self.weighted, unit)
            for layer in adapter.layers_with_heads
        }
        self.n_heads = adapter.n_layers * adapter.n_heads

    def read(
        self, batch: Batch, plateaus: Sequence[tuple[int, int]], tail: int
    ) -> list[Attribution]:
        """Run one batch and reduce it."""
        shape, device = batch.mask.shape, self.direction.device
        n_parts = self.n_heads + 3 * self.adapter.n_layers + 1
        found = _Pass(
            torch.zeros((*shape, n_parts), device=device),
            torch.zeros((shape[0], self.n_heads), device=device),
            torch.zeros((2, *shape), device=device),
        )
        lengths = batch.mask.sum(-1)
        first = torch.zeros_like(lengths)
        if batch.side == "left":
            first = shape[1] - lengths
        last = (first + lengths - 1).to(device)
        with torch.inference_mode(), ExitStack() as stack:
            _Hooks(self, found, last, stack)
            self.adapter.base(**batch.inputs(), use_cache=False)
        if batch.side == "left":
            # Padding on the left may hold anything, and 0 times anything may be NaN.
            outside = ~batch.mask.to(device)
            found.columns.masked_fill_(outside[..., None], 0)
            found.norm.masked_fill_(outside[None], 0)
        rows = zip(first.tolist(), lengths.tolist(), plateaus, strict=True)
        return [
            self._reduce(found, row, slice(start, start + length), plateau, tail)
            for row, (start, length, plateau) in enumerate(rows)
        ]

    def _reduce(
        self,
        found: _Pass,
        row: int,
        tokens: slice,
        plateau: tuple[int, int],
        tail: int,
    ) -> Attribution:
        unscaled = found.columns[row, tokens]
        inverse, logits = found.norm[:, row, tokens]
        gap = self._gap(unscaled, inverse, logits)
        level = slice(*plateau)
        share = 1 / (level.stop - level.start)
        weights = torch.stack([torch.ones_like(inverse[level]), inverse[level]])
        mean, scaled = (share * weights) @ unscaled[level]
        ends = unscaled[-tail:] * inverse[-tail:, None]
        heads = self._heads
        return Attribution(
            plateau=self._parts(scaled),
            plateau_unscaled=heads(mean).to("cpu"),
            plateau_inverse_rms=float(inverse[level].mean()),
            plateau_logit=float(logits[level].mean()),
            tail=self._parts(ends),
            tail_inverse_rms=inverse[-tail:].to("cpu", copy=True),
            tail_logits=logits[-tail:].to("cpu", copy=True),
            published=heads(found.published[row]).to("cpu", copy=True),
            offset=self.offset,
            gap=gap,
        )

    def _gap(self, unscaled: Tensor, inverse: Tensor, logits: Tensor) -> float:
        off = (unscaled.sum(-1) * inverse + self.offset - logits).abs()
        size = (unscaled.abs().sum(-1) * inverse).clamp(min=1)
        gap = float((off / size).max())
        limit = GAP_LIMITS[self.adapter.dtype]
        if not gap <= limit:
            raise AdapterError(
                "embedding, heads, biases and MLPs that sum to the logit, within "
                f"{limit:.0e} of their sizes",
                f"a gap of {gap:.2g} in {self.adapter.identity.model_id}",
                "Its parts are not what they seemed on load, or the arithmetic is not "
                "exact enough: load the model in float32.",
            )
        return gap

    def _heads(self, columns: Tensor) -> Tensor:
        shape = (self.adapter.n_layers, self.adapter.n_heads)
        return columns[..., : self.n_heads].reshape(*columns.shape[:-1], *shape)

    def _parts(self, columns: Tensor) -> Parts:
        columns = columns.to("cpu")
        layers = columns[..., self.n_heads : -1].chunk(3, -1)
        mlps, biases, mixers = layers
        return Parts(self._heads(columns), mlps, biases, columns[..., -1], mixers)


@dataclass(frozen=True, eq=False)
class _Fold:
    """From the heads of a layer, side by side, to one number for each."""

    # Block-diagonal, since one product of matrices is faster than a sum over each
    # head's width, although it multiplies by zeros.
    readout: Float[Tensor, "heads head"]
    published: Float[Tensor, "heads head"]  # The same along the unit direction.
    bias: float  # What a bias of the projection adds.
    epsilon: float | None  # Of the norm after the attention; None without one.

    @classmethod
    def of(
        cls, adapter: Adapter, layer: int, weighted: Tensor, unit: Tensor
    ) -> "_Fold":
        """Multiply directions into the projection of a layer, through its norm."""
        block, projection = adapter.blocks[layer], adapter.output_projection(layer)
        width = adapter.n_heads * block.head_width
        columns = projection_weight(projection, width)
        fold, epsilon = torch.tensor(block.attention_scale), None
        if block.norm_after is not None:
            weight, epsilon = rms_weight(
                block.norm_after, adapter.d_model, columns.device
            )
            fold = fold * weight
        own = torch.eye(adapter.n_heads, device=columns.device)
        own = own.repeat_interleave(block.head_width, 0)
        along = (fold.to(columns.device) * weighted.to(columns.device)) @ columns
        beside = (fold.to(columns.device) * unit.to(columns.device)) @ columns
        bias = 0.0
        if projection.bias is not None:
            fold, place = fold.to(weighted.device), weighted.device
            bias = float(projection.bias.float().to(place) @ (fold * weighted))
        return cls(along[:, None] * own, beside[:, None] * own, bias, epsilon)


class _Hooks:
    """The hooks of one pass, which turn what they see into numbers at once."""

    def __init__(
        self,
        reader: Readout,
        found: _Pass,
        last: Int[Tensor, "example"],
        stack: ExitStack,
    ) -> None:
        """Hook every part of the model, for as long as the stack lasts."""
        self.reader, self.found, self.last = reader, found, last
        # The stream before the layer that is running, and at its joint.
        self.before = self.joint = torch.empty(0)
        into, out_of = _attacher(stack, True), _attacher(stack, False)
        for layer, block in enumerate(reader.adapter.blocks):
            if layer == 0:
                into(block.module, self._embedded)
            if layer in reader.folds:
                into(block.projection, partial(self._heads, layer))
            if block.norm_after is not None and layer in reader.folds:
                into(block.norm_after, partial(self._norm_after, layer))
            if block.joint is not None:
                into(block.joint, partial(self._joint, layer, block))
            out_of(block.module, partial(self._layer, layer, block))
        into(reader.adapter.final_norm, self._entering)
        out_of(reader.adapter.final_norm, self._leaving)

    def _columns(self, layer: int) -> slice:
        width = self.reader.adapter.n_heads
        return slice(layer * width, (layer + 1) * width)

    def _place(self, kind: int, layer: int) -> int:
        """Return the column of a layer's MLP (0), bias (1) or mixer (2)."""
        return self.reader.n_heads + kind * self.reader.adapter.n_layers + layer

    def _along(self, states: Tensor, layer: int) -> Tensor:
        """Return the stream in front of a layer, as the last state has it."""
        seen = states.float() @ self.reader.weighted.to(states.device)
        return seen.to(self.last.device) * self.reader.scales[layer]

    def _embedded(self, states: Tensor) -> None:
        self.before = self._along(states, 0)
        self.found.columns[..., -1] = self.before

    def _heads(self, layer: int, states: Tensor) -> None:
        fold, place = self.reader.folds[layer], self.last.device
        self.found.columns[..., self._columns(layer)] = (
            states.float() @ fold.readout
        ).to(place)
        final = states[self._final(states)].float() @ fold.published
        self.found.published[:, self._columns(layer)] = final.to(place)
        self.found.columns[..., self._place(1, layer)] = fold.bias

    def _final(self, states: Tensor) -> tuple[Tensor, Tensor]:
        last = self.last.to(states.device)
        return torch.arange(len(last), device=states.device), last

    def _norm_after(self, layer: int, states: Tensor) -> None:
        epsilon = self.reader.folds[layer].epsilon or 0.0
        inverse = inverse_rms(states, epsilon)
        self.found.published[:, self._columns(layer)] *= inverse[self._final(states)][
            :, None
        ].to(self.last.device)
        inverse = inverse.to(self.last.device)
        self.found.columns[..., self._columns(layer)] *= inverse[..., None]
        self.found.columns[..., self._place(1, layer)] *= inverse

    def _attended(self, layer: int) -> Tensor:
        heads = self.found.columns[..., self._columns(layer)].sum(-1)
        return heads + self.found.columns[..., self._place(1, layer)]

    def _joint(self, layer: int, block: Block, states: Tensor) -> None:
        self.joint = self._along(states, layer)
        if block.has_mixer:
            mixed = self.joint - self.before - self._attended(layer)
            self.found.columns[..., self._place(2, layer)] = mixed

    def _layer(self, layer: int, block: Block, states: Tensor) -> None:
        after = self._along(states, layer + 1)
        if block.joint is not None:
            self.found.columns[..., self._place(0, layer)] = after - self.joint
        elif block.has_mixer or block.parallel:
            kind = 2 if block.has_mixer else 0
            rest = after - self.before - self._attended(layer)
            self.found.columns[..., self._place(kind, layer)] = rest
        self.before = after

    def _entering(self, states: Tensor) -> None:
        self.found.norm[0] = inverse_rms(states, self.reader.epsilon)

    def _leaving(self, states: Tensor) -> None:
        reader = self.reader
        self.found.norm[1] = states.float() @ reader.direction + reader.offset


def _attacher(
    stack: ExitStack, before: bool
) -> Callable[[nn.Module, Callable[[Tensor], None]], None]:
    """Return what hooks a reader to the input or the output of a module."""

    def attach(module: nn.Module, read: Callable[[Tensor], None]) -> None:
        def see_input(_: nn.Module, arguments: tuple[Any, ...], named: Any) -> None:
            read(arguments[0] if arguments else named["hidden_states"])

        def see_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            read(output[0] if isinstance(output, tuple) else output)

        handle = (
            module.register_forward_pre_hook(see_input, with_kwargs=True)
            if before
            else module.register_forward_hook(see_output)
        )
        stack.callback(handle.remove)

    return attach


TAIL = 64
"""Positions at the end of a sequence that are kept in full."""


def attribute(
    adapter: Adapter,
    sequences: Sequence[Sequence[int]],
    plateaus: Sequence[tuple[int, int]],
    direction: Float[Tensor, "d_model"],
    offset: int | float = 0.0,
    *,
    tail: int = TAIL,
    batch_size: int = 16,
    padding_side: Side = "right",
) -> list[Attribution]:
    """Return what each head, MLP, bias and embedding adds to `direction · h + offset`.

    Each hook turns what it sees into one number per part and token; those are reduced
    to the plateau mean and the tail when the final norm has shown the RMS. They take
    less room than one state a token. Edits that are at work are seen (see
    `models.edits`): an ablated head contributes 0.

    `direction`: Direction in the space after the final norm: for a probe, its weight
    over its scale.
    `tail`: Positions to keep in full, from the end; all where there are fewer.
    `padding_side`: Side of the padding; it changes no result by more than rounding.

    Source:
        The direct contribution of https://arxiv.org/abs/2510.06036, whose code leaves
        out the final norm; that reading is `published`.
    """
    adapter.require("heads")
    check_lengths(adapter, sequences)
    _check_plateaus(sequences, plateaus)
    if tail < 1 or not bool(direction.any()):
        raise SettingsError(
            "a direction that is not zero, and a tail of 1 position or more",
            f"a tail of {tail}, a direction of norm {float(direction.norm()):.3g}",
            "Fit the probe again, or raise the tail.",
        )
    reader = Readout(adapter, direction.float(), float(offset))
    order = longest_first(sequences)

    def read_batch(rows: Sequence[int]) -> list[Attribution]:
        batch = pad([sequences[row] for row in rows], padding_side, adapter.device)
        return reader.read(batch, [plateaus[row] for row in rows], tail)

    results, _ = with_batch_halving(read_batch, order, batch_size)
    by_sequence = dict(zip(order, results, strict=True))
    return [by_sequence[row] for row in range(len(sequences))]


def _check_plateaus(
    sequences: Sequence[Sequence[int]], plateaus: Sequence[tuple[int, int]]
) -> None:
    if len(plateaus) != len(sequences):
        raise InputError(
            f"one plateau for each of {len(sequences)} sequences",
            f"{len(plateaus)}",
            "Pass the span of the thinking of each sequence.",
        )
    for index, (ids, (start, stop)) in enumerate(zip(sequences, plateaus, strict=True)):
        if not 0 <= start < stop <= len(ids):
            raise InputError(
                f"a plateau within the {len(ids)} tokens of sequence {index}",
                f"{start}:{stop}",
                "Leave out rows without thinking; pass spans of the same tokens.",
            )
