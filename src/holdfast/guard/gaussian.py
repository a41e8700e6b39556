"""Detectors that know mean and covariance of benign series."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.dynamics.trajectories import recovery_features
from holdfast.guard.detector import Channel, Detector

MIN_VARIANCE = 1e-6
"""Mean variance below which a benign series counts as having this one: a signal that
is the same for all training rows to a thousandth."""
MIN_DEVIATION = 0.05
"""Standard deviation below which a feature counts as having this one."""
N_COMPONENTS = 8
"""Dimensions of the plane of whole series: the narrowest layer of the autoencoder."""


class Covariance(NamedTuple):
    """A covariance that was shrunk towards a multiple of the identity."""

    matrix: Float[Tensor, "step step"]  # The covariance.
    shrinkage: float  # Share of the multiple of the identity in it.


def ledoit_wolf(centred: Float[Tensor, "example step"]) -> Covariance:
    """Return the shrunk covariance of rows whose mean is 0.

    Source:
        Ledoit and Wolf, "A well-conditioned estimator for large-dimensional
        covariance matrices", Journal of Multivariate Analysis 88 (2004). The mean
        variance is never taken below `MIN_VARIANCE`.
    """
    n, width = centred.shape
    sample = centred.T @ centred / n
    level = sample.diagonal().mean()
    target = torch.eye(width, dtype=centred.dtype) * level
    apart = (sample - target).square().sum()
    rows = centred.square().sum(1).square().sum() / n
    noise = torch.minimum((rows - sample.square().sum()) / n, apart)
    shrinkage = float(noise / apart) if float(apart) > 0 else 1.0
    matrix = (1 - shrinkage) * sample + shrinkage * target
    lacking = max(0.0, MIN_VARIANCE - float(level))
    matrix = matrix + lacking * torch.eye(width, dtype=centred.dtype)
    return Covariance(matrix, shrinkage)


@final
@dataclass(frozen=True)
class Mahalanobis(Detector):
    """Squared Mahalanobis distance from benign series.

    After t steps it is the distance in the first t coordinates: the leading block of
    the covariance is their covariance, and its factor the leading block of the factor.
    """

    kind: ClassVar[str] = "mahalanobis"

    mean: Float[Tensor, "step"]  # Mean of the training rows.
    factor: Float[Tensor, "step step"]  # Lower Cholesky factor of their covariance.
    shrinkage: float  # Share of the identity in the covariance.

    def _score(self, rows: Tensor) -> Tensor:
        steps = rows.shape[1]
        away = (rows - self.mean[:steps]).T
        return _whitened(self.factor[:steps, :steps], away).square().sum(0)


@final
@dataclass(frozen=True)
class Residual(Detector):
    """Squared distance from the plane in which benign series vary most.

    After t of T steps the plane is that of the first t coordinates, with its
    dimensions in the same proportion.
    """

    kind: ClassVar[str] = "residual"

    mean: Float[Tensor, "step"]  # Mean of the training rows.
    # Orthonormal basis of each prefix, filled up with zeros.
    bases: Float[Tensor, "step step _"]

    def _score(self, rows: Tensor) -> Tensor:
        steps = rows.shape[1]
        away = rows - self.mean[:steps]
        basis = self.bases[steps - 1, :steps]
        return (away - away @ basis @ basis.T).square().sum(1)


@final
@dataclass(frozen=True)
class FeatureDistance(Detector):
    """Squared Mahalanobis distance in `recovery_features` of the series so far."""

    kind: ClassVar[str] = "features"

    # Mean of the features of the training rows, after each step.
    mean: Float[Tensor, "step _"]
    # Lower Cholesky factor of their covariance, after each step.
    factor: Float[Tensor, "step _ _"]
    deviation: Float[Tensor, "step _"]  # Their standard deviations, after each step.

    def _score(self, rows: Tensor) -> Tensor:
        last = rows.shape[1] - 1
        away = recovery_features(rows).columns() - self.mean[last]
        scaled = (away / self.deviation[last]).T
        return _whitened(self.factor[last], scaled).square().sum(0)


def fit_mahalanobis(
    train: Float[Tensor, "example step"], channel: Channel
) -> Mahalanobis:
    """Fit mean and covariance of benign series."""
    rows = train.detach().double().cpu()
    mean = rows.mean(0)
    found = ledoit_wolf(rows - mean)
    factor = torch.linalg.cholesky(found.matrix)
    return Mahalanobis(channel, rows.shape[1], mean, factor, found.shrinkage)


def fit_residual(
    train: Float[Tensor, "example step"],
    channel: Channel,
    n_components: int = N_COMPONENTS,
) -> Residual:
    """Fit the planes in which benign series, and their prefixes, vary most."""
    rows = train.detach().double().cpu()
    n_steps = rows.shape[1]
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / len(rows)
    n_components = min(n_components, n_steps)
    bases = torch.zeros(n_steps, n_steps, n_components, dtype=torch.float64)
    for steps in range(1, n_steps + 1):
        kept = n_components * steps // n_steps
        # Eigenvalues rise, so that the last directions are those of most variance.
        directions = torch.linalg.eigh(covariance[:steps, :steps]).eigenvectors
        bases[steps - 1, :steps, :kept] = directions[:, steps - kept :]
    return Residual(channel, n_steps, mean, bases)


def fit_features(
    train: Float[Tensor, "example step"], channel: Channel
) -> FeatureDistance:
    """Fit mean and covariance of the features of benign series, after each step."""
    rows = train.detach().double().cpu()
    means, factors, deviations = [], [], []
    for steps in range(1, rows.shape[1] + 1):
        columns = recovery_features(rows[:, :steps]).columns()
        means.append(columns.mean(0))
        # Features have different units, so each is measured by its own spread.
        deviations.append(columns.std(0, correction=0).clamp_min(MIN_DEVIATION))
        centred = (columns - means[-1]) / deviations[-1]
        factors.append(torch.linalg.cholesky(ledoit_wolf(centred).matrix))
    parts = [torch.stack(part) for part in (means, factors, deviations)]
    return FeatureDistance(channel, rows.shape[1], *parts)


def _whitened(factor: Tensor, columns: Tensor) -> Tensor:
    white: Tensor = torch.linalg.solve_triangular(factor, columns, upper=False)
    return white
