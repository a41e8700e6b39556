"""Direct logit attribution: what each part adds to the probe's logit.

The state after the final norm is a sum: token embedding, heads, attention biases and
MLPs, times the norm's weight, over the token's own root mean square. So its product
with a direction is a sum too, of one number for each part. A head's number is read
off the *input* of its output projection, by the product of the projection's columns
with the weighted direction, which is computed once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from holdfast.errors import AdapterError, InputError, SettingsError
from holdfast.models.batching import Batch, Side, longest_first, pad, with_batch_halving
from holdfast.models.hidden_states import check_lengths
from holdfast.models.model import Adapter

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

    def total(self) -> Float[Tensor, "*position"]:
        """Return the sum over all parts: the logit without the probe's offset."""
        layers = self.heads.sum(-1) + self.mlps + self.biases
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

    A token's columns are: heads layer by layer, MLPs, biases, embedding.
    """

    @torch.no_grad()
    def __init__(
        self, adapter: Adapter, direction: Float[Tensor, "d_model"], offset: float
    ) -> None:
        """Multiply the direction into the weights, once."""
        self.adapter = adapter
        self.offset = offset
        norm: Any = adapter.final_norm
        self.epsilon = _epsilon(norm)
        self.direction = direction.to(norm.weight.device)
        self.weighted = norm.weight.float() * self.direction
        unit = self.direction / self.direction.norm()
        projections = [adapter.output_projection(i) for i in range(adapter.n_layers)]
        self.readouts = [_readout(p, self.weighted, adapter) for p in projections]
        self.published = [_readout(p, unit, adapter) for p in projections]
        self.biases = [
            0.0
            if p.bias is None
            else float(p.bias.float() @ self.weighted.to(p.bias.device))
            for p in projections
        ]
        self.n_heads = adapter.n_layers * adapter.n_heads

    def read(
        self, batch: Batch, plateaus: Sequence[tuple[int, int]], tail: int
    ) -> list[Attribution]:
        """Run one batch and reduce it."""
        shape, device = batch.mask.shape, self.direction.device
        n_parts = self.n_heads + 2 * self.adapter.n_layers + 1
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
        with torch.inference_mode(), self._hooked(found, last):
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

    @contextmanager
    def _hooked(self, found: _Pass, last: Int[Tensor, "example"]) -> Iterator[None]:
        adapter, n_layers = self.adapter, self.adapter.n_layers
        mlps = self.n_heads
        every = torch.arange(len(last), device=last.device)

        def heads(layer: int) -> Callable[[Tensor], None]:
            width = adapter.n_heads
            columns = slice(layer * width, (layer + 1) * width)
            readout, published = self.readouts[layer], self.published[layer]

            def read(states: Tensor) -> None:
                seen = states.float() @ readout
                found.columns[..., columns] = seen.to(found.columns.device)
                place = every.to(states.device), last.to(states.device)
                final = states[place].float() @ published
                found.published[:, columns] = final.to(found.published.device)

            return read

        def along(column: int, sign: int) -> Callable[[Tensor], None]:
            def read(states: Tensor) -> None:
                seen = states.float() @ self.weighted.to(states.device)
                found.columns[..., column] += sign * seen.to(found.columns.device)

            return read

        def entering(states: Tensor) -> None:
            power = states.float().square().mean(-1)
            found.norm[0] = (power + self.epsilon).rsqrt()

        def leaving(states: Tensor) -> None:
            found.norm[1] = states.float() @ self.direction + self.offset

        with ExitStack() as stack:
            before, after = _attacher(stack, True), _attacher(stack, False)
            before(adapter.layers[0], along(mlps + 2 * n_layers, 1))
            for layer in range(n_layers):
                before(adapter.output_projection(layer), heads(layer))
                before(adapter.mlp_norms[layer], along(mlps + layer, -1))
                after(adapter.layers[layer], along(mlps + layer, 1))
                found.columns[..., mlps + n_layers + layer] = self.biases[layer]
            before(adapter.final_norm, entering)
            after(adapter.final_norm, leaving)
            yield

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
                "The final norm is no plain RMS norm, or the arithmetic is not exact "
                "enough: load the model in float32.",
            )
        return gap

    def _heads(self, columns: Tensor) -> Tensor:
        shape = (self.adapter.n_layers, self.adapter.n_heads)
        return columns[..., : self.n_heads].reshape(*columns.shape[:-1], *shape)

    def _parts(self, columns: Tensor) -> Parts:
        columns = columns.to("cpu")
        mlps = self.n_heads
        biases = mlps + self.adapter.n_layers
        return Parts(
            self._heads(columns),
            columns[..., mlps:biases],
            columns[..., biases:-1],
            columns[..., -1],
        )


def _readout(
    projection: nn.Linear, direction: Tensor, adapter: Adapter
) -> Float[Tensor, "heads head"]:
    """Return the matrix from all heads side by side to one number per head.

    It is block-diagonal, since one product of matrices is faster than a sum over
    each head's width, although it multiplies by zeros.
    """
    weight = projection.weight.float()
    along = direction.to(weight.device) @ weight
    own = torch.eye(adapter.n_heads, device=weight.device)
    return along[:, None] * own.repeat_interleave(adapter.head_width, 0)


def _epsilon(norm: Any) -> float:
    for name in ("variance_epsilon", "eps"):
        found = getattr(norm, name, None)
        if isinstance(found, float) and hasattr(norm, "weight"):
            return found
    raise AdapterError(
        "an RMS norm with a weight after the last block",
        f"a {type(norm).__name__}",
        "Contributions cannot be folded through another norm; use another model.",
    )


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
