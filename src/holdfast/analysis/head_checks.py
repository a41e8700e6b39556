"""Whether the closed form and taking a head away say the same, layer by layer."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.analysis.bootstrap import (
    Estimate,
    bootstrap,
    check_lengths,
    undefined,
)
from holdfast.analysis.means import bootstrap_means
from holdfast.analysis.widening import require_width

MIN_HEADS = 3
"""Fewest heads of a layer over which a rank correlation says anything."""


def rank_agreement(
    contributions: Float[Tensor, "example head"],
    effects: Float[Tensor, "example head"],
    layers: Sequence[int],
    clusters: Sequence[str],
    generator: torch.Generator,
) -> dict[int, Estimate]:
    """Return Spearman's correlation of mean contributions and effects, by layer.

    Args:
        contributions: Closed-form contribution of each head that was checked.
        effects: What taking it away does to the logit; positive where it had held
            the logit down, so that agreement is positive.
        layers: The layer of each head.
        clusters: The base request of each example.
        generator: Source of randomness, on the CPU.

    Returns:
        For each layer, in order, the correlation over its checked heads, with an
        interval over base requests: it says what other requests would change, not
        other heads. Its `n` counts examples.
    """
    check_lengths(len(contributions), effects, clusters)
    check_lengths(contributions.shape[1], layers)
    written, caused = contributions.double().cpu(), effects.double().cpu()
    found = {}
    for layer in sorted(set(layers)):
        places = [i for i, other in enumerate(layers) if other == layer]
        if len(places) < MIN_HEADS:
            reason = f"{len(places)} heads were checked, fewer than {MIN_HEADS}"
            found[layer] = undefined(len(clusters), reason)
            continue
        one, other = written[:, places], caused[:, places]

        def correlation(
            weights: Tensor, one: Tensor = one, other: Tensor = other
        ) -> Tensor:
            share = weights / weights.sum(1, keepdim=True)
            return _pearson(_ranks(share @ one), _ranks(share @ other))

        found[layer] = bootstrap(correlation, clusters, generator)
    return found


def agreement_in_words(by_layer: Mapping[int, Estimate]) -> str:
    """Say in which layers the two orders of heads agree, and in which they do not.

    Args:
        by_layer: What `rank_agreement` returned.

    Returns:
        Sentences for a report.
    """
    known = {i: found for i, found in by_layer.items() if found.low is not None}
    agree = [i for i, found in known.items() if found.low is not None and found.low > 0]
    rest = [i for i in known if i not in agree]
    unknown = [i for i in by_layer if i not in known]
    sentences = []
    if agree:
        sentences.append(
            f"In {_named(agree)}, heads that contribute more in closed form also "
            "change the final logit more when they are taken away."
        )
    if rest:
        sentences.append(
            f"In {_named(rest)}, the two orders do not clearly agree: the closed form "
            "sees what a head writes to the final state directly, and not what later "
            "layers make of it. Trust the causal effect there."
        )
    if unknown:
        sentences.append(
            f"In {_named(unknown)}, too few heads or requests were checked to compare."
        )
    return " ".join(sentences) or "No head was checked causally."


def excess_over_controls(
    effects: Float[Tensor, "example"],
    controls: Float[Tensor, "example _"],
    clusters: Sequence[str],
    generator: torch.Generator,
) -> Estimate:
    """Return how far an effect exceeds the closest of its controls, request by request.

    Args:
        effects: Effect of taking a head, or heads, away.
        controls: The same for each random control.
        clusters: The base request of each example.
        generator: Source of randomness, on the CPU.

    Returns:
        The paired difference with the lowest lower end. The effect is beyond every
        control where that is above 0. Where a difference is the same number on every
        row there is no interval, and a reason instead: no sign is read off one point.
    """
    check_lengths(len(effects), controls, clusters)
    differences = effects.double()[:, None] - controls.double()
    scale = max(1e-12, float(differences.abs().max())) if differences.numel() else 1.0
    found = [
        require_width(each, scale)
        for each in bootstrap_means(differences, clusters, generator)
    ]
    if not found:
        return undefined(len(clusters), "there is no control to compare with")
    return min(found, key=lambda e: float("-inf") if e.low is None else e.low)


def _ranks(values: Float[Tensor, "_ head"]) -> Float[Tensor, "_ head"]:
    """Return ranks along the last axis; equal values share their mean rank."""
    one, other = values[..., :, None], values[..., None, :]
    return (other < one).double().sum(-1) + (other == one).double().sum(-1) / 2


def _pearson(one: Tensor, other: Tensor) -> Tensor:
    one = one - one.mean(-1, keepdim=True)
    other = other - other.mean(-1, keepdim=True)
    spread = (one.square().sum(-1) * other.square().sum(-1)).sqrt()
    # 0 / 0, where all ranks are equal, is not a number and says so.
    return (one * other).sum(-1) / spread


def _named(layers: Sequence[int]) -> str:
    """Return layers in words, runs of them as ranges."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    word = "layer" if len(layers) == 1 else "layers"
    if len(parts) == 1:
        return f"{word} {parts[0]}"
    return f"{word} {', '.join(parts[:-1])} and {parts[-1]}"
