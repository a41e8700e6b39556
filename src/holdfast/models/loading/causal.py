"""Load a model, name its parts, and prove that they are what their names say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from holdfast.data.chat.rendering import AS_IT_IS, Rendering, rendering_of
from holdfast.data.chat.thinking import configure
from holdfast.errors import AdapterError
from holdfast.models.loading import parts
from holdfast.models.loading.checkpoint import Checkpoint, find_checkpoint
from holdfast.models.loading.families import Family, family_of
from holdfast.models.loading.proofs import LIMITS
from holdfast.models.loading.weights import identify_in_memory
from holdfast.models.model import Adapter, ModelIdentity, Proof


def load(
    id_or_path: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: parts.DtypeName = "auto",
    rendering: Rendering = AS_IT_IS,
) -> Adapter:
    """Load a language model and prove that Holdfast reads it rightly.

    A PEFT adapter (LoRA) is loaded over its base and merged into it. Weights come
    from safetensors; code that travels with a checkpoint is never run.

    Args:
        id_or_path: Directory of a model or of a PEFT adapter, or a Hub id.
        revision: Branch, tag or commit on the Hub.
        device: "auto" takes CUDA, else MPS, else the CPU; or a name such as "cuda:1".
        dtype: "auto" takes the checkpoint's own on an accelerator, and float32 on
            the CPU, where 16-bit arithmetic is slow and inexact.
        rendering: How the chat template is rendered.

    Returns:
        The adapter, its proofs passed.

    Raises:
        InputError: If it names no model, or the model has no tokenizer.
        SettingsError: If the device or the dtype is not to be had.
        ModelError: If weights are missing, damaged or do not fit the configuration,
            or there is no chat template.
        UnsupportedFamilyError: If the architecture is refused; nothing of the
            weights is read then.
        AdapterError: If a proof fails.
        ThinkingFormatError: If thinking is required or off and cannot be had so.
        OfflineError: If it is on the Hub, and the Hub cannot be reached.
        StorageError: If it cannot be stored.
    """
    target = parts.choose_device(device)
    return load_found(find_checkpoint(id_or_path, revision), target, dtype, rendering)


def load_found(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: parts.DtypeName,
    rendering: Rendering = AS_IT_IS,
) -> Adapter:
    """Load a checkpoint that was found, as `load` does."""
    model, tokenizer, identity = parts.open_model(
        checkpoint, device, dtype, lambda it: parts.templated_tokenizer(it, rendering)
    )
    shown: tuple[Proof, ...] = ()
    if checkpoint.adapter is not None:
        # Without PEFT's second of import where there is no adapter.
        from holdfast.models.loading.merging import merge

        model, proof = merge(checkpoint, model)
        shown = (proof,)
    adapter = _proved(
        model, tokenizer, checkpoint.family, identity, shown, from_files=True
    )
    return replace(adapter, source=checkpoint)


def adapt(model: Any, tokenizer: Any, *, model_id: str = "in-memory") -> Adapter:
    """Name and prove the parts of a model that is already in memory.

    The model is put in evaluation mode.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer with a chat template, rendered as
            `data.thinking.configure` has said of it; None for a model that is only
            measured, which then has no thinking format and cannot generate.
        model_id: What records call it.

    Returns:
        The adapter, its proofs passed.

    Raises:
        ModelError: If the tokenizer has no chat template or too many tokens.
        UnsupportedFamilyError: If the architecture is refused.
        AdapterError: If a part is missing or a proof fails.
    """
    family = family_of(model.config.to_dict(), model_id)
    if tokenizer is not None:
        configure(tokenizer, rendering_of(tokenizer))
    identity = identify_in_memory(model, tokenizer, model_id)
    return _proved(model, tokenizer, family, identity)


def _proved(
    model: Any,
    tokenizer: Any,
    family: Family,
    identity: ModelIdentity,
    shown: tuple[Proof, ...] = (),
    *,
    from_files: bool = False,
) -> Adapter:
    def named() -> Adapter:
        layers = tuple(parts.part(model.base_model, family.layers))
        attentions = tuple(parts.part(layer, family.attention) for layer in layers)
        shared = parts.shared_parts(model, tokenizer, family, identity)
        projections = tuple(parts.part(a, family.output_projection) for a in attentions)
        n_heads = model.config.num_attention_heads
        width = getattr(projections[0], "in_features", 0) // n_heads
        for layer, projection in enumerate(projections):
            shape = (model.config.hidden_size, n_heads * width)
            _check_projection(projection, shape, layer)
        return Adapter(
            **shared,
            lm_head=model.get_output_embeddings(),
            layers=layers,
            attentions=attentions,
            output_projections=projections,
            mlp_norms=tuple(parts.part(layer, family.mlp_norm) for layer in layers),
            n_layers=len(layers),
            n_heads=n_heads,
            head_width=width,
        )

    return parts.proved(model, identity, named, shown, from_files=from_files)


def _check_projection(projection: Any, shape: tuple[int, int], layer: int) -> None:
    # Quantised and adapted layers are subclasses of Linear, or no Linear at all.
    plain = type(projection) is nn.Linear and not isinstance(projection.weight, DTensor)
    weight: Any = getattr(projection, "weight", None)
    if plain and weight.dtype in LIMITS and tuple(weight.shape) == shape:
        return
    raise AdapterError(
        f"a plain output projection of shape {shape} in float32, bfloat16 or float16 "
        f"in layer {layer}",
        f"a {type(projection).__name__} with a {type(weight).__name__} "
        f"of type {getattr(weight, 'dtype', None)}, "
        f"shape {tuple(getattr(weight, 'shape', ()))}",
        "Load the model unquantised and on one device; merge adapters first "
        "(`merge_and_unload`).",
    )
