"""The detectors that are compared: the published one, and what it has to beat."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.errors import InputError, TooFewExamplesError
from holdfast.guard.autoencoder import EPOCHS, Autoencoder, fit_autoencoder
from holdfast.guard.detector import Channel, Detector, SeriesReading, read_off
from holdfast.guard.gaussian import (
    FeatureDistance,
    Mahalanobis,
    Residual,
    fit_features,
    fit_mahalanobis,
    fit_residual,
)
from holdfast.stats.bootstrap import check_lengths

PUBLISHED, STREAMING = TRAINED = "autoencoder", "autoencoder_streaming"
MIN_REQUESTS = 100
"""Base requests that a detector is fitted on, at least."""
Series = Mapping[str, Float[Tensor, "example step"]]
"""What is known of some rows, channel by channel."""


class Candidate(NamedTuple):
    """A detector before it is fitted."""

    channel: Channel  # What it reads.
    # From training rows and channel to the detector; those that are trained take a
    # seed and a number of epochs too.
    fit: Callable[..., Detector]


CANDIDATES: dict[str, Candidate] = {
    PUBLISHED: Candidate("compliance", fit_autoencoder),
    STREAMING: Candidate("compliance", partial(fit_autoencoder, masked=True)),
    "residual": Candidate("compliance", fit_residual),
    "mahalanobis": Candidate("compliance", fit_mahalanobis),
    "mahalanobis_logit": Candidate("compliance_logit", fit_mahalanobis),
    "features": Candidate("compliance", fit_features),
    "dip": Candidate("compliance", partial(read_off, reading="dip")),
    "rebound": Candidate("compliance", partial(read_off, reading="rebound")),
    "probe_mean": Candidate("probe", partial(read_off, reading="mean")),
    "logit_difference": Candidate(
        "logit_difference", partial(read_off, reading="last")
    ),
    "perplexity": Candidate("perplexity", partial(read_off, reading="last")),
    "text": Candidate("text", partial(read_off, reading="dip")),
}
"""Detectors by name; all are fitted on benign rows alone."""
KINDS: dict[str, Callable[..., Detector]] = {
    each.kind: each
    for each in (Autoencoder, Residual, Mahalanobis, FeatureDistance, SeriesReading)
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
    training = {"seed": seed, "epochs": epochs}
    fitted = {
        name: fit(train[channel], channel, **(training if name in TRAINED else {}))
        for name, (channel, fit) in CANDIDATES.items()
        if channel in train
    }
    if not fitted:
        known = sorted({candidate.channel for candidate in CANDIDATES.values()})
        raise InputError(
            f"a channel among {', '.join(known)}",
            ", ".join(train) or "none",
            "Read the signal first.",
        )
    return fitted


def restore(parts: Mapping[str, Any]) -> Detector:
    """Return the detector of which these are the parts, as `Detector.parts` gave them.

    Raises:
        InputError: If the kind is unknown, or parts are missing or too many.
    """
    kind, again = parts.get("kind"), "Fit it again with `holdfast guard fit`."
    if kind not in KINDS:
        raise InputError(f"a detector among {', '.join(KINDS)}", repr(kind), again)
    own = {
        # JSON has lists where the detector has tuples.
        key: tuple(each) if isinstance(each, list) else each
        for key, each in parts.items()
        if key != "kind"
    }
    try:
        return KINDS[kind](**own)
    except TypeError as error:
        what = f"the parts of a detector of the kind {kind}"
        raise InputError(what, str(error), again) from error
