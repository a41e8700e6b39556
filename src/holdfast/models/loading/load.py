"""Load a model that answers, whichever way it decodes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from holdfast.data.chat.rendering import AS_IT_IS, Rendering, rendering_record
from holdfast.models.loading import parts
from holdfast.models.loading.causal import load_found
from holdfast.models.loading.checkpoint import Checkpoint, find_checkpoint
from holdfast.models.loading.families import Family, family_of
from holdfast.models.loading.masked import load_found_masked
from holdfast.models.loading.masked_families import is_masked, masked_family_of
from holdfast.models.loading.weights import identify
from holdfast.models.model import LanguageModel, ModelIdentity
from holdfast.study.files import fingerprint


def load_language_model(
    id_or_path: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: parts.DtypeName = "auto",
    rendering: Rendering = AS_IT_IS,
    needs_template: bool = True,
) -> LanguageModel:
    """Load a model as its configuration says that it decodes, its proofs passed.

    Arguments are those of `holdfast.models.loading.causal.load`.

    Raises:
        HoldfastError: As `load` and `load_masked` do.
    """
    target = parts.choose_device(device)
    checkpoint = find_checkpoint(id_or_path, revision, _family)
    if is_masked(checkpoint.config):
        return load_found_masked(checkpoint, target, dtype, rendering)
    return load_found(checkpoint, target, dtype, rendering, needs_template)


def fingerprint_source(
    id_or_path: str | Path,
    revision: str | None = None,
    rendering: Rendering = AS_IT_IS,
) -> dict[str, str]:
    """Return the hashes that tell a model from others, without reading its weights.

    They are of weights, template, tokenizer and rendering, by name.

    Raises:
        HoldfastError: As `load_language_model` does, before it reads any weights.
    """
    checkpoint = find_checkpoint(id_or_path, revision, _family)
    tokenizer = parts.templated_tokenizer(
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
