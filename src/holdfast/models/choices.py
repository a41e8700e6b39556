"""How one token is chosen from logits, with the random number of its row and step."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.models.rows import Sampling


class Chosen(NamedTuple):
    """One token a row, and how close each choice was (see `Completion`)."""

    tokens: Int[Tensor, "example"]
    gaps: Float[Tensor, "example"]
    margins: Float[Tensor, "example"]


def choose(
    logits: Float[Tensor, "example vocab"],
    uniforms: Float[Tensor, "example"],
    sampling: Sampling,
) -> Chosen:
    """Choose one token a row: the likeliest, or by inverse CDF.

    The CDF runs in the order of the vocabulary, not of the probabilities: two
    tokens that are almost equally likely would swap places in a sorted CDF, and a
    difference of rounding would change the token. Sums are in float64.

    Args:
        logits: Logits in float32.
        uniforms: One number in [0, 1) for each row, in float64.
        sampling: Temperature and top-p.

    Returns:
        Tokens, gaps of the two largest logits, and margins of the random numbers. The
        gap is not a number where a logit is not finite; `Row.push` stops there.
    """
    top = logits.topk(2, dim=-1)
    gaps = (top.values[:, 0] - top.values[:, 1]).double()
    # One sum a row: of finite logits it is finite, and of others it is not.
    gaps = gaps.where(logits.sum(-1).isfinite(), torch.nan)
    if sampling.temperature == 0:
        return Chosen(top.indices[:, 0], gaps, torch.full_like(gaps, torch.inf))
    shares = (logits.double() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        shares = _nucleus(shares, sampling.top_p)
    cdf = shares.cumsum(-1)
    total = cdf[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    point = torch.minimum(uniforms[:, None] * total, below_total)
    # Where a logit is not finite, the place would be beyond the vocabulary.
    tokens = torch.searchsorted(cdf, point, right=True).clamp(max=cdf.shape[1] - 1)
    upper = cdf.gather(-1, tokens)
    lower = upper - shares.gather(-1, tokens)
    # The outer ends of the CDF are no border to another token.
    to_next = torch.where(upper >= below_total, torch.inf, upper - point)
    to_previous = torch.where(lower <= 0, torch.inf, point - lower)
    margins = torch.minimum(to_next, to_previous).clamp(min=0)
    return Chosen(tokens[:, 0], gaps, margins[:, 0])


def _nucleus(
    shares: Float[Tensor, "example vocab"], top_p: float
) -> Float[Tensor, "example vocab"]:
    ordered, tokens = shares.sort(stable=True, dim=-1, descending=True)
    # A token stays if those before it do not yet hold the mass.
    outside = ordered.cumsum(-1) - ordered >= top_p
    return shares.masked_fill(outside.scatter(-1, tokens, outside), 0.0)


def uniforms_of(seed: int, n_steps: int) -> Float[Tensor, "step"]:
    """Return the random numbers of a row, one a step, whatever stands beside it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_steps, generator=generator, dtype=torch.float64)
