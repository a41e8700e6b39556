"""Anchors as files of a study, which know what they belong to and refuse all else."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load, save

from holdfast.analysis.anchors import Anchors
from holdfast.errors import InputError
from holdfast.study import Study, atomic_write_bytes, file_sha256

FOLDER = "anchors"
PUBLISHED, MATCHED = "published", "matched"
_NEXT = "Fit anchors with these settings: run `holdfast signal` without --anchors."


class Anchored(NamedTuple):
    """Anchors that were read.

    Attributes:
        anchors: The anchors.
        sha256: Hash of their file.
        taken: Base requests that they were fitted on.
        matched_reason: Why there are no matched ones beside them, if there are none.
    """

    anchors: Anchors
    sha256: str
    taken: frozenset[str]
    matched_reason: str | None


def names(name: str) -> tuple[str, str]:
    """Return the two files of anchors: their tensors and their facts."""
    return f"{FOLDER}/{name}.safetensors", f"{FOLDER}/{name}.json"


def write_anchors(
    study: Study,
    name: str,
    anchors: Anchors,
    identity: Mapping[str, Any],
    taken: Iterable[str],
    **facts: Any,
) -> list[str]:
    """Write anchors with all that they belong to.

    Args:
        study: Where they go.
        name: `published` or `matched`.
        anchors: The anchors.
        identity: What states must share with those behind the anchors: model,
            template, sampler, steps, positions.
        taken: Base requests that anchors of this study were fitted on.
        **facts: What else is known of them.

    Returns:
        The files.
    """
    tensors_name, facts_name = names(name)
    tensors = {"compliant": anchors.compliant, "refused": anchors.refused}
    data = save({key: each.contiguous() for key, each in tensors.items()})
    atomic_write_bytes(study.path(tensors_name), data)
    counts = {"n_compliant": anchors.n_compliant, "n_refused": anchors.n_refused}
    known = {"identity": dict(identity), "taken": sorted(taken)} | counts
    study.write_json(facts_name, known | facts)
    return [tensors_name, facts_name]


def read_anchors(
    directory: Path, name: str, identity: Mapping[str, Any]
) -> Anchored | None:
    """Read the anchors of a study, and refuse those of anything else.

    Args:
        directory: The study.
        name: `published` or `matched`.
        identity: What they must belong to.

    Returns:
        The anchors; None where the study has no matched ones.

    Raises:
        InputError: If there are none, they are damaged, or they belong to another
            model, sampler, number of steps or positions.
    """
    tensors_path, facts_path = (directory / each for each in names(name))
    if name == MATCHED and not tensors_path.exists():
        return None
    try:
        facts = json.loads(facts_path.read_text(encoding="utf-8"))
        found = dict(facts["identity"])
        tensors = load(tensors_path.read_bytes())
        anchors = Anchors(
            tensors["compliant"],
            tensors["refused"],
            int(facts["n_compliant"]),
            int(facts["n_refused"]),
        )
    # The reader of safetensors raises its own error, which is no ValueError.
    except Exception as error:
        raise InputError(
            f"anchors in {tensors_path.parent}",
            f"none that can be read ({type(error).__name__}: {error})",
            "Fit them with `holdfast signal`.",
        ) from error
    require_identity(found, identity)
    taken = frozenset(facts["taken"])
    digest = file_sha256(tensors_path)
    return Anchored(anchors, digest, taken, facts.get("matched_reason"))


def require_identity(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse what belongs to another model, sampler, number of steps or positions.

    Raises:
        InputError: Names every part that differs, with both values.
    """
    own, other = (_flat(each) for each in (wanted, found))
    different = [
        key
        for key in (*own, *(set(other) - set(own)))
        if own.get(key) != other.get(key)
    ]
    if different:
        raise InputError(
            "anchors of " + _listed(own, different),
            _listed(other, different),
            _NEXT,
        )


def _flat(identity: Mapping[str, Any]) -> dict[str, str]:
    """Return every part as JSON; parts of a part, such as the sampler's, one by one."""
    flat = {}
    for key, value in identity.items():
        parts = value if isinstance(value, Mapping) else {"": value}
        for name, each in parts.items():
            flat[f"{key}.{name}".rstrip(".")] = json.dumps(each, sort_keys=True)
    return flat


def _listed(values: Mapping[str, str], keys: list[str]) -> str:
    return ", ".join(f"{key} {_short(values.get(key, 'unknown'))}" for key in keys)


def _short(text: str) -> str:
    """Shorten a value for the message; the whole of it has been compared."""
    return text if len(text) <= 90 else f"{text[:60]}…{text[-20:]}"
