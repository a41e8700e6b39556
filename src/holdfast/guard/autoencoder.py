"""The published detector: an autoencoder of benign series, scored by its error."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.guard.detector import Channel, Detector

HIDDEN = (32, 8, 32)
LEARNING_RATE = 1e-3
EPOCHS = 2000
PATIENCE = 200
HELD_BACK = 0.1
"""Share of the training rows on which the end of training is decided."""


@final
@dataclass(frozen=True)
class Autoencoder(Detector):
    """Squared error with which a benign-only autoencoder gives a series back."""

    kind: ClassVar[str] = "autoencoder"

    # Mean of the training rows; stands for steps that are still to come.
    mean: Float[Tensor, "step"]
    # Weights and biases of all layers, one after another.
    parameters: Float[Tensor, "_"]
    hidden: tuple[int, ...]  # Widths of the hidden layers.
    # Whether it was trained on series whose last steps were left out, so that it may be
    # asked before the end.
    masked: bool

    def _score(self, rows: Tensor) -> Tensor:
        steps = rows.shape[1]
        rest = self.mean[steps:].double().expand(len(rows), -1)
        inputs = torch.cat([rows, rest], 1).float()
        given = reconstruct(inputs, self.parameters, self.hidden)
        return (given - inputs)[:, :steps].double().square().sum(1)


def layers(n_steps: int, hidden: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the numbers that go in and out of each layer."""
    return [*pairwise((n_steps, *hidden, n_steps))]


def _lengths(layer: tuple[int, int]) -> tuple[int, int]:
    """Return how many weights and biases a layer has."""
    return layer[0] * layer[1], layer[1]


def reconstruct(
    inputs: Float[Tensor, "example step"],
    parameters: Float[Tensor, "_"],
    hidden: tuple[int, ...],
) -> Float[Tensor, "example step"]:
    """Return what the autoencoder makes of series, with ReLU between layers.

    Args:
        inputs: Series.
        parameters: Weight, then bias, of each layer.
        hidden: Widths of the hidden layers.
    """
    values, sizes = inputs, layers(inputs.shape[1], hidden)
    parts = iter(torch.split(parameters, [n for pair in sizes for n in _lengths(pair)]))
    for index, (n_in, n_out) in enumerate(sizes):
        weight, bias = next(parts).view(n_out, n_in), next(parts)
        values = torch.nn.functional.linear(
            values.relu() if index else values, weight, bias
        )
    return values


def fit_autoencoder(
    train: Float[Tensor, "example step"],
    channel: Channel,
    *,
    seed: int,
    masked: bool = False,
    epochs: int = EPOCHS,
) -> Autoencoder:
    """Train an autoencoder on benign series; the same seed gives the same weights.

    A tenth of the rows is held back: training ends when its error there has not
    fallen for `PATIENCE` epochs, and the best weights are kept. Calibration rows have
    no part in it, or the threshold would lose its guarantee.

    Args:
        train: Benign training rows.
        channel: What they are.
        seed: Fixes first weights, held-back rows and masks.
        masked: Whether to leave out a random number of last steps of each row, anew
            in every epoch, and count the error of the steps that are left.
        epochs: Most passes over all rows.

    Source:
        SRI Guard of https://arxiv.org/abs/2602.02600: layers T-32-8-32-T, squared
        error. Activation, optimiser, rate and length of training are not published;
        ReLU, Adam at 1e-3 and early stopping are ours, and so are masks.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = train.detach().float().cpu()
    mean = rows.double().mean(0).float()
    order = torch.randperm(len(rows), generator=generator)
    n_held = max(1, int(HELD_BACK * len(rows)))
    held, used = rows[order[:n_held]], rows[order[n_held:]]
    parameters = _first_parameters(rows.shape[1], generator)

    def loss(batch: Tensor) -> Tensor:
        kept = _kept(batch, generator) if masked else torch.ones_like(batch)
        inputs = torch.where(kept > 0, batch, mean)
        error = (reconstruct(inputs, parameters, HIDDEN) - batch) * kept
        return error.square().sum(1).mean()

    best, least, since = parameters.detach().clone(), float("inf"), 0
    with torch.enable_grad():
        parameters.requires_grad_(True)
        optimiser = torch.optim.Adam([parameters], lr=LEARNING_RATE)
        for _ in range(epochs):
            optimiser.zero_grad()
            loss(used).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            now = float(loss(held).detach())
            since += 1
            if now < least:
                best, least, since = parameters.detach().clone(), now, 0
            if since >= PATIENCE:
                break
    return Autoencoder(channel, rows.shape[1], mean, best, HIDDEN, masked)


def _first_parameters(n_steps: int, generator: torch.Generator) -> Tensor:
    """Return first weights and biases, uniform within one over the root of n_in."""
    parts = [
        layer[0] ** -0.5 * (2 * torch.rand(length, generator=generator) - 1)
        for layer in layers(n_steps, HIDDEN)
        for length in _lengths(layer)
    ]
    return torch.cat(parts)


def _kept(batch: Tensor, generator: torch.Generator) -> Tensor:
    n_steps = batch.shape[1]
    seen = torch.randint(1, n_steps + 1, (len(batch), 1), generator=generator)
    return (torch.arange(n_steps) < seen).to(batch)
