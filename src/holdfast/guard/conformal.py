"""Thresholds with a stated rate of false positives, on whole responses and on the way.

A threshold is an order statistic of scores on benign rows that nothing was fitted on.
If a further benign row is exchangeable with them it is flagged at the stated rate or
less, however the detector works. That says nothing of benign rows of another kind.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.stats import beta
from torch import Tensor

from holdfast.errors import InputError, TooFewExamplesError
from holdfast.stats.bootstrap import LEVEL, check_lengths, cluster_indices

HIGH_QUANTILE = 0.95
MIN_REACH = 0.1
"""Spread of a step, beside the largest of all steps, below which it is not believed."""


class Threshold(NamedTuple):
    """A score above which a row is flagged."""

    value: float  # The threshold; a score equal to it is not flagged.
    # Rate of false positives that it does not exceed, on average over calibration sets.
    level: float
    low: float  # Lower end of what the rate of this one threshold is, with 95 % chance.
    high: float  # Upper end.
    n: int  # Calibration rows.
    n_requests: int  # Base requests among them.


class PathScale(NamedTuple):
    """What makes scores of different steps comparable."""

    # Median score of benign training rows after each step.
    middle: Float[Tensor, "step"]
    reach: Float[Tensor, "step"]  # From there to their 95 % quantile.


def conformal_threshold(
    scores: Float[Tensor, "example"], clusters: Sequence[str], level: float
) -> Threshold:
    """Return the least threshold that flags a further benign row at most so often.

    With one row per request it is the `ceil((n + 1) (1 - level))`-th smallest score.
    With several, each request has the same weight, and the rate is that of a row of
    a request that was never seen.

    Args:
        scores: Scores of benign calibration rows, on which nothing was fitted.
        clusters: The base request of each row.
        level: Rate of false positives, in (0, 1).

    Returns:
        The threshold. Its `low` and `high` are the Beta distribution of the rate of
        an order statistic, with requests for rows; they need continuous scores.

    Raises:
        TooFewExamplesError: If there are too few requests for so low a rate.
        InputError: If columns have different lengths, or a score is not finite.

    Source:
        Split conformal prediction, as in https://arxiv.org/abs/1604.04173; weights by
        request as in https://arxiv.org/abs/2306.06342. The published detector takes
        the plain 99 % quantile of 200 rows.
    """
    check_lengths(len(scores), clusters)
    if not bool(torch.isfinite(scores).all()):
        raise InputError(
            "finite scores",
            "a score that is not a number or infinite",
            "Look for rows whose signal could not be read.",
        )
    request, n_requests = cluster_indices(clusters)
    needed = math.ceil(round(1 / level, 9)) - 1
    if n_requests < needed:
        raise TooFewExamplesError(
            f"at least {needed} benign calibration requests for a rate of {level:g}",
            f"{n_requests}",
            "Add benign requests, or allow more false positives (--rates).",
        )
    size = torch.bincount(request, minlength=n_requests).double()
    weight = 1 / (size[request] * (n_requests + 1))
    ordered, order = scores.detach().double().cpu().sort(stable=True)
    # A sum of weights may fall short of a round number by rounding alone.
    reached = weight[order].cumsum(0) >= 1 - level - 1e-9
    rank = math.ceil(round((n_requests + 1) * (1 - level), 9))
    rate = beta(n_requests + 1 - rank, rank)
    return Threshold(
        value=float(ordered[int(reached.int().argmax())]),
        level=level,
        low=float(rate.ppf((1 - LEVEL) / 2)),
        high=float(rate.ppf((1 + LEVEL) / 2)),
        n=len(scores),
        n_requests=n_requests,
    )


def fit_path_scale(prefixes: Float[Tensor, "example step"]) -> PathScale:
    """Return median and reach of the scores of benign training rows at every step.

    A step at which all rows score nearly the same has a tenth of the largest reach,
    since it must not decide alone.
    """
    rows = prefixes.detach().double().cpu()
    middle = rows.quantile(0.5, dim=0)
    reach = rows.quantile(HIGH_QUANTILE, dim=0) - middle
    least = MIN_REACH * float(reach.max())
    return PathScale(middle, reach.clamp_min(least if least > 0 else 1.0))


def running_maximum(
    prefixes: Float[Tensor, "example step"], scale: PathScale
) -> Float[Tensor, "example step"]:
    """Return the highest scaled score of each row so far.

    Its last column is one number per row, so that one threshold on it holds for all
    steps at once: however often a response is looked at, the rate is the stated one.
    """
    scaled = (prefixes.double().cpu() - scale.middle) / scale.reach
    return scaled.cummax(1).values


def first_flagged(
    path: Float[Tensor, "example step"], threshold: Threshold
) -> Int[Tensor, "example"]:
    """Return the first step, from 0, at which a `running_maximum` is flagged.

    Returns:
        The number of steps where there is none.
    """
    above = path > threshold.value
    return torch.where(above.any(1), above.int().argmax(1), path.shape[1])
