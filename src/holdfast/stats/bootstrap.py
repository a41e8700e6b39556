"""The cluster bootstrap: intervals that know which rows belong together.

Rows of one base request (its wrappers, its samples) rise and fall together, so whole
requests are drawn with replacement, never single rows.

When every base request has the same mean (one wrapper of it works and one fails, say)
all resamples are equal and the percentile interval has width zero. That is no
certainty: the rows still differ, and what was never seen has no share in a resample.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.stats import norm, t
from torch import Tensor

from holdfast.errors import InputError

N_RESAMPLES = 1000
LEVEL = 0.95
Z = float(norm.ppf(1 - (1 - LEVEL) / 2))
MAX_UNDEFINED = 0.1
"""Share of resamples in which a statistic may be undefined (say, one class only)."""
MAX_WEIGHTS = 4_000_000
WeightedStatistic = Callable[[Tensor], Tensor]
"""Takes how often each example counts, `[resample, example]` in float64, and returns
the statistic of each resample, `[resample]`, NaN where it is undefined."""
Draws = Callable[[str], torch.Generator]
"""From the name of a figure to a source of randomness of its own, on the CPU."""


class Estimate(NamedTuple):
    """A number with its interval, or the reason why there is none.

    Attributes:
        value: The estimate on all rows; None where it is undefined.
        low: Lower end of the interval; None exactly where `value` is.
        high: Upper end of the interval; None exactly where `value` is.
        n: Rows it was computed from.
        reason: A sentence where `value` is None, else None.
        bounds: Least and largest value, where rows that no judge could read may
            count or not; `value` is then the least, or None. See `unjudged`.
        n_unjudged: How many of the rows those are.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str | None = None
    bounds: tuple[float, float] | None = None
    n_unjudged: int = 0


def undefined(n: int, reason: str) -> Estimate:
    """Return the estimate that says why there is no number."""
    return Estimate(None, None, None, n, reason)


def bootstrap(
    statistic: WeightedStatistic,
    clusters: Sequence[str],
    generator: torch.Generator,
) -> Estimate:
    """Estimate a weighted statistic with an expanded percentile interval.

    The percentiles are moved outwards as a t interval would be for the number of
    clusters; the plain percentile interval is too narrow when there are few.

    `statistic`: The statistic as a function of how often each example counts.
    Returns: The estimate, or the reason why there is none: no rows, one cluster only,
    or a statistic that is undefined on the data or in too many resamples.
    Source: Expanded percentile interval of https://arxiv.org/abs/1411.5279, section
    4.1, with clusters where the paper has observations.
    """
    n = len(clusters)
    if n == 0:
        return undefined(0, "there are no rows")
    value = float(statistic(torch.ones(1, n, dtype=torch.float64))[0])
    if value != value:
        return undefined(n, "it is not defined on these rows (one class, or no spread)")
    indices, n_clusters = cluster_indices(clusters)
    if n_clusters < 2:
        return undefined(n, "one base request alone gives no interval")
    draws = [
        statistic(weights) for weights in resamples_of(indices, n_clusters, generator)
    ]
    replicates = torch.cat(draws)
    replicates = replicates[~torch.isnan(replicates)]
    if len(replicates) < (1 - MAX_UNDEFINED) * N_RESAMPLES:
        return undefined(n, "too few base requests in one class for an interval")
    low, high = percentiles_of(replicates, n_clusters).tolist()
    return Estimate(value, min(low, value), max(high, value), n)


def cluster_indices(clusters: Sequence[str]) -> tuple[Int[Tensor, "example"], int]:
    """Return the index of each row's cluster, and the number of clusters."""
    numbers: dict[str, int] = {}
    indices = [numbers.setdefault(name, len(numbers)) for name in clusters]
    return torch.tensor(indices, dtype=torch.int64), len(numbers)


def check_lengths(n_rows: int, *columns: Sequence[object] | Tensor) -> None:
    """Refuse columns of different lengths.

    Raises:
        InputError: If a column has not `n_rows` entries.
    """
    for column in columns:
        if len(column) != n_rows:
            raise InputError(
                f"{n_rows} entries, one per row",
                f"{len(column)}",
                "Pass one label and one base request for each row.",
            )


def resamples_of(
    indices: Tensor, n_clusters: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield blocks of `[resample, example]` counts, small enough for memory."""
    block = max(1, MAX_WEIGHTS // max(len(indices), n_clusters))
    for start in range(0, N_RESAMPLES, block):
        rows = min(block, N_RESAMPLES - start)
        drawn = torch.randint(n_clusters, (rows, n_clusters), generator=generator)
        counts = torch.zeros(rows, n_clusters, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones(rows, n_clusters).double())
        yield counts[:, indices]


def percentiles_of(replicates: Tensor, n_clusters: int) -> Tensor:
    """Return the lower and upper ends of the interval, over the first axis."""
    quantile = float(t.ppf((1 - LEVEL) / 2, n_clusters - 1))
    expanded = quantile * (n_clusters / (n_clusters - 1)) ** 0.5
    tail = float(norm.cdf(expanded))
    # SciPy's and torch's tails are float64; a tail of 0 is the smallest replicate.
    ends = torch.tensor([tail, 1 - tail], dtype=replicates.dtype)
    return torch.quantile(replicates, ends, dim=0)


NO_SPREAD = "every row says the same, so that resampling gives no interval"
ROUNDING = 1e-9
"""Width under which an interval, beside the size of its values, is one of rounding."""
Bounds = tuple[float, float]


def wilson_bounds(rate: float, n: int) -> Bounds:
    """Return the ends of Wilson's interval for a rate of `n` independent rows.

    They hold for the mean of anything in [0, 1] as well, since no variable of that
    mean and range varies more than one of 0 and 1 does.
    """
    z = Z
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    # At 0 and 1 one end is exact, but rounding may miss it.
    low = 0.0 if rate == 0 else max(0.0, centre - half)
    return low, 1.0 if rate == 1 else min(1.0, centre + half)


def include(found: Estimate, ends: Bounds) -> Estimate:
    """Return the estimate with an interval that holds both its own and another."""
    if found.low is None or found.high is None:
        return found
    return found._replace(low=min(found.low, ends[0]), high=max(found.high, ends[1]))


def has_no_width(found: Estimate, scale: float = 1.0) -> bool:
    """Return whether an interval is there and is one point, but for rounding.

    `scale`: Size of the values it was made from.
    """
    if found.low is None or found.high is None:
        return False
    return found.high - found.low <= ROUNDING * scale


def require_width(found: Estimate, scale: float = 1.0) -> Estimate:
    """Return the estimate, or the reason in place of an interval of width zero."""
    return undefined(found.n, NO_SPREAD) if has_no_width(found, scale) else found


def widen_mean(
    found: Estimate,
    groups: tuple[tuple[Tensor, int], ...],
    bounds: Bounds | None = None,
) -> Estimate:
    """Widen the interval of a mean, or of a difference of means, that has no width.

    The spread of the rows takes the place of the spread of the requests, which was
    not seen, and there are as many draws as there are requests.

    `found`: The mean of the first group, minus that of the second if there is one.
    `groups`: Rows of each group as numbers, and its number of requests.
    `bounds`: Least and largest value that a row of the only group can have.
    Returns: The estimate itself where it has a width; else widened by Student's
    interval over rows and, with bounds, by Wilson's. Rows that are all the same number
    have no width without bounds either: `require_width` says so.
    """
    scale = max(float(rows.abs().max()) for rows, _ in groups)
    if found.value is None or not has_no_width(found, scale):
        return found
    variance = sum(float(rows.var(correction=0)) / n for rows, n in groups)
    freedom = max(1, min(n for _, n in groups) - 1)
    half = float(t.ppf(1 - (1 - LEVEL) / 2, freedom)) * variance**0.5
    wide = include(found, (found.value - half, found.value + half))
    if bounds is not None:
        least, reach = bounds[0], bounds[1] - bounds[0]
        share = min(1.0, max(0.0, (found.value - least) / reach))
        low, high = wilson_bounds(share, groups[0][1])
        wide = include(wide, (least + reach * low, least + reach * high))
        wide = _within(wide, bounds)
    return wide


def _within(found: Estimate, bounds: Bounds) -> Estimate:
    assert found.low is not None
    assert found.high is not None
    return found._replace(
        low=max(found.low, bounds[0]), high=min(found.high, bounds[1])
    )


def bootstrap_means(
    values: Float[Tensor, "example _"],
    clusters: Sequence[str],
    generator: torch.Generator,
    *,
    bounds: Bounds | None = None,
) -> tuple[Estimate, ...]:
    """Estimate the mean of many columns at once, from the same resamples.

    `values`: One row per example, one column per quantity.
    `bounds`: Least and largest value that a row can have, if there are such.
    Returns: One estimate a column, as `clustered_mean` gives it: where all requests
    have the same mean, widened as `widen_mean` says. A column of one number without
    bounds (a head that writes nothing) keeps its value and a width of zero; where a
    sign is read off an interval, `require_width` turns that into a reason. A rate has
    bounds, or better `clustered_rate` and `paired_rate_difference`.
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
        for weights in resamples_of(indices, n_clusters, generator)
    ]
    ends = percentiles_of(torch.cat(means), n_clusters)
    return _by_column(columns.mean(0), ends, n, ((columns, n_clusters),), bounds)


def bootstrap_differences(
    values: Float[Tensor, "example label"],
    clusters: Sequence[str],
    control: Float[Tensor, "_ label"],
    control_clusters: Sequence[str],
    generator: torch.Generator,
) -> tuple[Estimate, ...]:
    """Estimate many differences of means at once, from the same resamples.

    `values`: One row per example of the group, one column per quantity.
    `control`: One row per example of the control.
    `control_clusters`: The base request of each; one that occurs in both groups is
    drawn for both at once.
    Returns: One estimate a column, as `mean_difference` gives it, but that a column of
    one number keeps its value and a width of zero.
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
    for weights in resamples_of(indices, n_clusters, generator):
        above, below = weights[:, :n], weights[:, n:]
        mean = (above @ upper) / above.sum(1, keepdim=True)
        drawn.append(mean - (below @ lower) / below.sum(1, keepdim=True))
    replicates = torch.cat(drawn)
    # A resample may hold no row of one group, where groups share no request.
    replicates = replicates[~replicates.isnan().any(1)]
    ends = percentiles_of(replicates, min(sizes))
    groups = ((upper, sizes[0]), (lower, sizes[1]))
    return _by_column(upper.mean(0) - lower.mean(0), ends, len(both), groups)


def _by_column(
    values: Tensor,
    ends: Tensor,
    n: int,
    groups: tuple[tuple[Tensor, int], ...],
    bounds: Bounds | None = None,
) -> tuple[Estimate, ...]:
    """Return an estimate per column of the groups, widened where it has no width."""
    found = zip(values.tolist(), *ends.tolist(), strict=True)
    return tuple(
        widen_mean(
            Estimate(value, min(low, value), max(high, value), n),
            tuple((rows[:, column], size) for rows, size in groups),
            bounds,
        )
        for column, (value, low, high) in enumerate(found)
    )
