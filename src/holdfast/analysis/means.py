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


def bootstrap_differences(
    values: Float[Tensor, "example label"],
    clusters: Sequence[str],
    control: Float[Tensor, "_ label"],
    control_clusters: Sequence[str],
    generator: torch.Generator,
    *,
    n_resamples: int = N_RESAMPLES,
    level: float = LEVEL,
) -> tuple[Estimate, ...]:
    """Estimate many differences of means at once, from the same resamples.

    Args:
        values: One row an example of the group, one column a quantity.
        clusters: The base request of each row.
        control: One row an example of the control.
        control_clusters: The base request of each; one that occurs in both groups is
            drawn for both at once.
        generator: Source of randomness, on the CPU.
        n_resamples: Resamples to draw.
        level: Coverage that is aimed at, for each column by itself.

    Returns:
        One estimate a column, as `mean_difference` gives it, but that a column of one
        number keeps its value and a width of zero.
    """
    check_lengths(len(values), clusters)
    check_lengths(len(control), control_clusters)
    upper, lower = values.detach().double().cpu(), control.detach().double().cpu()
    n, both = len(upper), [*clusters, *control_clusters]
    if not n or not len(lower):
        empty = "the group" if not n else "its control"
        one = undefined(len(both), f"{empty} has no rows to compare")
        return (one,) * upper.shape[1]
    indices, n_clusters = cluster_indices(both)
    sizes = len(set(clusters)), len(set(control_clusters))
    if min(sizes) < 2 or not upper.shape[1]:
        one = undefined(len(both), "one base request alone gives no interval")
        return (one,) * upper.shape[1]
    drawn = []
    for weights in resamples_of(indices, n_clusters, generator, n_resamples):
        above, below = weights[:, :n], weights[:, n:]
        mean = (above @ upper) / above.sum(1, keepdim=True)
        drawn.append(mean - (below @ lower) / below.sum(1, keepdim=True))
    replicates = torch.cat(drawn)
    # A resample may hold no row of one group, where groups share no request.
    replicates = replicates[~replicates.isnan().any(1)]
    ends = percentiles_of(replicates, min(sizes), level)
    means = upper.mean(0) - lower.mean(0)
    found = zip(means.tolist(), *ends.tolist(), strict=True)
    return tuple(
        widen_mean(
            Estimate(value, min(low, value), max(high, value), len(both)),
            ((upper[:, place], sizes[0]), (lower[:, place], sizes[1])),
            None,
            level,
        )
        for place, (value, low, high) in enumerate(found)
    )
