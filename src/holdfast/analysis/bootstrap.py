"""The cluster bootstrap: intervals that know which rows belong together.

Rows of one base request (its wrappers, its samples) rise and fall together, so whole
requests are drawn with replacement, never single rows.
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
MAX_UNDEFINED = 0.1
"""Share of resamples in which a statistic may be undefined (say, one class only)."""

MAX_WEIGHTS = 4_000_000

WeightedStatistic = Callable[[Tensor], Tensor]
"""Takes how often each example counts, `[resample, example]` in float64, and returns
the statistic of each resample, `[resample]`, NaN where it is undefined."""


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
    *,
    n_resamples: int = N_RESAMPLES,
    level: float = LEVEL,
) -> Estimate:
    """Estimate a weighted statistic with an expanded percentile interval.

    The percentiles are moved outwards as a t interval would be for the number of
    clusters; the plain percentile interval is too narrow when there are few.

    Args:
        statistic: The statistic as a function of how often each example counts.
        clusters: The base request of each example.
        generator: Source of randomness, on the CPU.
        n_resamples: Resamples to draw.
        level: Coverage that is aimed at.

    Returns:
        The estimate, or the reason why there is none: no rows, one cluster only,
        or a statistic that is undefined on the data or in too many resamples.

    Source:
        Expanded percentile interval of https://arxiv.org/abs/1411.5279, section 4.1,
        with clusters where the paper has observations.
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
        statistic(weights)
        for weights in resamples_of(indices, n_clusters, generator, n_resamples)
    ]
    replicates = torch.cat(draws)
    replicates = replicates[~torch.isnan(replicates)]
    if len(replicates) < (1 - MAX_UNDEFINED) * n_resamples:
        return undefined(n, "too few base requests in one class for an interval")
    low, high = percentiles_of(replicates, n_clusters, level).tolist()
    return Estimate(value, min(low, value), max(high, value), n)


def cluster_bootstrap(
    values: Float[Tensor, "example"],
    clusters: Sequence[str],
    statistic: Callable[[Float[Tensor, "_"]], float],
    generator: torch.Generator,
    *,
    n_resamples: int = N_RESAMPLES,
    level: float = LEVEL,
) -> Estimate:
    """Estimate any statistic of one column of values.

    For means, rates, AUROC and correlation there are faster functions in
    `holdfast.analysis.statistics`.

    Args:
        values: One number a row.
        clusters: The base request of each row.
        statistic: Function of the (resampled) values; NaN where undefined.
        generator: Source of randomness, on the CPU.
        n_resamples: Resamples to draw.
        level: Coverage that is aimed at.

    Returns:
        The estimate, as `bootstrap` gives it.
    """
    check_lengths(len(values), clusters)
    column = values.detach().double().cpu()

    def weighted(weights: Tensor) -> Tensor:
        drawn = [column.repeat_interleave(row.long()) for row in weights]
        found = [float(statistic(row)) for row in drawn]
        return torch.tensor(found, dtype=torch.float64)

    return bootstrap(
        weighted, clusters, generator, n_resamples=n_resamples, level=level
    )


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
                f"{n_rows} entries, one a row",
                f"{len(column)}",
                "Pass one label and one base request for each row.",
            )


def resamples_of(
    indices: Tensor, n_clusters: int, generator: torch.Generator, n_resamples: int
) -> Iterator[Tensor]:
    """Yield blocks of `[resample, example]` counts, small enough for memory."""
    block = max(1, MAX_WEIGHTS // max(len(indices), n_clusters))
    for start in range(0, n_resamples, block):
        rows = min(block, n_resamples - start)
        drawn = torch.randint(n_clusters, (rows, n_clusters), generator=generator)
        counts = torch.zeros(rows, n_clusters, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones(rows, n_clusters).double())
        yield counts[:, indices]


def percentiles_of(replicates: Tensor, n_clusters: int, level: float) -> Tensor:
    """Return the lower and upper ends of the interval, over the first axis."""
    quantile = float(t.ppf((1 - level) / 2, n_clusters - 1))
    expanded = quantile * (n_clusters / (n_clusters - 1)) ** 0.5
    tail = float(norm.cdf(expanded))
    # SciPy's and torch's tails are float64; a tail of 0 is the smallest replicate.
    ends = torch.tensor([tail, 1 - tail], dtype=replicates.dtype)
    return torch.quantile(replicates, ends, dim=0)
