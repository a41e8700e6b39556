"""Fitted detectors as files of a study: tensors in safetensors, all else in JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load, save
from torch import Tensor

from holdfast.errors import InputError
from holdfast.guard.conformal import PathScale, Threshold
from holdfast.guard.detection import Calibrated
from holdfast.guard.detectors import restore
from holdfast.study import Study, atomic_write_bytes

TENSORS, FACTS = "guard/detectors.safetensors", "guard/detectors.json"


class Guard(NamedTuple):
    """The detectors of a study."""

    detectors: dict[str, Calibrated]  # Each with its thresholds, by name.
    facts: dict[str, Any]  # What they belong to: identity of the signal, rows, seed.


def write_guard(
    study: Study, detectors: Mapping[str, Calibrated], facts: Mapping[str, Any]
) -> list[str]:
    """Write fitted detectors."""
    tensors: dict[str, Tensor] = {}
    known: dict[str, Any] = {}
    for name, each in detectors.items():
        parts = each.detector.tensors() | {
            "path_middle": each.scale.middle,
            "path_reach": each.scale.reach,
        }
        tensors |= {f"{name}/{key}": part.contiguous() for key, part in parts.items()}
        known[name] = {
            "detector": each.detector.facts(),
            "thresholds": [found._asdict() for found in each.thresholds.values()],
            "path_thresholds": [
                found._asdict() for found in each.path_thresholds.values()
            ],
        }
    atomic_write_bytes(study.path(TENSORS), save(tensors))
    study.write_json(FACTS, dict(facts) | {"detectors": known})
    return [TENSORS, FACTS]


def read_guard(directory: Path) -> Guard:
    """Read fitted detectors."""
    try:
        facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        tensors = load((directory / TENSORS).read_bytes())
        known = facts.pop("detectors")
        made = {name: _restored(name, each, tensors) for name, each in known.items()}
    # The reader of safetensors raises its own error, which is no ValueError.
    except Exception as error:
        raise InputError(
            f"fitted detectors in {(directory / TENSORS).parent}",
            f"none that can be read ({type(error).__name__}: {error})",
            "Fit them with `holdfast guard fit`.",
        ) from error
    return Guard(made, facts)


def _restored(
    name: str, known: Mapping[str, Any], tensors: Mapping[str, Any]
) -> Calibrated:
    parts = {
        key.removeprefix(f"{name}/"): each
        for key, each in tensors.items()
        if key.startswith(f"{name}/")
    }
    scale = PathScale(parts.pop("path_middle"), parts.pop("path_reach"))
    detector = restore(parts, known["detector"])
    thresholds, path_thresholds = (
        {found["level"]: Threshold(**found) for found in known[kind]}
        for kind in ("thresholds", "path_thresholds")
    )
    return Calibrated(detector, thresholds, scale, path_thresholds)
