"""Probes as files of a study: tensors in safetensors, everything else in JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from holdfast.cliff.probe import Probe
from holdfast.errors import InputError
from holdfast.models.model import ModelIdentity
from holdfast.study import Study, atomic_write_bytes, file_sha256
from holdfast.study.directory import is_current

FOLDER = "probes"
_OWN = ("weights_sha256", "template_sha256")


def names(name: str) -> tuple[str, str]:
    """Return the two files of a probe: its tensors and its facts."""
    return f"{FOLDER}/{name}.safetensors", f"{FOLDER}/{name}.json"


def write_probe(
    study: Study, name: str, probe: Probe, facts: dict[str, Any], **more: Tensor
) -> None:
    """Write a probe with what is known about it."""
    tensors_name, facts_name = names(name)
    tensors = {
        "weight": probe.weight,
        "bias": torch.tensor([probe.bias], dtype=probe.weight.dtype),
        "mean": probe.mean,
        "scale": probe.scale,
    }
    data = save({key: value.contiguous() for key, value in (tensors | more).items()})
    atomic_write_bytes(study.path(tensors_name), data)
    study.write_json(facts_name, facts | {"l2": probe.l2})


def read_probe(study: Study, name: str) -> tuple[Probe, dict[str, Tensor]]:
    """Read a probe and the directions beside it.

    Raises:
        InputError: If it is missing or damaged.
    """
    tensors_name, facts_name = names(name)
    study.input_hash(tensors_name)
    l2 = float(study.read_json(facts_name)["l2"])
    return _unpack(study.path(tensors_name), l2)


def _unpack(path: Path, l2: float) -> tuple[Probe, dict[str, Tensor]]:
    """Read the tensors of a probe."""
    try:
        tensors = load(path.read_bytes())
        probe = Probe(
            tensors.pop("weight"),
            float(tensors.pop("bias")),
            tensors.pop("mean"),
            tensors.pop("scale"),
            l2,
        )
    # The reader of safetensors raises its own error, which is no ValueError.
    except Exception as error:
        raise InputError(
            f"a probe in {path}",
            f"a damaged file ({error})",
            "Remove it and run `holdfast probe` again.",
        ) from error
    return probe, tensors


class Direction(NamedTuple):
    """A probe read from a file, and the hash of that file."""

    probe: Probe
    sha256: str


def read_direction(source: str, identity: ModelIdentity) -> Direction:
    """Read a probe by its path, and refuse one that was fitted on another model.

    Raises:
        InputError: If there is no whole probe, or it belongs to another model.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / names("published")[0]
    path, facts_path = path.with_suffix(".safetensors"), path.with_suffix(".json")
    try:
        facts = json.loads(facts_path.read_text(encoding="utf-8"))
        found, l2 = dict(facts.get("model") or {}), float(facts["l2"])
        digest = file_sha256(path)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"a probe at {source}: a study, or a file of its folder {FOLDER}",
            f"none that can be read ({type(error).__name__}: {error})",
            "Fit one with `holdfast audit` or `holdfast probe`.",
        ) from error
    own = {key: getattr(identity, key) for key in _OWN}
    if different := _different(own, found):
        raise InputError(
            f"a probe of {identity.model_id}",
            f"one that was fitted on a model that differs in {different}",
            "Fit one on this model; a probe reads no other.",
        )
    return Direction(_unpack(path, l2)[0], digest)


def _different(own: Mapping[str, str], known: Mapping[str, Any]) -> str:
    """Return in what the model of a probe differs from one; empty if it is the same."""
    return ", ".join(key for key in own if known.get(key) != own[key])


def model_fingerprint(study: Study) -> dict[str, str]:
    """Return what a probe belongs to: weights and chat template of a model."""
    model = study.manifest["model"]
    return {key: model[key] for key in _OWN}


def check_current(study: Study) -> None:
    """Refuse a probe that was fitted on other answers, or on other verdicts.

    A study without a probe passes: whoever reads it says what is missing.
    """
    fitted = study.path(names("published")[1]).exists()
    if fitted and study.record("probe") and not is_current(study, "probe"):
        raise InputError(
            f"a probe fitted on the answers and verdicts in {study.directory}",
            "one of earlier answers, or of another judge's verdicts",
            "Run `holdfast probe` on the study again.",
        )


def read_own_probe(study: Study, name: str) -> tuple[Probe, dict[str, Tensor]]:
    """Read a probe, and refuse one that was fitted on another model or template.

    Raises:
        InputError: If it is missing, damaged, or not of the study's model.
    """
    facts = study.read_json(names(name)[1])
    if different := _different(model_fingerprint(study), facts.get("model") or {}):
        raise InputError(
            f"a probe of the model and the chat template of {study.directory}",
            f"one that differs in {different}",
            "Run `holdfast probe` on this study; a probe fits no other model.",
        )
    return read_probe(study, name)
