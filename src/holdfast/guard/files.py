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
_THRESHOLDS = "thresholds", "path_thresholds"


class Guard(NamedTuple):
    """The detectors of a study."""

    detectors: dict[str, Calibrated]  # Each with its thresholds, by name.
    facts: dict[str, Any]  # What they belong to: identity of the signal, rows, seed.


def write_guard(study: Study, guard: Guard) -> list[str]:
    """Write fitted detectors; returns the names of the files."""
    tensors: dict[str, Tensor] = {}
    records: dict[str, Any] = {}
    for name, each in guard.detectors.items():
        scale = {"path_middle": each.scale.middle, "path_reach": each.scale.reach}
        parts = each.detector.parts() | scale
        own = {key: part for key, part in parts.items() if isinstance(part, Tensor)}
        tensors |= {f"{name}/{key}": part.contiguous() for key, part in own.items()}
        records[name] = {
            "detector": {key: part for key, part in parts.items() if key not in own}
        }
        for kind in _THRESHOLDS:
            by_level = getattr(each, kind).values()
            records[name][kind] = [threshold._asdict() for threshold in by_level]
    atomic_write_bytes(study.path(TENSORS), save(tensors))
    study.write_json(FACTS, guard.facts | {"detectors": records})
    return [TENSORS, FACTS]


def read_guard(directory: Path) -> Guard:
    """Read fitted detectors."""
    try:
        facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        tensors = load((directory / TENSORS).read_bytes())
        records = facts.pop("detectors")
        detectors = {name: _read(name, each, tensors) for name, each in records.items()}
    # The reader of safetensors raises its own error, which is no ValueError.
    except Exception as error:
        raise InputError(
            f"fitted detectors in {(directory / TENSORS).parent}",
            f"none that can be read ({type(error).__name__}: {error})",
            "Fit them with `holdfast guard fit`.",
        ) from error
    return Guard(detectors, facts)


def _read(
    name: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Calibrated:
    own = {
        key.removeprefix(f"{name}/"): each
        for key, each in tensors.items()
        if key.startswith(f"{name}/")
    }
    scale = PathScale(own.pop("path_middle"), own.pop("path_reach"))
    thresholds, path_thresholds = (
        {each["level"]: Threshold(**each) for each in record[kind]}
        for kind in _THRESHOLDS
    )
    detector = restore(record["detector"] | own)
    return Calibrated(detector, thresholds, scale, path_thresholds)
