"""The detectors that are compared: the published one, and what it has to beat."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.errors import InputError, TooFewExamplesError
from holdfast.guard.autoencoder import EPOCHS, Autoencoder, fit_autoencoder
from holdfast.guard.detector import Channel, Detector, Read, Reading
from holdfast.guard.gaussian import (
    FeatureDistance,
    Mahalanobis,
    Residual,
    fit_features,
    fit_mahalanobis,
    fit_residual,
)
from holdfast.stats.bootstrap import check_lengths

PUBLISHED = "autoencoder"
MIN_REQUESTS = 100
"""Base requests that a detector is fitted on, at least."""
Series = Mapping[Channel, Float[Tensor, "example step"]]
"""What is known of some rows, channel by channel."""


class Training(NamedTuple):
    """How the detectors that are trained are trained.

    Attributes:
        seed: Fixes everything that is drawn.
        epochs: Most passes over the training rows.
    """

    seed: int
    epochs: int


Fit = Callable[[Tensor, Channel, Training], Detector]


class Candidate(NamedTuple):
    """A detector before it is fitted.

    Attributes:
        channel: What it reads.
        fit: From training rows, channel and training to the detector.
    """

    channel: Channel
    fit: Fit


def _read(reading: Reading) -> Fit:
    return lambda rows, channel, _: Read(channel, rows.shape[1], reading)


def _autoencoder(masked: bool) -> Fit:
    return lambda rows, channel, training: fit_autoencoder(
        rows, channel, seed=training.seed, epochs=training.epochs, masked=masked
    )


CANDIDATES: dict[str, Candidate] = {
    PUBLISHED: Candidate("compliance", _autoencoder(masked=False)),
    "autoencoder_streaming": Candidate("compliance", _autoencoder(masked=True)),
    "residual": Candidate(
        "compliance", lambda rows, channel, _: fit_residual(rows, channel)
    ),
    "mahalanobis": Candidate(
        "compliance", lambda rows, channel, _: fit_mahalanobis(rows, channel)
    ),
    "mahalanobis_logit": Candidate(
        "compliance_logit", lambda rows, channel, _: fit_mahalanobis(rows, channel)
    ),
    "features": Candidate(
        "compliance", lambda rows, channel, _: fit_features(rows, channel)
    ),
    "dip": Candidate("compliance", _read("dip")),
    "rebound": Candidate("compliance", _read("rebound")),
    "probe_mean": Candidate("probe", _read("mean")),
    "logit_difference": Candidate("logit_difference", _read("last")),
    "perplexity": Candidate("perplexity", _read("last")),
    "text": Candidate("text", _read("dip")),
}
"""Detectors by name; all are fitted on benign rows alone."""
KINDS: dict[str, Callable[..., Detector]] = {
    each.kind: each
    for each in (Autoencoder, Residual, Mahalanobis, FeatureDistance, Read)
}


def fit_detectors(
    train: Series,
    clusters: Sequence[str],
    *,
    seed: int,
    min_requests: int = MIN_REQUESTS,
    epochs: int = EPOCHS,
) -> dict[str, Detector]:
    """Fit every detector whose channel is there.

    Args:
        train: Benign training rows, by channel.
        clusters: The base request of each row.
        seed: Fixes the autoencoders.
        min_requests: Base requests that there must be.
        epochs: Most epochs of the autoencoders.

    Returns:
        Detectors by name, in the order of `CANDIDATES`.

    Raises:
        TooFewExamplesError: If there are too few requests; gives the counts.
        InputError: If there is no channel, columns have different lengths, a series
            has one step only, or a number is not finite.
    """
    for rows in train.values():
        check_lengths(len(rows), clusters)
        if rows.shape[1] < 2 or not bool(torch.isfinite(rows).all()):
            raise InputError(
                "series of two steps or more, all of them finite",
                f"{rows.shape[1]} steps, or a number that is not finite",
                "Read the signal over more steps.",
            )
    n_requests = len(set(clusters))
    if n_requests < min_requests:
        raise TooFewExamplesError(
            f"at least {min_requests} benign training requests",
            f"{n_requests}",
            "Add benign requests, or lower --min-train and trust the detectors less.",
        )
    training = Training(seed, epochs)
    made = {
        name: candidate.fit(train[candidate.channel], candidate.channel, training)
        for name, candidate in CANDIDATES.items()
        if candidate.channel in train
    }
    if not made:
        known = sorted({candidate.channel for candidate in CANDIDATES.values()})
        raise InputError(
            f"a channel among {', '.join(known)}",
            ", ".join(train) or "none",
            "Read the signal first.",
        )
    return made


def restore(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Detector:
    """Return the detector of which these are the tensors and facts.

    Args:
        tensors: What `Detector.tensors` returned.
        facts: What `Detector.facts` returned.

    Raises:
        InputError: If the kind is unknown, or parts are missing or too many.
    """
    known = dict(facts)
    kind = known.pop("kind", None)
    if kind not in KINDS:
        raise InputError(
            f"a detector among {', '.join(KINDS)}",
            repr(kind),
            "Fit it again with `holdfast guard fit`.",
        )
    parts = {
        # JSON has lists where the detector has tuples.
        key: tuple(each) if isinstance(each, list) else each
        for key, each in known.items()
    }
    try:
        return KINDS[kind](**parts, **tensors)
    except TypeError as error:
        raise InputError(
            f"the parts of a detector of the kind {kind}",
            str(error),
            "Fit it again with `holdfast guard fit`.",
        ) from error
