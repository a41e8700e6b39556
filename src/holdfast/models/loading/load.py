"""Load a model that answers, whichever way it decodes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from holdfast.data.chat.rendering import AS_IT_IS, Rendering, rendering_record
from holdfast.models.loading.causal import (
    DtypeName,
    _device,
    load_found,
    templated_tokenizer,
)
from holdfast.models.loading.checkpoint import Checkpoint, find_checkpoint
from holdfast.models.loading.families import Family, family_of
from holdfast.models.loading.masked import load_found_masked
from holdfast.models.loading.masked_families import is_masked, masked_family_of
from holdfast.models.loading.weights import identify
from holdfast.models.model import Adapter, MaskedModel, ModelIdentity
from holdfast.study.files import fingerprint

Speaker = Adapter | MaskedModel
"""A model that answers: left to right, or by filling in masks."""


def load_speaker(
    id_or_path: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: DtypeName = "auto",
    rendering: Rendering = AS_IT_IS,
) -> Speaker:
    """Load a model as its configuration says that it decodes.

    Args:
        id_or_path: Directory of a model, or a Hub id.
        revision: Branch, tag or commit on the Hub.
        device: As in `holdfast.models.loading.causal.load`.
        dtype: As there.
        rendering: As there.

    Returns:
        The model, its proofs passed.

    Raises:
        HoldfastError: As `load` and `load_masked` do.
    """
    place = _device(device)
    checkpoint = find_checkpoint(id_or_path, revision, _family)
    read = load_found_masked if is_masked(checkpoint.config) else load_found
    return read(checkpoint, place, dtype, rendering)


def fingerprint_source(
    id_or_path: str | Path,
    revision: str | None = None,
    rendering: Rendering = AS_IT_IS,
) -> dict[str, str]:
    """Return the hashes that tell a model from others, without reading its weights.

    Args:
        id_or_path: Directory of a model or of a PEFT adapter, or a Hub id.
        revision: Branch, tag or commit on the Hub.
        rendering: How the chat template is rendered.

    Returns:
        Hashes of weights, template, tokenizer and rendering, by name.

    Raises:
        HoldfastError: As `load_speaker` does, before it reads any weights.
    """
    checkpoint = find_checkpoint(id_or_path, revision, _family)
    tokenizer = templated_tokenizer(
        checkpoint, rendering, native_class=_native_class(checkpoint)
    )
    identity = identify(checkpoint, tokenizer, torch.float32)
    return fingerprints(identity, tokenizer)


def fingerprints(identity: ModelIdentity, tokenizer: Any) -> dict[str, str]:
    """Return the hashes of `fingerprint_source` for a model that is loaded."""
    return {
        "weights_sha256": identity.weights_sha256,
        "template_sha256": identity.template_sha256,
        "tokenizer_sha256": identity.tokenizer_sha256,
        "rendering": fingerprint(rendering_record(tokenizer)),
    }


def _native_class(checkpoint: Checkpoint) -> str | None:
    if not is_masked(checkpoint.config):
        return None
    return masked_family_of(checkpoint.config, checkpoint.model_id).tokenizer_class


def _family(config: Mapping[str, Any], source: str) -> Family:
    if is_masked(config):
        return masked_family_of(config, source).parts
    return family_of(config, source)
