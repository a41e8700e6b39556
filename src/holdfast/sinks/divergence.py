"""Sink divergence: do heads look at the first token more on harmful text?

The sink mass of a head on a text is the mean attention weight of the first token over
the later ones. Its divergence is the mass on harmful text minus that on reference text.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.errors import InputError
from holdfast.stats.bootstrap import (
    LEVEL,
    Estimate,
    bootstrap,
    bootstrap_differences,
    bootstrap_means,
    check_lengths,
    cluster_indices,
    has_no_width,
    include,
    resamples_of,
    undefined,
)
from holdfast.stats.rates import clustered_mean

UNSEEN = (
    "this layer has no attention, or some text no query in it that sees the first token"
)


class SinkFigures(NamedTuple):
    """What was found of every head, layer by layer, and of all of them."""

    harmful: tuple[Estimate, ...]  # Mean sink mass of each head on harmful text.
    reference: tuple[Estimate, ...]  # The same on reference text.
    divergence: tuple[Estimate, ...]  # The difference of both.
    positive: Estimate  # How many heads have a divergence above 0.
    # Mean over heads of the divergence where it is positive, which is what Surgery adds
    # to a loss. Noise alone makes it positive.
    penalty: Estimate
    mean_divergence: Estimate  # Mean over heads of the divergence.
    # Positive heads if no head diverged and prompts differed as they do; its ends hold
    # 95 % of that null. Heads that rise and fall together make it wide.
    by_chance: Estimate
    mean_harmful: Estimate  # Mean over heads of the mass on harmful text.
    mean_reference: Estimate  # Mean over heads of the mass on reference text.
    n_above: int  # Heads whose interval lies above 0.
    n_below: int  # Heads whose interval lies below 0.
    n_measured: int  # Heads that could be measured.


def sink_divergence(
    harmful: Float[Tensor, "example layer head"],
    reference: Float[Tensor, "_ layer head"],
) -> Float[Tensor, "layer head"]:
    """Return the mean sink mass on harmful text minus that on reference text.

    With rows in pairs it is the mean of the paired differences as well.

    Args:
        harmful: Sink mass of each harmful text, with gradient if there is one.
        reference: Sink mass of each reference text; as many or not.

    Source:
        Equation 3 of https://arxiv.org/abs/2602.05228, as its code and those who cite
        it give it.
    """
    return harmful.mean(0) - reference.mean(0)


def sink_penalty(divergence: Float[Tensor, "layer head"]) -> Float[Tensor, ""]:
    """Return the mean over heads of what is positive in the divergence.

    Args:
        divergence: As `sink_divergence` gives it.

    Source:
        The regulariser of https://arxiv.org/abs/2602.05228, without its factor.
    """
    return divergence.relu().mean()


def paired_sinks(
    harmful: Float[Tensor, "example layer head"],
    reference: Float[Tensor, "example layer head"],
    clusters: Sequence[str],
    generator: torch.Generator,
) -> SinkFigures:
    """Estimate divergences from pairs: two texts on one prompt, over equal positions.

    Args:
        harmful: Sink mass of the harmful text of each pair; not a number where it
            could not be read.
        reference: Sink mass of the reference text of each pair.
        clusters: The prompt of each pair; prompts are what is drawn.
        generator: Source of randomness, on the CPU.

    Raises:
        InputError: If the columns differ in length, or there is no pair.
    """
    check_lengths(len(harmful), reference, clusters)
    _require_rows(len(clusters))
    upper, lower, measured = _measured(harmful, reference)
    difference = upper - lower

    def divergence(weights: Tensor) -> Tensor:
        return (weights @ difference) / weights.sum(1, keepdim=True)

    found = bootstrap_means(difference, clusters, generator)
    sides = (upper, clusters), (lower, clusters)
    return _figures(divergence, found, clusters, sides, measured, generator)


def unpaired_sinks(
    harmful: Float[Tensor, "example layer head"],
    harmful_clusters: Sequence[str],
    reference: Float[Tensor, "_ layer head"],
    reference_clusters: Sequence[str],
    generator: torch.Generator,
) -> SinkFigures:
    """Estimate divergences from two groups of texts, as the published code does.

    The groups may differ in length and in prompts, and both move the sink mass.

    Args:
        harmful: Sink mass of each harmful text.
        harmful_clusters: The prompt of each.
        reference: Sink mass of each reference text.
        reference_clusters: The prompt of each; one that occurs in both groups is
            drawn for both at once.
        generator: Source of randomness, on the CPU.

    Raises:
        InputError: If columns differ in length, or a group is empty.
    """
    check_lengths(len(harmful), harmful_clusters)
    check_lengths(len(reference), reference_clusters)
    _require_rows(min(len(harmful), len(reference)))
    upper, lower, measured = _measured(harmful, reference)
    n = len(upper)

    def divergence(weights: Tensor) -> Tensor:
        above, below = weights[:, :n], weights[:, n:]
        mean = (above @ upper) / above.sum(1, keepdim=True)
        return mean - (below @ lower) / below.sum(1, keepdim=True)

    found = bootstrap_differences(
        upper, harmful_clusters, lower, reference_clusters, generator
    )
    clusters = [*harmful_clusters, *reference_clusters]
    sides = (upper, harmful_clusters), (lower, reference_clusters)
    return _figures(divergence, found, clusters, sides, measured, generator)


def _figures(
    divergence: Callable[[Tensor], Tensor],
    heads: Sequence[Estimate],
    clusters: Sequence[str],
    sides: tuple[tuple[Tensor, Sequence[str]], tuple[Tensor, Sequence[str]]],
    measured: Tensor,
    generator: torch.Generator,
) -> SinkFigures:
    """Return all figures, from the divergence of a resample and both groups."""
    upper, lower = sides
    return SinkFigures(
        _spread(bootstrap_means(*upper, generator), measured),
        _spread(bootstrap_means(*lower, generator), measured),
        _spread(heads, measured),
        *_over_heads(divergence, heads, clusters, generator),
        _over_rows(*upper, generator),
        _over_rows(*lower, generator),
        *_signs(heads),
        int(measured.sum()),
    )


def _require_rows(n: int) -> None:
    if not n:
        raise InputError("harmful and reference texts to compare", "none", "Give both.")


def _measured(harmful: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both groups with one column per head, and which heads were measured."""
    upper, lower = (
        each.detach().double().cpu().flatten(1) for each in (harmful, reference)
    )
    measured = upper.isfinite().all(0) & lower.isfinite().all(0)
    return upper[:, measured], lower[:, measured], measured


def _spread(found: Sequence[Estimate], measured: Tensor) -> tuple[Estimate, ...]:
    """Put the estimates back to their heads, and a reason to all others."""
    known = iter(found)
    n = found[0].n if found else 0
    missing = undefined(n, UNSEEN)
    return tuple(next(known) if each else missing for each in measured.tolist())


def _over_heads(
    divergence: Callable[[Tensor], Tensor],
    heads: Sequence[Estimate],
    clusters: Sequence[str],
    generator: torch.Generator,
) -> tuple[Estimate, Estimate, Estimate, Estimate]:
    """Return count of positive heads, penalty, mean divergence, and count by chance."""
    if not heads:
        return (undefined(len(clusters), UNSEEN),) * 4

    def count(weights: Tensor) -> Tensor:
        drawn = divergence(weights)
        # A resample without a row of one group has no divergence, and no count.
        unknown = torch.where(drawn.isnan(), drawn, 0.0).sum(1)
        return (drawn > 0).double().sum(1) + unknown

    positive = bootstrap(count, clusters, generator)
    if has_no_width(positive):
        # Where all resamples agree, heads whose own interval holds 0 may go either way.
        above, below = _signs(heads)
        exact = sum(each.value == 0 and has_no_width(each) for each in heads)
        ends = (float(above), float(len(heads) - below - exact))
        positive = include(positive, ends)
    return (
        positive,
        bootstrap(lambda drawn: divergence(drawn).relu().mean(1), clusters, generator),
        bootstrap(lambda drawn: divergence(drawn).mean(1), clusters, generator),
        _by_chance(divergence, clusters, generator),
    )


def _over_rows(
    masses: Tensor, clusters: Sequence[str], generator: torch.Generator
) -> Estimate:
    if not masses.shape[1]:
        return undefined(len(clusters), UNSEEN)
    return clustered_mean(masses.mean(1), clusters, generator)


def _by_chance(
    divergence: Callable[[Tensor], Tensor],
    clusters: Sequence[str],
    generator: torch.Generator,
) -> Estimate:
    """Count positive heads in resamples whose mean was subtracted."""
    n = len(clusters)
    indices, n_clusters = cluster_indices(clusters)
    if n_clusters < 2:
        return undefined(n, "one base request alone gives no interval")
    centre = divergence(torch.ones(1, n, dtype=torch.float64))
    drawn = [
        divergence(weights) - centre
        for weights in resamples_of(indices, n_clusters, generator)
    ]
    replicates = torch.cat(drawn)
    counts = (replicates > 0).double().sum(1)[~replicates.isnan().any(1)]
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(counts, torch.tensor([tail, 1 - tail]).double()).tolist()
    return Estimate(float(counts.mean()), low, high, n)


def _signs(found: Sequence[Estimate]) -> tuple[int, int]:
    """Return how many intervals lie above and below 0; one of no width says nothing."""
    sure = [each for each in found if each.low is not None and not has_no_width(each)]
    above = sum(each.low is not None and each.low > 0 for each in sure)
    below = sum(each.high is not None and each.high < 0 for each in sure)
    return above, below
