"""The area under the ROC curve, plain and within strata, with intervals."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from scipy.optimize import brentq
from torch import Tensor

from holdfast.stats.bootstrap import (
    Estimate,
    Z,
    bootstrap,
    check_lengths,
    cluster_indices,
    include,
    require_width,
    undefined,
)


def auroc(scores: Float[Tensor, "example"], labels: Bool[Tensor, "example"]) -> float:
    """Return the chance that a positive scores above a negative; ties count half.

    `scores`: One score a row, higher for the positive class.
    `labels`: True for the positive class.
    Returns: The area under the ROC curve, NaN when a class is empty.
    """
    weights = torch.ones(1, len(scores), dtype=torch.float64)
    wins, pairs = _wins(weights, scores.detach().double().cpu(), labels.cpu())
    return float(wins[0] / pairs[0])


def auroc_interval(
    scores: Float[Tensor, "example"],
    labels: Bool[Tensor, "example"],
    clusters: Sequence[str],
    generator: torch.Generator,
    strata: Sequence[str] | None = None,
) -> Estimate:
    """Return the AUROC, over pairs within strata if given, with an interval.

    A score that only tells the strata apart (the wrapper, the topic) gets 0.5, since
    no pair ever spans two of them. Each stratum weighs as its pairs do.

    `scores`: One score a row, higher for the positive class.
    `labels`: True for the positive class.
    `strata`: What to hold fixed, one name a row; None for nothing.
    Returns: The estimate. Where the bootstrap touches 0 or 1 it is widened by the score
    interval for AUROC, so that perfect separation is no certainty.
    Source: Method 5 of Newcombe, Statistics in Medicine 25 (2006), 559-573, for the
    widening, with the number of requests in each class.
    """
    strata = [""] * len(clusters) if strata is None else strata
    check_lengths(len(scores), labels, strata, clusters)
    column, positive = scores.detach().double().cpu(), labels.cpu()
    stratum, n_strata = cluster_indices(strata)
    members = [torch.nonzero(stratum == index)[:, 0] for index in range(n_strata)]
    mixed = [rows for rows in members if 0 < int(positive[rows].sum()) < len(rows)]
    if not mixed:
        return undefined(len(scores), "no stratum has rows of both classes")

    def statistic(weights: Tensor) -> Tensor:
        parts = [
            _wins(weights[:, rows], column[rows], positive[rows]) for rows in mixed
        ]
        wins, pairs = zip(*parts, strict=True)
        return torch.stack(wins).sum(0) / torch.stack(pairs).sum(0)

    found = bootstrap(statistic, clusters, generator)
    used = torch.cat(mixed).tolist()
    found = found._replace(n=len(used))
    if found.value is None or found.low is None or found.high is None:
        return found
    if found.low > 0 and found.high < 1:
        return found
    counts = [
        len({clusters[row] for row in used if bool(positive[row]) is side})
        for side in (True, False)
    ]
    return include(found, _auroc_bounds(found.value, *counts))


def auroc_difference(
    first: Float[Tensor, "example"],
    second: Float[Tensor, "example"],
    labels: Bool[Tensor, "example"],
    clusters: Sequence[str],
    generator: torch.Generator,
) -> Estimate:
    """Return how far the AUROC of one score exceeds that of another on the same rows.

    `first`: One score a row, higher for the positive class.
    `second`: Another score of the same rows.
    `labels`: True for the positive class.
    Returns: The estimate; undefined with one class alone, or where both scores put all
    rows in the same order, since resampling shows no spread then.
    """
    check_lengths(len(first), second, labels, clusters)
    columns = [each.detach().double().cpu() for each in (first, second)]
    positive = labels.cpu()

    def statistic(weights: Tensor) -> Tensor:
        parts = [_wins(weights, column, positive) for column in columns]
        areas = [wins / pairs for wins, pairs in parts]
        return areas[0] - areas[1]

    found = bootstrap(statistic, clusters, generator)
    return require_width(found)


def _wins(weights: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return weighted wins of positives over negatives, and the weighted pairs."""
    levels, place = torch.unique(scores, return_inverse=True)
    shape = (len(weights), len(levels))
    positives = torch.zeros(shape, dtype=torch.float64)
    negatives = torch.zeros(shape, dtype=torch.float64)
    positives.index_add_(1, place[labels], weights[:, labels])
    negatives.index_add_(1, place[~labels], weights[:, ~labels])
    below = negatives.cumsum(1) - negatives / 2
    return (positives * below).sum(1), positives.sum(1) * negatives.sum(1)


def _auroc_bounds(
    value: float, n_positive: int, n_negative: int
) -> tuple[float, float]:
    """Solve for the AUROCs whose standard error just reaches `value`."""
    extra = (n_positive + n_negative) / 2 - 1

    def excess(theta: float) -> float:
        unequal = (1 - theta) / (2 - theta) + theta / (1 + theta)
        variance = theta * (1 - theta) * (1 + extra * unequal)
        return (theta - value) ** 2 - Z * Z * variance / (n_positive * n_negative)

    # At 0 and 1 the equation has a second root, the value itself: step off it.
    low = 0.0 if value <= 0 else float(brentq(excess, 0.0, min(value, 1 - 1e-9)))
    high = 1.0 if value >= 1 else float(brentq(excess, max(value, 1e-9), 1.0))
    return low, high
