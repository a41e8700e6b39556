"""The linear refusal probe: logistic regression on hidden states, written out.

Two of them are fitted. The published one tells refusals from everything else; the
control removes what a stratum (the wrapper) adds before it looks, so that it cannot
score by telling wrappers apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from holdfast.errors import TooFewExamplesError
from holdfast.stats.bootstrap import check_lengths, cluster_indices

L2_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
FOLDS = 5
MAX_ITERATIONS = 500


@dataclass(frozen=True)
class Probe:
    """A fitted probe: `logit(h) = weight · ((h - mean) / scale) + bias`."""

    weight: Float[Tensor, "d_model"]  # Weights on standardised states.
    bias: float  # Logit of a state at the mean.
    mean: Float[Tensor, "d_model"]  # Mean of the training states.
    # Standard deviation of the training states; 1 where they do not vary.
    scale: Float[Tensor, "d_model"]
    l2: float  # The penalty that cross-validation chose.

    def raw(self) -> tuple[Float[Tensor, "d_model"], float]:
        """Return direction and offset with `logit = direction · h + offset`."""
        direction = self.weight / self.scale
        return direction, self.bias - float(direction @ self.mean)

    def logit(self, states: Float[Tensor, "*position d_model"]) -> Tensor:
        """Return the logit of each state, in the probe's own dtype and on its device.

        Args:
            states: Hidden states; what comes before the last axis is kept.

        Returns:
            `[*position]`: positive where the probe reads refusal.
        """
        centred = states.to(self.weight) - self.mean
        return (centred / self.scale) @ self.weight + self.bias

    def score(self, states: Float[Tensor, "*position d_model"]) -> Tensor:
        """Return the probability of refusal that the probe reads off each state."""
        return torch.sigmoid(self.logit(states))


def fit_probe(
    states: Float[Tensor, "example d_model"],
    labels: Bool[Tensor, "example"],
    *,
    clusters: Sequence[str],
    seed: int,
    l2_grid: Sequence[float] = L2_GRID,
    folds: int = FOLDS,
) -> Probe:
    """Fit a class-balanced logistic probe; cross-validation chooses the penalty.

    The objective is the weighted mean log-loss plus `l2 / 2` times the squared norm
    of the weights on standardised states. Folds keep base requests whole.

    Args:
        states: One hidden state a row.
        labels: True for refusal.
        clusters: The base request of each row.
        seed: Fixes the folds.
        l2_grid: Penalties to try.
        folds: Folds of the cross-validation.

    Returns:
        The probe with the penalty of least held-out log-loss (the larger, if equal),
        fitted on all rows in float64.

    Raises:
        TooFewExamplesError: If a class has fewer base requests than there are folds.

    Source:
        The refusal prober of https://arxiv.org/abs/2510.06036, which uses Adam for
        five epochs without a penalty; this is fitted to convergence, with one.
    """
    check_lengths(len(states), labels, clusters)
    features, outcome = states.detach().double().cpu(), labels.cpu()
    _require_both_classes(outcome, clusters, folds)
    mean, scale = _standards(features)
    fold = _assign_folds(outcome, clusters, seed, folds)
    l2 = _choose_l2(features, outcome, fold, sorted(l2_grid, reverse=True))
    inputs, basis = _in_row_span((features - mean) / scale)
    weight, bias = _fit_logistic(inputs, outcome, l2)
    weight = weight if basis is None else basis @ weight
    return Probe(weight, bias, mean, scale, l2)


def fit_stratified_probe(
    states: Float[Tensor, "example d_model"],
    labels: Bool[Tensor, "example"],
    strata: Sequence[str],
    *,
    clusters: Sequence[str],
    seed: int,
    l2_grid: Sequence[float] = L2_GRID,
    folds: int = FOLDS,
) -> Probe:
    """Fit the control probe: differences within strata only.

    From each state the midpoint of its stratum's two class means is subtracted.
    Strata with one class say nothing about the difference and are left out. The
    probe is put back at the average midpoint, so that it applies to raw states.

    Args:
        states: One hidden state a row.
        labels: True for refusal.
        strata: What to hold fixed (the wrapper), one name a row.
        clusters: The base request of each row.
        seed: Fixes the folds.
        l2_grid: Penalties to try.
        folds: Folds of the cross-validation.

    Returns:
        A probe whose logit is relative to the average stratum.

    Raises:
        TooFewExamplesError: If no stratum has both classes, or too few requests have.
    """
    check_lengths(len(states), labels, strata, clusters)
    features, outcome = states.detach().double().cpu(), labels.cpu()
    stratum, n_strata = cluster_indices(strata)
    rows: list[int] = []
    centred, middles = [], []
    for index in range(n_strata):
        members = torch.nonzero(stratum == index)[:, 0]
        here, positive = features[members], outcome[members]
        if not 0 < int(positive.sum()) < len(members):
            continue
        middle = (here[positive].mean(0) + here[~positive].mean(0)) / 2
        centred.append(here - middle)
        middles.append(middle.expand_as(here))
        rows += members.tolist()
    if not rows:
        raise TooFewExamplesError(
            "a stratum with refused and complied rows",
            f"{n_strata} strata with one class each",
            "Add prompts, so that a wrapper sometimes works and sometimes fails.",
        )
    probe = fit_probe(
        torch.cat(centred),
        outcome[rows],
        clusters=[clusters[row] for row in rows],
        seed=seed,
        l2_grid=l2_grid,
        folds=folds,
    )
    mean = probe.mean + torch.cat(middles).mean(0)
    return Probe(probe.weight, probe.bias, mean, probe.scale, probe.l2)


def _require_both_classes(labels: Tensor, clusters: Sequence[str], least: int) -> None:
    counts = [
        len(
            {
                name
                for name, label in zip(clusters, labels, strict=True)
                if label == side
            }
        )
        for side in (True, False)
    ]
    if min(counts) < least:
        raise TooFewExamplesError(
            f"at least {least} base requests in each class, one per fold",
            f"{counts[0]} positive and {counts[1]} negative",
            "Add prompts of the rarer outcome, or use fewer --folds.",
        )


def _standards(features: Tensor) -> tuple[Tensor, Tensor]:
    mean, scale = features.mean(0), features.std(0, correction=0)
    # A coordinate that varies by rounding alone must not be blown up to unit size.
    flat = scale <= 1e-10 * (1 + mean.abs())
    return mean, torch.where(flat, torch.ones_like(scale), scale)


def _assign_folds(
    labels: Tensor, clusters: Sequence[str], seed: int, folds: int
) -> Int[Tensor, "example"]:
    """Deal whole clusters to folds, class by class, so that each fold has both."""
    indices, n_clusters = cluster_indices(clusters)
    positive = torch.zeros(n_clusters).index_add_(0, indices, labels.float())
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(n_clusters, generator=generator)
    # Stable sorting keeps the shuffled order within clusters of the same share.
    size = torch.zeros(n_clusters).index_add_(0, indices, torch.ones(len(indices)))
    order = shuffled[torch.argsort((positive / size)[shuffled], stable=True)]
    fold_of_cluster = torch.empty(n_clusters, dtype=torch.int64)
    fold_of_cluster[order] = torch.arange(n_clusters) % folds
    return fold_of_cluster[indices]


def _choose_l2(
    features: Tensor, labels: Tensor, fold: Tensor, grid: Sequence[float]
) -> float:
    """Return the penalty of least held-out balanced log-loss; `grid` falls."""
    if len(grid) == 1:
        return grid[0]
    losses = torch.zeros(len(grid), dtype=torch.float64)
    for index in sorted(set(fold.tolist())):
        train, held_out = fold != index, fold == index
        mean, scale = _standards(features[train])
        inputs, basis = _in_row_span((features[train] - mean) / scale)
        others = (features[held_out] - mean) / scale
        others = others if basis is None else others @ basis
        start = None
        weights = _balance(labels)[held_out]
        for column, l2 in enumerate(grid):
            start = _fit_logistic(inputs, labels[train], l2, start)
            logits = others @ start[0] + start[1]
            losses[column] += (weights * _log_loss(logits, labels[held_out])).sum()
    return grid[int(losses.argmin())]


def _in_row_span(features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return features in a basis of their rows' span, and the basis, if that is less.

    The optimum lies in the span, and the penalty is the same in any such basis.
    """
    if features.shape[1] <= features.shape[0]:
        return features, None
    basis = torch.linalg.qr(features.T).Q
    return features @ basis, basis


def _fit_logistic(
    inputs: Tensor,
    labels: Tensor,
    l2: float,
    start: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, float]:
    """Minimise the penalised balanced log-loss by L-BFGS, from `start`."""
    theta = torch.zeros(inputs.shape[1] + 1, dtype=torch.float64)
    if start is not None:
        theta[:-1], theta[-1] = start
    balance = _balance(labels)
    theta.requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [theta],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        logits = inputs @ theta[:-1] + theta[-1]
        penalty = l2 / 2 * theta[:-1].square().sum()
        loss = (balance * _log_loss(logits, labels)).sum() + penalty
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimiser.step(closure)  # type: ignore[no-untyped-call]
    found = theta.detach()
    return found[:-1].clone(), float(found[-1])


def _balance(labels: Tensor) -> Tensor:
    """Return row weights that sum to 1, half of it in each class."""
    positive = labels.double()
    share = positive.mean()
    each = torch.where(labels, 0.5 / share, 0.5 / (1 - share))
    return each / len(labels)


def _log_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.softplus(torch.where(labels, -logits, logits))
