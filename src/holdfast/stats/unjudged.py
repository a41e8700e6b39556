"""Rates over rows that a judge could not all read: what is known of them, and no more.

An answer without a verdict may count and may not. A rate over it lies between two
numbers, all such rows counted one way and all the other; where that leaves more open
than chance does, or nothing was read at all, the rate is no number.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from holdfast.stats.bootstrap import Estimate, undefined
from holdfast.stats.paired import paired_rate_difference
from holdfast.stats.rates import clustered_mean, clustered_rate

Statistic = Callable[[Tensor], Estimate]


def judged_mean(
    values: Bool[Tensor, "example"] | Float[Tensor, "example"],
    unjudged: Bool[Tensor, "example"],
    clusters: Sequence[str],
    generator: torch.Generator,
) -> Estimate:
    """Return a rate, or a mean of scores in [0, 1], where some rows have no verdict.

    `values`: Whether each row counts, or its score; not read where it has no verdict.
    `unjudged`: True where a row has no verdict, and so could have any value.
    Returns: `clustered_rate`, or `clustered_mean` of scores, where every row has a
    verdict; else what `between` makes of its two extremes.
    """
    average = clustered_rate if values.dtype == torch.bool else clustered_mean

    def mean(extreme: Tensor) -> Estimate:
        return average(extreme, clusters, _copy(generator))

    return between(
        mean,
        (values.masked_fill(unjudged, 0), values.masked_fill(unjudged, 1)),
        int(unjudged.sum()),
        is_read=not bool(unjudged.all()),
    )


def judged_difference(
    after: Bool[Tensor, "example"],
    before: Bool[Tensor, "example"],
    unjudged_after: Bool[Tensor, "example"],
    unjudged_before: Bool[Tensor, "example"],
    clusters: Sequence[str],
    generator: torch.Generator,
) -> Estimate:
    """Return a paired difference of rates where some rows have no verdict.

    `after`: Outcome under one condition; not read where it has no verdict.
    `before`: Outcome of the same row under the other, likewise.
    `unjudged_after`: True where a row has no verdict under the one.
    `unjudged_before`: True where it has none under the other.
    """

    def difference(extreme: Tensor) -> Estimate:
        return paired_rate_difference(
            extreme[:, 0], extreme[:, 1], clusters, _copy(generator)
        )

    least = torch.stack([after & ~unjudged_after, before | unjudged_before], 1)
    most = torch.stack([after | unjudged_after, before & ~unjudged_before], 1)
    return between(
        difference,
        (least, most),
        int((unjudged_after | unjudged_before).sum()),
        is_read=not bool(unjudged_after.all() or unjudged_before.all()),
    )


def between(
    statistic: Statistic,
    extremes: tuple[Tensor, Tensor],
    count: int,
    *,
    is_read: bool,
    noun: str = "answers",
) -> Estimate:
    """Return what is known of a statistic whose open rows lie at either extreme.

    `statistic`: What is computed of the rows, with an interval.
    `extremes`: The rows as they would make it smallest, and largest.
    `count`: How many of them have no verdict.
    `is_read`: Whether any has one.
    `noun`: What the rows are.
    Returns: The statistic itself without such rows. Else its value at the lower
    extreme, an interval that covers those of both extremes, and the bounds; without a
    value where no row has a verdict, or where the bounds lie further apart than the
    interval that chance alone gives.
    """
    low = statistic(extremes[0])
    if not count:
        return low
    n = low.n
    if not is_read:
        reason = f"none of {n} {noun} could be judged"
        return undefined(n, reason)._replace(n_unjudged=count)
    high = statistic(extremes[1])
    if low.value is None or high.value is None:
        reason = low.reason or high.reason or "there is no interval"
        return undefined(n, reason)._replace(n_unjudged=count)
    bounds = (low.value, high.value)
    assert low.low is not None
    assert low.high is not None
    assert high.low is not None
    assert high.high is not None
    chance = max(low.high - low.low, high.high - high.low)
    if high.value - low.value <= chance:
        return Estimate(low.value, low.low, high.high, n, None, bounds, count)
    reason = f"{count} of {n} {noun} could not be judged"
    return undefined(n, reason)._replace(bounds=bounds, n_unjudged=count)


def _copy(generator: torch.Generator) -> torch.Generator:
    """Return the same source of randomness: both extremes draw the same requests."""
    return torch.Generator().manual_seed(generator.initial_seed())
