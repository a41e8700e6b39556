"""Load a model, name its parts, and prove that they are what their names say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from holdfast.data.chat.rendering import AS_IT_IS, Rendering, rendering_of
from holdfast.data.chat.thinking import configure
from holdfast.models.loading import parts
from holdfast.models.loading.checkpoint import Checkpoint, find_checkpoint
from holdfast.models.loading.families import family_of
from holdfast.models.loading.proofs import dummy_rows
from holdfast.models.loading.structure import find_blocks, find_trunk, scaled_head
from holdfast.models.loading.weights import (
    MissingTokenizerError,
    identify_in_memory,
    read_tokenizer,
)
from holdfast.models.model import Adapter, ModelIdentity, Proof


def load(
    id_or_path: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: parts.DtypeName = "auto",
    rendering: Rendering = AS_IT_IS,
    needs_template: bool = True,
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
        needs_template: Whether a model without a chat template or a tokenizer is
            refused. Else it is loaded without a tokenizer, and can be measured on
            tokens alone.

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
    checkpoint = find_checkpoint(id_or_path, revision)
    return load_found(checkpoint, target, dtype, rendering, needs_template)


def load_found(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: parts.DtypeName,
    rendering: Rendering = AS_IT_IS,
    needs_template: bool = True,
) -> Adapter:
    """Load a checkpoint that was found, as `load` does."""
    lacking: list[Proof] = []

    def tokenize(checkpoint: Checkpoint) -> Any:
        try:
            return parts.templated_tokenizer(checkpoint, rendering)
        except (parts.MissingTemplateError, MissingTokenizerError) as error:
            if needs_template:
                raise
            name = "prompts can be rendered"
            lacking.append(Proof(name, False, None, None, str(error), "text"))
            missing = isinstance(error, MissingTokenizerError)
            return None if missing else read_tokenizer(checkpoint)

    model, tokenizer, identity = parts.open_model(checkpoint, device, dtype, tokenize)
    if lacking:
        tokenizer = None
    shown: tuple[Proof, ...] = ()
    if checkpoint.adapter is not None:
        # Without PEFT's second of import where there is no adapter.
        from holdfast.models.loading.merging import merge

        model, proof = merge(checkpoint, model)
        shown = (proof,)
    adapter = _proved(model, tokenizer, identity, shown, from_files=True)
    return replace(adapter, source=checkpoint, proofs=(*lacking, *adapter.proofs))


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
    family_of(model.config.to_dict(), model_id)
    if tokenizer is not None:
        configure(tokenizer, rendering_of(tokenizer))
    identity = identify_in_memory(model, tokenizer, model_id)
    return _proved(model, tokenizer, identity)


def _proved(
    model: Any,
    tokenizer: Any,
    identity: ModelIdentity,
    shown: tuple[Proof, ...] = (),
    *,
    from_files: bool = False,
) -> Adapter:
    def named() -> Adapter:
        embedding = model.get_input_embeddings()
        row = dummy_rows(embedding.num_embeddings)[0]
        trunk, missing = find_trunk(model, row)
        blocks, unsolved = find_blocks(model, trunk, row)
        return Adapter(
            **parts.shared_parts(model, tokenizer, trunk, identity),
            lm_head=scaled_head(model),
            blocks=blocks,
            n_heads=int(getattr(trunk.config, "num_attention_heads", 0)),
            proofs=tuple(missing + unsolved),
        )

    return parts.proved(model, identity, named, shown, from_files=from_files)
