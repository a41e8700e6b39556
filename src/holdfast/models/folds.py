"""What heads write, and how a norm folds it: read off weights, whatever their form."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from holdfast.errors import AdapterError
from holdfast.models.containers.quantised import is_packed
from holdfast.models.model import Adapter, Block


def is_plain(projection: Any) -> bool:
    """Return whether columns of a projection's weight are what it multiplies with."""
    weight: Any = getattr(projection, "weight", None)
    shape = tuple(getattr(projection, f"{end}_features", 0) for end in ("out", "in"))
    return getattr(weight, "shape", None) == shape and not is_packed(projection)


@torch.no_grad()
def projection_weight(
    projection: Any, n_columns: int
) -> Float[Tensor, "d_model heads"]:
    """Return the columns of an output projection, in float32 on its device.

    Weights that are packed, or lie the other way round, are read off the projection
    itself, one unit vector per column.

    `n_columns`: Width of what goes in: all heads side by side.
    """
    if is_plain(projection):
        return projection.weight.detach().float()  # type: ignore[no-any-return]
    weight = projection.weight
    device, own = weight.device, weight.dtype
    if is_packed(projection):
        own = getattr(projection, "compute_dtype", None) or torch.bfloat16
    units = torch.eye(n_columns, device=device, dtype=own)
    columns: Tensor = projection(units).float()
    if projection.bias is not None:
        columns = columns - projection.bias.float()
    return columns.T


def head_contributions(
    adapter: Adapter, layer: int, heads: Float[Tensor, "example position heads"]
) -> Float[Tensor, "example position head d_model"]:
    """Return what each head writes to the residual stream, before any norm or factor.

    `heads`: Input of the layer's output projection: all heads side by side.

    Returns:
        Contributions in float32, without the bias of the projection.
    """
    shape = (adapter.n_heads, adapter.head_widths[layer])
    weight = projection_weight(adapter.output_projection(layer), heads.shape[-1])
    split = heads.float().reshape(*heads.shape[:-1], *shape)
    columns = weight.reshape(adapter.d_model, *shape)
    return torch.einsum("ephk,dhk->ephd", split, columns)


def inverse_rms(
    states: Float[Tensor, "*position d_model"], epsilon: float
) -> Float[Tensor, "*position"]:
    """Return 1 / sqrt(mean(x^2) + epsilon) at each position, in float32."""
    return (states.float().square().mean(-1) + epsilon).rsqrt()


@torch.no_grad()
def rms_weight(
    norm: Any, d_model: int, device: torch.device
) -> tuple[Float[Tensor, "d_model"], float]:
    """Return weight and epsilon of a root-mean-square norm.

    The weight, in float32, is measured, since some families store it less 1.

    Raises:
        AdapterError: If it names no epsilon, as an RMS norm does.
    """
    found = [getattr(norm, name, None) for name in ("variance_epsilon", "eps")]
    epsilon = next((value for value in found if isinstance(value, float)), None)
    if epsilon is None:
        raise AdapterError(
            "a root-mean-square norm, which names its epsilon",
            f"a {type(norm).__name__}",
            "Contributions cannot be folded through another norm; use another model.",
        )
    ones = torch.ones((1, d_model), device=device, dtype=_dtype(norm))
    return norm(ones)[0].float() * (1 + epsilon) ** 0.5, float(epsilon)


def _dtype(norm: Any) -> torch.dtype:
    return next((p.dtype for p in norm.parameters()), torch.float32)


@torch.no_grad()
def rms_deviation(norm: Any, d_model: int, device: torch.device) -> float:
    """Return how far a norm is from a root-mean-square norm of its weight and epsilon.

    The largest deviation from `x * weight / sqrt(mean(x^2) + epsilon)` on random
    vectors of four sizes, relative to the largest entry.

    Raises:
        AdapterError: As `rms_weight`.
    """
    weight, epsilon = rms_weight(norm, d_model, device)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[1e-2], [1.0], [10.0], [3.0]])
    drawn = torch.randn((4, d_model), generator=generator) * sizes
    drawn = drawn.to(device, _dtype(norm))
    expected = drawn.float() * inverse_rms(drawn, epsilon)[:, None] * weight
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((norm(drawn).float() - expected).abs().max() / scale)


def folded(
    block: Block, written: Float[Tensor, "example position d_model"]
) -> Float[Tensor, "example position d_model"]:
    """Return what an attention's output becomes in the norm behind it, in float32."""
    if block.norm_after is None:
        return written.float()
    weight, epsilon = rms_weight(block.norm_after, written.shape[-1], written.device)
    return written.float() * inverse_rms(written, epsilon)[..., None] * weight


def worst_deviation(norms: Iterable[nn.Module], adapter: Adapter) -> float:
    """Return the worst `rms_deviation` of some norms; infinite if one has none."""
    off = 0.0
    for norm in norms:
        device = next((p.device for p in norm.parameters()), adapter.device)
        try:
            off = worst(off, rms_deviation(norm, adapter.d_model, device))
        except AdapterError:
            off = float("inf")
    return off


def worst(one: float, other: float) -> float:
    """Return the larger deviation; one that is not a number is the largest."""
    # `max` would drop a NaN in second place.
    return other if other != other or other > one else one


@contextmanager
def zeroed_columns(
    adapter: Adapter, factors: Float[Tensor, "layer head"]
) -> Iterator[None]:
    """Zero the columns of heads whose factor is 0, and put them back at the end."""
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for layer, head in torch.argwhere(factors == 0).tolist():
            width = adapter.head_widths[layer]
            weight = adapter.output_projection(layer).weight.data
            columns = weight[:, head * width : (head + 1) * width]
            saved.append((columns, columns.clone()))
            columns.zero_()
        yield
    finally:
        for columns, before in saved:
            columns.copy_(before)
