"""Load a model that answers, whichever way it decodes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.models.adapter import DtypeName, _device, load_found
from holdfast.models.checkpoints import find_checkpoint
from holdfast.models.families import Family, family_of
from holdfast.models.masked import MaskedModel, load_found_masked
from holdfast.models.masked_families import is_masked, masked_family_of
from holdfast.models.parts import Adapter

Speaker = Adapter | MaskedModel
"""A model that answers: left to right, or by filling in masks."""


def load_speaker(
    id_or_path: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: DtypeName = "auto",
) -> Speaker:
    """Load a model as its configuration says that it decodes.

    Args:
        id_or_path: Directory of a model, or a Hub id.
        revision: Branch, tag or commit on the Hub.
        device: As in `holdfast.models.adapter.load`.
        dtype: As there.

    Returns:
        The model, its proofs passed.

    Raises:
        HoldfastError: As `load` and `load_masked` do.
    """
    place = _device(device)
    checkpoint = find_checkpoint(id_or_path, revision, _family)
    read = load_found_masked if is_masked(checkpoint.config) else load_found
    return read(checkpoint, place, dtype)


def _family(config: Mapping[str, Any], source: str) -> Family:
    if is_masked(config):
        return masked_family_of(config, source).parts
    return family_of(config, source)
