"""Means of many columns at once, from the same resamples."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.analysis.bootstrap import (
    LEVEL,
    N_RESAMPLES,
    Estimate,
    check_lengths,
    cluster_indices,
    percentiles_of,
    resamples_of,
    undefined,
)
from holdfast.analysis.widening import Bounds, widen_mean


def bootstrap_means(
    values: Float[Tensor, "example _"],
    clusters: Sequence[str],
    generator: torch.Generator,
    *,
    n_resamples: int = N_RESAMPLES,
    level: float = LEVEL,
    bounds: Bounds | None = None,
) -> tuple[Estimate, ...]:
    """Estimate the mean of many columns at once, from the same resamples.

    Args:
        values: One row an example, one column a quantity.
        clusters: The base request of each row.
        generator: Source of randomness, on the CPU.
        n_resamples: Resamples to draw.
        level: Coverage that is aimed at, for each column by itself.
        bounds: Least and largest value that a row can have, if there are such.

    Returns:
        One estimate a column, as `clustered_mean` gives it: where all requests have
        the same mean, widened as `widen_mean` says. A column of one number without
        bounds (a head that writes nothing) keeps its value and a width of zero; where
        a sign is read off an interval, `require_width` turns that into a reason. A
        rate has bounds, or better `clustered_rate` and `paired_rate_difference`.
    """
    check_lengths(len(values), clusters)
    n, columns = len(clusters), values.detach().double().cpu()
    if n == 0:
        return (undefined(0, "there are no rows"),) * columns.shape[1]
    indices, n_clusters = cluster_indices(clusters)
    if n_clusters < 2 or not columns.shape[1]:
        one = undefined(n, "one base request alone gives no interval")
        return (one,) * columns.shape[1]
    means = [
        (weights @ columns) / weights.sum(1, keepdim=True)
        for weights in resamples_of(indices, n_clusters, generator, n_resamples)
    ]
    ends = percentiles_of(torch.cat(means), n_clusters, level)
    found = zip(columns.mean(0).tolist(), *ends.tolist(), strict=True)
    return tuple(
        widen_mean(
            Estimate(value, min(low, value), max(high, value), n),
            ((columns[:, place], n_clusters),),
            bounds,
            level,
        )
        for place, (value, low, high) in enumerate(found)
    )
