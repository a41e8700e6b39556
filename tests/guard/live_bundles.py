"""Bundles of random directions, whose readings a test can work out by itself."""

import torch

from holdfast.guard.conformal import Threshold
from holdfast.guard.monitor.bundle import Bundle, Calibration, Direction, Serving
from holdfast.guard.monitor.rules import ANY, LiveDetector, Scale
from holdfast.models.interventions import head_factors

RATE = 0.01
DETECTORS = (
    LiveDetector("end", "a", "thinking", "end"),
    LiveDetector("cliff", "a", "thinking", "cliff"),
    LiveDetector("mean", "a", "thinking", "rolling", 4),
    LiveDetector("segment", "b", "answer", "segment", 4, 3),
    LiveDetector("hesitation", "b", "answer", "hesitation", 2, band=1.0),
    LiveDetector("last", "b", "answer", "last"),
)
LONG = {"prompt": 10_000, "thinking": 10_000, "answer": 10_000}


def threshold(value):
    return Threshold(value, RATE, 0.0, 0.02, 1000, 1000)


def random_bundle(adapter, limits=(), **changes):
    """A bundle of a model; `limits` gives thresholds, others are never passed."""
    draws = torch.Generator().manual_seed(0)
    identity = adapter.identity
    given = {
        "model": {
            "id": identity.model_id,
            "weights_sha256": identity.weights_sha256,
            "template_sha256": identity.template_sha256,
        },
        "serving": Serving(dtype=identity.dtype),
        "detectors": DETECTORS,
        "directions": {
            name: Direction(torch.randn(adapter.d_model, generator=draws), 0.5)
            for name in ("a", "b")
        },
        "thresholds": {
            name: {RATE: threshold(dict(limits).get(name, float("inf")))}
            for name in (*(each.name for each in DETECTORS), ANY)
        },
        "scales": {each.name: Scale((0.0, 1.0, 2.0, 3.0)) for each in DETECTORS},
        "calibration": Calibration(
            1000, 1000, {"benign": 1000}, "0" * 64, LONG, ("LATIN",)
        ),
        "edit": head_factors(adapter, [(0, 1), (1, 2), (2, 3)], -2.0),
        "acts_on": "last",
    }
    return Bundle(**given | changes)
