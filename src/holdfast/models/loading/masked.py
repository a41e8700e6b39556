"""Load a masked-diffusion model without running code that travels with it.

The parts get one vocabulary, and what decoding rests on is proved on a dummy batch
before anything else is done: attention goes both ways, padding changes no state, and
logits are the head of the state after the final norm.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from holdfast.data.chat.rendering import AS_IT_IS, Rendering, rendering_of
from holdfast.data.chat.thinking import configure
from holdfast.errors import ModelError
from holdfast.models.loading import parts
from holdfast.models.loading.checkpoint import (
    Checkpoint,
    find_checkpoint,
    require_whole,
)
from holdfast.models.loading.files import CONFIG
from holdfast.models.loading.masked_families import MaskedFamily, masked_family_of
from holdfast.models.loading.structure import Trunk
from holdfast.models.loading.weights import identify_in_memory, reading
from holdfast.models.model import MaskedModel, ModelIdentity
from holdfast.models.stops import find_stops


def load_masked(
    id_or_path: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: parts.DtypeName = "auto",
    rendering: Rendering = AS_IT_IS,
) -> MaskedModel:
    """Load a masked-diffusion model and prove that Holdfast reads it rightly.

    LLaDA and Dream checkpoints are read as they were published, by class, names and
    settings of Llama and Qwen2.

    Arguments are those of `holdfast.models.loading.causal.load`.

    Raises:
        HoldfastError: As `load` there; a PEFT adapter is refused.
        ModelError: If there is no token to mask with.
        UnsupportedFamilyError: If the architecture is not in the table; nothing of
            the weights is read then.
    """
    target = parts.choose_device(device)
    checkpoint = find_checkpoint(
        id_or_path, revision, lambda config, name: masked_family_of(config, name).parts
    )
    return load_found_masked(checkpoint, target, dtype, rendering)


def load_found_masked(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: parts.DtypeName,
    rendering: Rendering = AS_IT_IS,
) -> MaskedModel:
    """Load a checkpoint that was found, as `load_masked` does."""
    require_whole(checkpoint)
    family = masked_family_of(checkpoint.config, checkpoint.model_id)

    def tokenize(checkpoint: Checkpoint) -> Any:
        return parts.templated_tokenizer(
            checkpoint, rendering, native_class=family.tokenizer_class
        )

    settings = _settings(family, checkpoint)
    model, tokenizer, identity = parts.open_model(
        checkpoint, device, dtype, tokenize, settings=settings
    )
    return _proved(
        model, tokenizer, family, identity, checkpoint.config, from_files=True
    )


def adapt_masked(
    model: Any, tokenizer: Any, *, shift: bool = False, model_id: str = "in-memory"
) -> MaskedModel:
    """Name and prove the parts of a masked-diffusion model in memory.

    The model is put in evaluation mode.

    `shift`: Whether the state at one position predicts the token at the next.

    Raises:
        ModelError: If the tokenizer has no chat template or too many tokens, or
            there is no token to mask with.
        UnsupportedFamilyError: If the architecture is not in the table.
        AdapterError: If a part is missing or a proof fails.
    """
    config = model.config.to_dict()
    family = replace(masked_family_of(config, model_id), shift=shift)
    configure(tokenizer, rendering_of(tokenizer))
    identity = identify_in_memory(model, tokenizer, model_id)
    return _proved(model, tokenizer, family, identity, config)


def _settings(family: MaskedFamily, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what `from_pretrained` needs beside the directory."""
    if family.translate is None:
        return {}
    translated = family.translate(checkpoint.config, checkpoint.model_id)
    kind = getattr(transformers, family.parts.causal_class).config_class
    with reading(checkpoint.directory / CONFIG):
        config = kind(**translated, is_causal=False)
    return {"config": config, "key_mapping": dict(family.keys) or None}


def _proved(
    model: Any,
    tokenizer: Any,
    family: MaskedFamily,
    identity: ModelIdentity,
    config: Mapping[str, Any],
    *,
    from_files: bool = False,
) -> MaskedModel:
    def named() -> MaskedModel:
        base, config_of = model.base_model, model.config
        trunk = Trunk(
            base,
            config_of,
            parts.part(base, family.parts.embedding),
            parts.part(base, family.parts.final_norm),
        )
        shared = parts.shared_parts(model, tokenizer, trunk, identity)
        modules = [parts.part(model, path) for path in family.head]
        stops = find_stops(model, tokenizer, shared["thinking"])
        vocab = shared["embedding"].num_embeddings

        def lm_head(states: Tensor) -> Tensor:
            return reduce(lambda values, module: module(values), modules, states)

        return MaskedModel(
            **shared,
            lm_head=lm_head,
            mask_id=_mask_id(config, tokenizer, vocab, identity),
            shift=family.shift,
            stop_ids=stops.ids | _ids_of(tokenizer, family.stops),
        )

    return parts.proved(model, identity, named, from_files=from_files)


def _mask_id(
    config: Mapping[str, Any], tokenizer: Any, vocab: int, identity: ModelIdentity
) -> int:
    of_config = config.get("mask_token_id")
    of_tokenizer = getattr(tokenizer, "mask_token_id", None)
    found = {int(token) for token in (of_config, of_tokenizer) if token is not None}
    if len(found) == 1 and max(found) < vocab:
        return found.pop()
    said = f"{of_config} in config.json and {of_tokenizer} in the tokenizer"
    raise ModelError(
        f"one mask token below {vocab}, in config.json (`mask_token_id`) or in the "
        f"tokenizer (`mask_token`), with {identity.model_id}",
        said if found else "a tokenizer without a mask token, and none in config.json",
        "Name the token that the model was trained to fill in; a model without "
        "one decodes left to right and is loaded with "
        "`holdfast.models.loading.causal.load`.",
    )


def _ids_of(tokenizer: Any, texts: Sequence[str]) -> frozenset[int]:
    vocabulary = tokenizer.get_vocab()
    return frozenset(int(vocabulary[text]) for text in texts if text in vocabulary)
