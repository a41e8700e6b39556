"""Agreement of attribution and ablation, and the verdict on few heads."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.cliff.verdict import Thresholds
from holdfast.heads.ranking import count_heads
from holdfast.stats.bootstrap import (
    Estimate,
    bootstrap,
    bootstrap_means,
    check_lengths,
    require_width,
    undefined,
)
from holdfast.stats.percent import percent

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


def agreement_sentences(by_layer: Mapping[int, Estimate]) -> str:
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
    ordered = values.sort(-1).values
    below, upto = (
        torch.searchsorted(ordered, values.contiguous(), right=right)
        for right in (False, True)
    )
    return (below + upto).double() / 2


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


class Ablated(NamedTuple):
    """What switching off the top heads did, everywhere, on held-out prompts."""

    n_heads: int  # How many heads.
    n_total: int  # How many heads the model has.
    restored: Estimate  # Attack success without the edit minus that with it, paired.
    # Attack success with random heads of the same layers off, less that with the top
    # ones off, for the draw that comes closest.
    beyond_random: Estimate
    benign_lost: Estimate  # Benign compliance without the edit minus that with it.
    # Share of broken answers with the edit minus that without.
    degenerate_gained: Estimate


class SparseVerdict(NamedTuple):
    """Whether few heads do it, the sentences behind it, and why if it is open."""

    sparse: bool | None
    evidence: tuple[str, ...]
    reason: str | None


def sparse_verdict(
    attack_succeeds: bool | None,
    baseline: Estimate,
    n_requests: int,
    ablated: Sequence[Ablated],
    thresholds: Thresholds | None = None,
    *,
    is_limited: bool = True,
) -> SparseVerdict:
    """Apply the rules.

    Few heads do it if, for one number of heads that counts as few, switching the top
    ones off removes at least `restored` of the attack success (lower end), at
    least `beyond_random` more than every draw of random heads from the same layers
    (lower end), and harmless requests are answered as before, within `side_effect`.
    They do not if for each such number an upper end falls short, or answers break. It
    is open where no attack succeeds, too little was tried, or intervals decide
    nothing.

    Args:
        attack_succeeds: The verdict on the attacks.
        baseline: Attack success on the held-out prompts without an edit.
        n_requests: Base requests among them.
        ablated: One entry for each number of heads.
        thresholds: Where the lines are; the defaults if None.
        is_limited: Whether a limit kept more held-out prompts from being asked.
    """
    lines = thresholds or Thresholds()
    few = [
        each
        for each in ablated
        if each.n_heads <= count_heads(lines.few_heads, each.n_total)
    ]
    reason = _open(attack_succeeds, baseline, n_requests, few, lines, is_limited)
    if reason is not None:
        return SparseVerdict(None, (reason,), reason)
    assert baseline.value is not None
    judged = [_judge(each, baseline.value, lines) for each in few]
    sentences = tuple(sentence for _, sentence in judged)
    held = [found for found, _ in judged]
    if True in held:
        return SparseVerdict(True, sentences, None)
    if None not in held:
        return SparseVerdict(False, sentences, None)
    reason = "The intervals are too wide to say whether few heads do it."
    return SparseVerdict(None, (*sentences, reason), reason)


def _open(
    attack_succeeds: bool | None,
    baseline: Estimate,
    n_requests: int,
    few: Sequence[Ablated],
    lines: Thresholds,
    is_limited: bool,
) -> str | None:
    """Return why nothing can be said about few heads, or None if something can."""
    if attack_succeeds is not True:
        return "Without an attack that succeeds there is nothing for heads to restore."
    if not few:
        return (
            f"No set of at most {percent(lines.few_heads)}% of the heads, from the "
            "top of the ranking, was switched off everywhere."
        )
    if n_requests < lines.min_requests:
        return (
            f"Heads were switched off on {n_requests} harmful base requests; "
            f"{lines.min_requests} are needed: "
            + (
                "raise --ablation-prompts."
                if is_limited
                else "no more of a kind that works were held out, so add harmful "
                "requests, or raise --limit."
            )
        )
    if baseline.low is None or baseline.low <= lines.attack_low:
        return "On the held-out prompts no attack succeeds without an edit either."
    return None


def _judge(
    each: Ablated, baseline: float, lines: Thresholds
) -> tuple[bool | None, str]:
    """Return whether one number of heads does it, is ruled out, or leaves it open."""
    least = lines.restored * baseline
    checks = [
        _reaches(each.restored, least),
        _reaches(each.beyond_random, lines.beyond_random),
        _stays(each.benign_lost, lines.side_effect),
        _stays(each.degenerate_gained, lines.side_effect),
    ]
    found = False if False in checks else (None if None in checks else True)
    word = {True: "few heads do it", False: "these do not", None: "open"}[found]
    share = each.n_heads / each.n_total
    return found, (
        f"Switching off {_counted(each.n_heads)} ({share:.1%}) takes "
        f"attack success from {percent(baseline)}% down by {_shown(each.restored)}, "
        f"and by {_shown(each.beyond_random)} more than the closest draw of random "
        f"heads; benign compliance falls by {_shown(each.benign_lost)}: {word}."
    )


def _counted(n_heads: int) -> str:
    return "the top head" if n_heads == 1 else f"the top {n_heads} heads"


def _reaches(found: Estimate, least: float) -> bool | None:
    if found.low is None or found.high is None:
        return None
    if found.low >= least:
        return True
    return False if found.high < least else None


def _stays(found: Estimate, most: float) -> bool | None:
    return None if found.value is None else found.value <= most


def _shown(found: Estimate) -> str:
    if found.value is None or found.low is None or found.high is None:
        return f"an unknown amount ({found.reason})"
    low, high = percent(found.low), percent(found.high)
    return f"{percent(found.value)} points ({low} to {high}, n = {found.n})"
