"""Load a model, name its parts, and prove that they are what their names say."""

from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from holdfast.data.chat.rendering import AS_IT_IS, Rendering, rendering_of
from holdfast.data.chat.thinking import configure, thinking_format
from holdfast.data.chat.thinking_formats import named_thinker
from holdfast.errors import AdapterError, ModelError, SettingsError
from holdfast.models.finite import check_numbers
from holdfast.models.library import library_errors
from holdfast.models.loading.checkpoint import Checkpoint, find_checkpoint
from holdfast.models.loading.families import Family, family_of
from holdfast.models.loading.proofs import LIMITS, prove, require
from holdfast.models.loading.weights import (
    identify,
    identify_in_memory,
    read_model,
    read_tokenizer,
)
from holdfast.models.model import Adapter, ModelIdentity, Proof

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
# The rope types whose frequencies depend on the longest row of a batch.
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def load(
    id_or_path: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: DtypeName = "auto",
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
    place = _device(device)
    return load_found(find_checkpoint(id_or_path, revision), place, dtype, rendering)


def load_found(
    checkpoint: Checkpoint,
    place: torch.device,
    dtype: DtypeName,
    rendering: Rendering = AS_IT_IS,
) -> Adapter:
    """Load a checkpoint that was found, as `load` does."""
    arithmetic = _dtype(dtype, place, checkpoint.config)
    tokenizer = templated_tokenizer(checkpoint, rendering)
    model = read_model(checkpoint, arithmetic, place)
    proofs: tuple[Proof, ...] = ()
    if checkpoint.adapter is not None:
        # Without PEFT's second of import where there is no adapter.
        from holdfast.models.loading.merging import merge

        model, proof = merge(checkpoint, model)
        proofs = (proof,)
    identity = identify(checkpoint, tokenizer, arithmetic)
    adapter = _proved(model, tokenizer, checkpoint.family, identity, proofs)
    return replace(adapter, source=checkpoint)


def templated_tokenizer(
    checkpoint: Checkpoint, rendering: Rendering, *, native_class: str | None = None
) -> Any:
    """Read a tokenizer with a chat template, and say how that is rendered.

    Args:
        checkpoint: The model.
        rendering: How its template is rendered.
        native_class: As in `read_tokenizer`.

    Raises:
        HoldfastError: As `read_tokenizer` and `configure` do.
        ModelError: If there is no chat template.
    """
    tokenizer = read_tokenizer(checkpoint, native_class=native_class)
    _check_template(tokenizer, checkpoint.model_id)
    former = str(checkpoint.config.get("_name_or_path") or "")
    names = (checkpoint.model_id, former, str(checkpoint.directory))
    name = next(filter(named_thinker, names), checkpoint.model_id)
    configure(tokenizer, replace(rendering, name=name))
    return tokenizer


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
) -> Adapter:
    check_numbers(model, identity.model_id)
    with library_errors(
        AdapterError,
        f"a model that runs on two short rows of tokens ({identity.model_id})",
        "Its config.json does not fit its architecture: restore that file.",
    ):
        adapter = _named(model.eval(), tokenizer, family, identity)
        proofs = (*shown, *prove(adapter))
    require(proofs, identity.model_id)
    return replace(adapter, proofs=proofs)


def _named(
    model: Any, tokenizer: Any, family: Family, identity: ModelIdentity
) -> Adapter:
    base = model.base_model
    layers = tuple(_part(base, family.layers))
    attentions = tuple(_part(layer, family.attention) for layer in layers)
    config = model.config
    embedding = _part(base, family.embedding)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, embedding.num_embeddings, identity.model_id)
    projections = tuple(_part(a, family.output_projection) for a in attentions)
    width = getattr(projections[0], "in_features", 0) // config.num_attention_heads
    shape = (config.hidden_size, config.num_attention_heads * width)
    for layer, projection in enumerate(projections):
        _check_projection(projection, shape, layer)
    return Adapter(
        model=model,
        tokenizer=tokenizer,
        base=base,
        layers=layers,
        attentions=attentions,
        output_projections=projections,
        mlp_norms=tuple(_part(layer, family.mlp_norm) for layer in layers),
        final_norm=_part(base, family.final_norm),
        embedding=embedding,
        lm_head=model.get_output_embeddings(),
        n_layers=len(layers),
        n_heads=config.num_attention_heads,
        head_width=width,
        d_model=config.hidden_size,
        max_positions=_max_positions(config),
        identity=identity,
        thinking=None if tokenizer is None else thinking_format(tokenizer),
    )


def _part(module: Any, path: str) -> Any:
    try:
        return reduce(getattr, path.split("."), module)
    except AttributeError as error:
        raise AdapterError(
            f"`{path}` in a {type(module).__name__}",
            "no such part",
            "The model was edited, or this version of transformers is not "
            "supported: load the model anew with the version that setup asks for.",
        ) from error


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


def _check_template(tokenizer: Any, model_id: str) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"a chat template with {model_id}",
            "none",
            "Use the chat or instruct version of the model, or add its "
            "chat_template.jinja to the directory.",
        )


def _check_tokenizer(tokenizer: Any, vocab: int, model_id: str) -> None:
    _check_template(tokenizer, model_id)
    if len(tokenizer) > vocab:
        raise ModelError(
            f"a tokenizer of at most {vocab} tokens, the rows of the embedding",
            f"{len(tokenizer)} tokens with {model_id}",
            "Take the tokenizer that belongs to the model.",
        )


def _max_positions(config: Any) -> int:
    positions = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in LENGTH_DEPENDENT_ROPE:
        return positions
    # Beyond its first length such a model reads a row by the length of its
    # neighbours, and a result would depend on the plan of the batches.
    first = rope.get("original_max_position_embeddings")
    first = first or getattr(config, "original_max_position_embeddings", None)
    return min(positions, int(first or positions))


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SettingsError(
            "a device of this machine, such as cpu, cuda or mps",
            f"{name} ({str(error).splitlines()[0]})",
            "Choose another --device, or leave it at auto.",
        ) from error
    return device


def _dtype(
    name: DtypeName, device: torch.device, config: dict[str, Any]
) -> torch.dtype:
    stored = config.get("dtype") or config.get("torch_dtype")
    if name == "auto":
        name = "float32" if device.type == "cpu" or not stored else stored
    dtype: torch.dtype | None = getattr(torch, str(name), None)
    if dtype is None or dtype not in LIMITS:
        raise SettingsError(
            "float32, bfloat16 or float16", str(name), "Choose another --dtype."
        )
    return dtype
