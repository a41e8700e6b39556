"""The same prompts under two conditions: what changed, and whether that is chance."""

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from scipy.optimize import brentq
from scipy.stats import binomtest
from torch import Tensor

from holdfast.errors import InputError
from holdfast.stats.bootstrap import (
    Estimate,
    Z,
    check_lengths,
    cluster_indices,
    has_no_width,
    include,
    require_width,
    undefined,
)
from holdfast.stats.rates import clustered_mean

MIN_DISCORDANT = 10
"""Base requests that change, below which resampling them shows too little."""
EXACT_REQUESTS = 12
N_FLIPS = 10_000


class McNemar(NamedTuple):
    """McNemar's exact test.

    Attributes:
        gained: Rows that are true after and were not before.
        lost: Rows that were true before and are not after.
        p_value: Two-sided, if each change is as likely in either direction.
    """

    gained: int
    lost: int
    p_value: float


def mcnemar(
    after: Bool[Tensor, "example"],
    before: Bool[Tensor, "example"],
    clusters: Sequence[str],
) -> McNemar:
    """Test whether a rate differs between two conditions on the same prompts.

    `after`: Outcome under one condition.
    `before`: Outcome of the same row under the other.
    `clusters`: The base request of each row; each may occur once, since the test takes
    rows for independent.

    Raises:
        InputError: If a base request has several rows; `sign_flip` is for those.
    Source: McNemar, "Note on the sampling error of the difference between correlated
    proportions or percentages", Psychometrika 12 (1947), in its exact form.
    """
    check_lengths(len(after), before, clusters)
    if len(set(clusters)) < len(clusters):
        raise InputError(
            "one row for each base request",
            f"{len(clusters)} rows of {len(set(clusters))} requests",
            "Use `sign_flip`, which keeps the rows of a request together.",
        )
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    n_changed = gained + lost
    chance = float(binomtest(gained, n_changed).pvalue) if n_changed else 1.0
    return McNemar(gained, lost, chance)


def sign_flip(
    after: Float[Tensor, "example"],
    before: Float[Tensor, "example"],
    clusters: Sequence[str],
    generator: torch.Generator,
    n_flips: int = N_FLIPS,
) -> float:
    """Return the two-sided p-value of a paired difference, by flipping requests.

    If the conditions were the same, each base request's difference would be as
    likely with either sign. With one row per request and outcomes of 0 and 1 this is
    McNemar's exact test.

    `after`: Number of each row under one condition.
    `before`: Number of the same row under the other.
    `generator`: Source of randomness, on the CPU; not used where few requests differ,
    since all signs are tried then.
    `n_flips`: Draws of signs.
    """
    check_lengths(len(after), before, clusters)
    indices, n_clusters = cluster_indices(clusters)
    difference = after.double().cpu() - before.double().cpu()
    sums = torch.zeros(n_clusters, dtype=torch.float64)
    sums = sums.index_add(0, indices, difference)
    sums = sums[sums != 0]
    # A rounding error must not make a draw smaller than the data it repeats.
    least = sums.sum().abs() * (1 - 1e-12)
    if len(sums) <= EXACT_REQUESTS:
        signs = torch.tensor(list(product((-1.0, 1.0), repeat=len(sums))))
        return float(((signs.double() @ sums).abs() >= least).double().mean())
    draws = torch.randint(2, (n_flips, len(sums)), generator=generator)
    reached = ((2.0 * draws.double() - 1) @ sums).abs() >= least
    return (1 + int(reached.sum())) / (1 + n_flips)


def paired_difference(
    after: Float[Tensor, "example"] | Bool[Tensor, "example"],
    before: Float[Tensor, "example"] | Bool[Tensor, "example"],
    clusters: Sequence[str],
    generator: torch.Generator,
) -> Estimate:
    """Return the mean of `after - before` with an interval over base requests.

    What the interval is where resampling shows no spread depends on what is compared.
    Outcomes that are true or false go to `paired_rate_difference`, whose interval has
    an honest width also where nothing changed. Numbers whose requests all differ by
    the same mean get the spread of their rows (see `widen_mean`). Numbers that all
    differ by the very same amount show no spread from which a width could come, and
    unlike a rate they have no bounds either: there is no interval, and a reason.

    `after`: Number of each row under one condition, or its outcome.
    `before`: Number of the same row under the other, or its outcome.
    """
    check_lengths(len(after), before, clusters)
    if after.dtype == before.dtype == torch.bool:
        return paired_rate_difference(after, before, clusters, generator)
    difference = after.double() - before.double()
    found = clustered_mean(difference, clusters, generator)
    if found.value is None:
        return found
    sizes = torch.stack([after.double().abs().max(), before.double().abs().max()])
    return require_width(found, max(1e-12, float(sizes.max())))


def paired_rate_difference(
    after: Bool[Tensor, "example"],
    before: Bool[Tensor, "example"],
    clusters: Sequence[str],
    generator: torch.Generator,
) -> Estimate:
    """Return the difference of two rates on the same prompts, never of width zero.

    With one row per request this is Tango's score interval. Otherwise it is the
    cluster bootstrap; where fewer than `MIN_DISCORDANT` requests change it is
    widened to Tango's interval on the number of *requests*, since resampling cannot
    show a change that was never seen.

    `after`: Outcome under one condition.
    `before`: Outcome of the same row under the other.
    """
    check_lengths(len(after), before, clusters)
    n, n_clusters = len(clusters), len(set(clusters))
    if n == 0:
        return undefined(0, "there are no rows")
    gained, lost = after & ~before, before & ~after
    value = float((gained.double() - lost.double()).mean())
    rows = n_clusters / n
    low, high = tango(rows * int(gained.sum()), rows * int(lost.sum()), n_clusters)
    if n_clusters in (1, n):
        return Estimate(value, low, high, n)
    found = clustered_mean(
        after.double() - before.double(),
        clusters,
        generator,
    )
    changed = (gained | lost).tolist()
    names = {name for name, other in zip(clusters, changed, strict=True) if other}
    # Where every request changes alike, resampling has no spread to show.
    if len(names) >= MIN_DISCORDANT and not has_no_width(found):
        return found
    return include(found, (low, high))


def tango(gained: int | float, lost: int | float, n: int) -> tuple[float, float]:
    """Return Tango's score interval for a difference of paired rates.

    `gained`: Rows that are true after and were not before.
    `lost`: Rows that were true before and are not after.
    `n`: All rows.
    Returns: Lower and upper end.
    Source: Tango, "Equivalence test and confidence interval for the difference in
    proportions for the paired-sample design", Statistics in Medicine 17 (1998).
    """
    centre = (gained - lost) / n

    def squared(difference: float) -> float:
        a = 2.0 * n
        b = -gained - lost + (2 * n - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        both = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = n * (2 * both + difference * (1 - difference))
        gap = gained - lost - n * difference
        return gap * gap - Z * Z * max(variance, 0.0)

    ends = []
    for edge in (-1.0, 1.0):
        # The score is 0 at the centre itself, also where the variance is.
        near = centre + 1e-9 * (edge - centre)
        found = edge
        if near != edge:
            found = float(brentq(squared, near, edge, xtol=1e-12))
        ends.append(found)
    return ends[0], ends[1]
