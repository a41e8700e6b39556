"""Rates, means and correlation, each with an interval over base requests."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from holdfast.stats.bootstrap import (
    Bounds,
    Estimate,
    WeightedStatistic,
    bootstrap,
    check_lengths,
    has_no_width,
    include,
    require_width,
    undefined,
    widen_mean,
    wilson_bounds,
)


class Calibration(NamedTuple):
    """How far probabilities are from frequencies.

    Attributes:
        expected_error: Mean gap between probability and frequency over bins of equal
            width. It is biased upwards on few rows.
        brier: Mean squared difference between probability and outcome.
    """

    expected_error: Estimate
    brier: Estimate


def wilson(successes: int, n: int) -> Estimate:
    """Return a rate with Wilson's score interval, never of width zero.

    `successes`: How many of the rows count.
    `n`: How many rows, each independent of the others.
    Source: Wilson, "Probable inference, the law of succession, and statistical
    inference", JASA 22 (1927).
    """
    if n == 0:
        return undefined(0, "there are no rows")
    low, high = wilson_bounds(successes / n, n)
    return Estimate(successes / n, low, high, n)


def clustered_rate(
    successes: Bool[Tensor, "example"],
    clusters: Sequence[str],
    generator: torch.Generator,
) -> Estimate:
    """Return a rate with an interval over base requests.

    With one row per request this is Wilson's interval. Otherwise it is the cluster
    bootstrap, but never narrower than Wilson's interval on the rows: requests whose
    rows differ in the same way (one wrapper of each works, one fails) vary less than
    chance does, and that is not to be read as certainty. Where all requests have the
    same rate, or the bootstrap touches 0 or 1, it is widened to Wilson's interval on
    the number of *requests*, since resampling cannot show what was never seen.

    `successes`: True where a row counts.
    Source: Korn and Graubard, Survey Methodology 24 (1998), 193-201, for an effective
    number of rows that is never above their number.
    """
    check_lengths(len(successes), clusters)
    n, n_clusters = len(clusters), len(set(clusters))
    if n_clusters == n:
        return wilson(int(successes.sum()), n)
    values = successes.double().cpu()
    rate = float(values.mean())
    if n_clusters == 1:
        return Estimate(rate, *wilson_bounds(rate, 1), n)
    found = bootstrap(_mean_of(values), clusters, generator)
    assert found.low is not None
    assert found.high is not None
    unseen = has_no_width(found) or found.low <= 0 or found.high >= 1
    effective = n_clusters if unseen else n
    return include(found, wilson_bounds(rate, effective))


def clustered_mean(
    values: Float[Tensor, "example"],
    clusters: Sequence[str],
    generator: torch.Generator,
    *,
    bounds: Bounds | None = None,
) -> Estimate:
    """Return a mean over rows with a cluster-bootstrap interval.

    `bounds`: Least and largest value that a row can have, if there are such.
    Returns: The estimate. Where all requests have the same mean its interval is widened
    as `widen_mean` says; only rows that are all the same number, and have no bounds,
    give an interval of width zero, which `require_width` turns into a reason.
    """
    check_lengths(len(values), clusters)
    column = values.detach().double().cpu()
    found = bootstrap(_mean_of(column), clusters, generator)
    if found.value is None:
        return found
    return widen_mean(found, ((column, len(set(clusters))),), bounds)


def mean_difference(
    values: Float[Tensor, "example"],
    clusters: Sequence[str],
    control: Float[Tensor, "_"],
    control_clusters: Sequence[str],
    generator: torch.Generator,
) -> Estimate:
    """Return the mean of a group minus that of its control, with an interval.

    Requests that occur in both groups are drawn for both at once, so the interval is
    that of a paired difference where there are pairs.

    `values`: One number per row of the group.
    `control`: One number per row of the control.
    `control_clusters`: The base request of each control row.
    Returns: The estimate; its `n` counts the rows of both groups.
    """
    check_lengths(len(values), clusters)
    check_lengths(len(control), control_clusters)
    n, n_control = len(values), len(control)
    if n == 0 or n_control == 0:
        empty = "the group" if n == 0 else "its control"
        return undefined(n + n_control, f"{empty} has no rows to compare")
    upper, lower = values.detach().double().cpu(), control.detach().double().cpu()

    def statistic(weights: Tensor) -> Tensor:
        above, below = weights[:, :n], weights[:, n:]
        mean = (above @ upper) / above.sum(1)
        return mean - (below @ lower) / below.sum(1)

    names = [*clusters, *control_clusters]
    found = bootstrap(statistic, names, generator)
    sizes = len(set(clusters)), len(set(control_clusters))
    wide = widen_mean(found, ((upper, sizes[0]), (lower, sizes[1])))
    return require_width(wide)


def pearson(
    first: Float[Tensor, "example"],
    second: Float[Tensor, "example"],
    clusters: Sequence[str],
    generator: torch.Generator,
) -> Estimate:
    """Return Pearson's correlation with an interval over base requests.

    `first`: One number per row.
    `second`: Another number for the same row.
    """
    check_lengths(len(first), second, clusters)
    x, y = first.detach().double().cpu(), second.detach().double().cpu()
    if len(x):
        x, y = x - x.mean(), y - y.mean()

    def statistic(weights: Tensor) -> Tensor:
        share = weights / weights.sum(1, keepdim=True)
        mean_x, mean_y = share @ x, share @ y
        covariance = share @ (x * y) - mean_x * mean_y
        spread_x = share @ (x * x) - mean_x**2
        spread_y = share @ (y * y) - mean_y**2
        product = spread_x.clamp_min(0) * spread_y.clamp_min(0)
        defined = product > 1e-24
        safe = torch.where(defined, product, torch.ones_like(product))
        nothing = torch.full_like(product, torch.nan)
        return torch.where(defined, covariance / safe.sqrt(), nothing).clamp(-1, 1)

    found = bootstrap(statistic, clusters, generator)
    return require_width(found)


def calibration_error(
    probabilities: Float[Tensor, "example"],
    labels: Bool[Tensor, "example"],
    clusters: Sequence[str],
    generator: torch.Generator,
    n_bins: int = 10,
) -> Calibration:
    """Return expected calibration error and Brier score, with intervals.

    `probabilities`: Predicted probability of the positive class, in [0, 1].
    `labels`: True for the positive class.
    `n_bins`: Bins of equal width.
    """
    check_lengths(len(probabilities), labels, clusters)
    predicted = probabilities.detach().double().cpu()
    outcome = labels.double().cpu()
    bins = (predicted * n_bins).long().clamp(0, n_bins - 1)
    gaps = torch.nn.functional.one_hot(bins, n_bins) * (predicted - outcome)[:, None]
    error = bootstrap(
        lambda weights: (weights @ gaps).abs().sum(1) / weights.sum(1),
        clusters,
        generator,
    )
    if error.value is not None and has_no_width(error):
        ends = wilson_bounds(min(1.0, error.value), len(set(clusters)))
        error = include(error, ends)
    square = (predicted - outcome) ** 2
    brier = clustered_mean(square, clusters, generator, bounds=(0.0, 1.0))
    return Calibration(error, brier)


def _mean_of(column: Tensor) -> WeightedStatistic:
    return lambda weights: (weights @ column) / weights.sum(1)
