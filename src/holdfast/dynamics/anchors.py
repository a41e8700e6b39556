"""Anchors of the step-wise signal: what complying and refusing look like, step by step.

One pair of mean states per step. They are means over outcomes, not over prompts alone:
a harmless request that was refused, or a harmful one that was answered, is on neither
side, unless the filter is switched off.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from holdfast.errors import EvidenceError, InputError, TooFewExamplesError
from holdfast.stats.bootstrap import check_lengths, cluster_indices

MIN_COUNT = 20
"""Base requests that each side must have."""
MIN_SEPARATION = 1e-6
"""Cosine distance of a pair of anchors below which it is rounding."""
N_LENGTH_BINS = 4


class Anchors(NamedTuple):
    """A pair of mean states for every step."""

    # Mean state of harmless requests that were complied with.
    compliant: Float[Tensor, "step d_model"]
    # Mean state of harmful requests that were refused.
    refused: Float[Tensor, "step d_model"]
    n_compliant: int  # Base requests behind the first.
    n_refused: int  # Base requests behind the second.


def fit_anchors(
    states: Float[Tensor, "example step d_model"],
    harmful: Bool[Tensor, "example"],
    refused: Bool[Tensor, "example"],
    *,
    clusters: Sequence[str],
    filtered: bool = True,
    strata: Sequence[str] | None = None,
    min_count: int = MIN_COUNT,
) -> Anchors:
    """Average the states of both sides at every step.

    Args:
        states: Pooled state of each row at each step.
        harmful: Whether the request is harmful.
        refused: Whether the answer is a refusal.
        clusters: The base request of each row, by which rows are counted.
        filtered: Whether harmless requests count only where they were complied with
            and harmful ones only where they were refused. Without it outcomes are
            not looked at; for a base model that refuses nothing.
        strata: Topic and length of each row (`topic_length_strata`). Both sides are
            then given the same share of every stratum, and strata with one side
            alone are left out, so that neither topic nor length tells them apart.
        min_count: Base requests that each side must have.

    Returns:
        The anchors, in float32; means are taken in float64.

    Raises:
        TooFewExamplesError: If a side has too few requests; gives the counts.
        EvidenceError: If the two anchors are the same at some step.
        InputError: If columns have different lengths, or a state is not finite.

    Source:
        Section 3.1 of https://arxiv.org/abs/2602.02600; the filter is that of the
        authors' code. Counting requests, and strata, are ours.
    """
    check_lengths(len(states), harmful, refused, clusters, strata or clusters)
    if not bool(torch.isfinite(states).all()):
        raise InputError(
            "finite states",
            "a state that is not a number or infinite",
            "Read the states in float32.",
        )
    harmful, refused = harmful.cpu(), refused.cpu()
    sides = (~harmful, harmful)
    if filtered:
        sides = (~harmful & ~refused, harmful & refused)
    weights = _weights(sides, strata)
    counts = [
        len({name for name, each in zip(clusters, side.tolist(), strict=True) if each})
        for side in weights
    ]
    if min(counts) < max(1, min_count):
        raise _too_few(counts, min_count, filtered, strata is not None)
    rows = states.detach().double().cpu()
    means = [torch.einsum("e,esd->sd", side / side.sum(), rows) for side in weights]
    anchors = Anchors(means[0].float(), means[1].float(), *counts)
    apart = separation(anchors)
    if float(apart.min()) < MIN_SEPARATION:
        raise EvidenceError(
            "anchors of complying and refusing that differ at every step",
            f"a cosine distance of {float(apart.min()):.1e} at step "
            f"{int(apart.argmin()) + 1}",
            "Begin where the answer begins, or check that outcomes and states belong "
            "to the same rows.",
        )
    return anchors


def separation(anchors: Anchors) -> Float[Tensor, "step"]:
    """Return the cosine distance between the two anchors at every step."""
    return cosine_distance(anchors.compliant.double(), anchors.refused.double())


def cosine_distance(
    first: Float[Tensor, "*example d_model"], second: Float[Tensor, "*other d_model"]
) -> Tensor:
    """Return one minus the cosine of the angle between vectors.

    It is computed as half the squared distance of unit vectors, which keeps its
    precision where the vectors are nearly parallel. A vector of length zero has the
    same distance, 0.5, from every other. What comes before the last axis is broadcast.
    """
    least = torch.finfo(first.dtype).tiny
    units = (normalize(each, dim=-1, eps=least) for each in (first, second))
    return torch.sub(*units).square().sum(-1) / 2


def topic_length_strata(
    topics: Sequence[str | None], lengths: Sequence[int]
) -> list[str]:
    """Return the topic and the bin of length of each row, as one name.

    Bins hold as many rows each as ties allow; no topic is a topic of its own.

    Raises:
        InputError: If the columns have different lengths.
    """
    check_lengths(len(topics), lengths)
    if not lengths:
        return []
    column = torch.tensor(lengths, dtype=torch.float64)
    edges = torch.quantile(column, torch.linspace(0, 1, N_LENGTH_BINS + 1).double())[
        1:-1
    ]
    # A row on an edge goes with those below it.
    bins = torch.searchsorted(edges, column).tolist()
    return [f"{topic}/{place}" for topic, place in zip(topics, bins, strict=True)]


def _weights(
    sides: tuple[Tensor, Tensor], strata: Sequence[str] | None
) -> list[Tensor]:
    """Return how much each row counts on either side."""
    if strata is None:
        return [side.double() for side in sides]
    stratum, n_strata = cluster_indices(strata)
    counts = torch.stack(
        [torch.bincount(stratum[side], minlength=n_strata) for side in sides]
    ).double()
    common = counts.min(0).values
    share = torch.where(counts > 0, common / counts.clamp_min(1), 0.0)
    return [
        side.double() * part[stratum] for side, part in zip(sides, share, strict=True)
    ]


def _too_few(
    counts: list[int], min_count: int, filtered: bool, matched: bool
) -> TooFewExamplesError:
    names = ("complied with", "refused") if filtered else ("harmless", "harmful")
    where = " of the topics and lengths that both sides have" if matched else ""
    step = "Add requests of the rarer kind"
    if matched:
        step += ", lower --min-anchors, or use anchors that are not matched"
    elif filtered and counts[1] < min_count:
        step += "; for a model that refuses nothing, do not filter (--unfiltered)"
    return TooFewExamplesError(
        f"at least {max(1, min_count)} base requests on each side{where}",
        f"{counts[0]} {names[0]} and {counts[1]} {names[1]}",
        f"{step}.",
    )
