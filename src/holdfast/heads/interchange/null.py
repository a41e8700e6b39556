"""Whether exchanging a head does more than exchanging it for the same outcome.

A head taken from another run brings along what that run was about, too. So beside the
twin, which ended otherwise, stands a source of *another* request that ended as the
target did. If the outcome of the source made no difference, either would be as likely
to do more: the null changes the two about, request by request, for all heads at once.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.stats.bootstrap import LEVEL, check_lengths, cluster_indices
from holdfast.stats.paired import EXACT_REQUESTS, N_FLIPS


class Permuted(NamedTuple):
    """How far each head is beyond the null."""

    # Mean of the effect less that of the mismatched source.
    excess: Float[Tensor, "head"]
    # Share of the null that reaches it, for each head by itself, one-sided.
    p_value: Float[Tensor, "head"]
    # Corrected for all heads, step by step: the share of the null in which the largest
    # of this head and all smaller ones reaches it, and no less than of a larger head.
    p_any: Float[Tensor, "head"]
    # What 95 % of the null stay below, for each head by itself.
    band: Float[Tensor, "head"]


def beyond_null(
    effects: Float[Tensor, "example head"],
    mismatched: Float[Tensor, "example head"],
    clusters: Sequence[str],
    generator: torch.Generator,
    n_draws: int = N_FLIPS,
) -> Permuted:
    """Compare effects with those of mismatched sources by exchanging the two.

    Args:
        effects: What a head of the twin does, towards the twin's outcome.
        mismatched: What the same head does from a run of another request that ended
            as the target did, measured the same way.
        clusters: The base request of each pair of runs.
        generator: Source of randomness, on the CPU; not used where few requests are,
            since all exchanges are tried then.
        n_draws: Draws of exchanges.

    Returns:
        One number for each head, in float64.

    Source:
        The correction is the step-down of the largest statistic of Westfall and Young,
        "Resampling-Based Multiple Testing" (1993), algorithm 2.8.
    """
    check_lengths(len(effects), mismatched, clusters)
    indices, n_clusters = cluster_indices(clusters)
    differences = effects.double().cpu() - mismatched.double().cpu()
    sums = torch.zeros((n_clusters, effects.shape[1]), dtype=torch.float64)
    sums = sums.index_add(0, indices, differences) / len(clusters)
    excess = sums.sum(0)
    if n_clusters <= EXACT_REQUESTS:
        signs = torch.tensor(list(product((-1.0, 1.0), repeat=n_clusters))).double()
        drawn, more = signs @ sums, 0
    else:
        flips = torch.randint(2, (n_draws, n_clusters), generator=generator)
        # The data themselves are one draw of the null, so that no p-value is 0.
        drawn, more = (2.0 * flips.double() - 1) @ sums, 1
    # A rounding error must not make a draw smaller than the data it repeats.
    reached = excess - 1e-12 * excess.abs()
    n = len(drawn) + more
    order = excess.argsort(descending=True)
    rest = drawn[:, order].flip(1).cummax(1).values.flip(1)
    stepped = ((rest >= reached[order]).sum(0) + more).double() / n
    p_any = torch.empty_like(stepped)
    p_any[order] = stepped.cummax(0).values
    return Permuted(
        excess,
        ((drawn >= reached).sum(0) + more).double() / n,
        p_any,
        torch.quantile(drawn, LEVEL, dim=0),
    )
