"""From estimates to the figures of a report, and the randomness behind intervals."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from holdfast.report.schema import figure
from holdfast.stats.bootstrap import Draws, Estimate, undefined
from holdfast.study.directory import Study

DIGITS = 6


def figure_of(estimate: Estimate) -> dict[str, Any]:
    """Return a figure of the report, rounded to what could ever matter."""
    rounded: dict[str, Any] = dict(figure(estimate))
    for key in ("value", "low", "high"):
        if rounded[key] is not None:
            rounded[key] = round(rounded[key], DIGITS)
    if estimate.bounds is not None:
        rounded["bounds"] = [round(end, DIGITS) for end in estimate.bounds]
    if estimate.n_unjudged:
        rounded["unjudged"] = estimate.n_unjudged
    return rounded


def null_figures(names: Iterable[str], reason: str) -> dict[str, Any]:
    """Return figures that are all null, for one reason."""
    return {name: figure_of(undefined(0, reason)) for name in names}


def estimate_of(figure: dict[str, Any]) -> Estimate:
    """Return the estimate that `figure_of` wrote."""
    bounds = figure.get("bounds")
    return Estimate(
        figure["value"],
        figure["low"],
        figure["high"],
        figure["n"],
        figure.get("reason"),
        None if bounds is None else (bounds[0], bounds[1]),
        figure.get("unjudged", 0),
    )


def generator(seed: int, name: str) -> torch.Generator:
    """Return a source of randomness for one figure.

    Each figure has its own, so that one more figure changes none of the others.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draws_of(seed: int, prefix: str) -> Draws:
    """Return the sources of randomness of figures whose names begin alike."""
    return lambda name: generator(seed, f"{prefix}/{name}")


def study_seed(study: Study) -> int:
    """Return the seed that the study was made with."""
    if "settings" not in study.manifest:
        stage = "generate" if study.record("generate") else "sinks"
        return int(study.record(stage)["settings"]["seed"])
    return int(study.manifest["settings"]["rollout"]["seed"])
