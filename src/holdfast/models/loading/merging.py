"""Put an adapter over its base and merge it, and show that nothing was lost."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from holdfast.errors import InputError, ModelError
from holdfast.models.library import library_errors
from holdfast.models.loading.checkpoint import Checkpoint
from holdfast.models.loading.files import (
    ADAPTER_CONFIG,
    ADAPTER_STEM,
    BAKE_RECORD,
    FINETUNE_RECORD,
    STEP_RECORD,
    read_config,
    shapes_of,
    weight_files,
)
from holdfast.models.loading.proofs import LIMITS, dummy_rows, relative
from holdfast.models.loading.weights import fingerprint_files, first_three
from holdfast.models.model import Proof

Shapes = Mapping[str, tuple[int, ...]]
_LOST = ("pissa_niter", "lora_ga", "corda")
"""Beginnings that took something from the base, drawn by chance or by data."""


def merge(checkpoint: Checkpoint, model: Any) -> tuple[Any, Proof]:
    """Merge a LoRA adapter into its base.

    Returns:
        The merged model, and the proof that it gives the logits of base and adapter.

    Raises:
        InputError: If the settings of the adapter cannot be read.
        ModelError: If its weights do not fit, or it was made for another base.
        EnvironmentProblem: If memory runs out.
    """
    _check_base(checkpoint)
    rows = dummy_rows(model.get_input_embeddings().num_embeddings)
    with torch.no_grad(), warnings.catch_warnings():
        # Of what PEFT warns about, all that matters is refused in `_check_weights`.
        warnings.simplefilter("ignore")
        adapted = _attach(checkpoint, model)
        with library_errors(
            ModelError,
            f"an adapter that can be merged in {checkpoint.adapter}",
            "Merge it where it was made, if it can be, and give the merged model.",
        ):
            expected = _logits(adapted, rows)
            _untie(model)
            merged = adapted.merge_and_unload()
            _tell_ties(merged)
            found = _logits(merged, rows)
    value = relative(found, expected)
    limit = LIMITS[model.dtype].whole_pass
    return merged, Proof(
        "the merged adapter gives the logits of base and adapter",
        value <= limit,
        value,
        limit,
        "all positions of two short rows, relative to the largest logit; embedding "
        "and head are untied first where the adapter changes one of them",
    )


def _check_base(checkpoint: Checkpoint) -> None:
    """Refuse a base that is not the one that an adapter of ours was made for."""
    for name in (FINETUNE_RECORD, STEP_RECORD, BAKE_RECORD):
        path = checkpoint.adapter / name if checkpoint.adapter else None
        if path is None or not path.is_file():
            continue
        base = read_config(path).get("base")
        known = base.get("weights_sha256") if isinstance(base, dict) else None
        found = fingerprint_files(checkpoint._replace(adapter=None))
        if known is not None and known != found:
            raise ModelError(
                f"the base that {checkpoint.adapter} was made for, of "
                f"fingerprint {str(known)[:12]}… ({name})",
                f"another one in {checkpoint.directory}, of fingerprint {found[:12]}…",
                "Restore that base, or make the adapter again over this one.",
            )


def _attach(checkpoint: Checkpoint, model: Any) -> Any:
    directory = str(checkpoint.adapter)
    with library_errors(
        InputError,
        f"settings of an adapter for this base in {directory}/{ADAPTER_CONFIG}",
        "Restore that file, or name the base that it was trained over.",
    ):
        config = PeftConfig.from_pretrained(directory)
        config.inference_mode = True
        _check_kind(checkpoint, config)
        adapted = get_peft_model(model, config)
    with library_errors(
        ModelError,
        f"weights of an adapter that can be loaded in {directory}",
        "Restore the adapter's files.",
    ):
        _check_weights(checkpoint, adapted, config)
        adapted.load_adapter(directory, "default", is_trainable=False)
    return adapted


def _check_kind(checkpoint: Checkpoint, config: Any) -> None:
    """Refuse settings that no merged weights could follow, or PEFT would pass by."""
    assert checkpoint.adapter is not None
    path = checkpoint.adapter / ADAPTER_CONFIG
    # PEFT warns of these and goes on without, as if they were not set.
    unknown = [
        name
        for name, value in read_config(path).items()
        if value and not hasattr(config, name)
    ]
    drawn = str(config.init_lora_weights)
    for found, said, next_step in (
        (
            unknown,
            f"`{next(iter(unknown), '')}`, which is none",
            "It was written by a later version: install that one (`pip install -U "
            "peft`), or take the line out if the weights do not depend on it.",
        ),
        (
            drawn.startswith(_LOST),
            f"`init_lora_weights` of {drawn}: it changed the base, and how is lost",
            "Save it again with `path_initial_model_for_weight_conversion`; where the "
            "base is the changed one, write `true` there.",
        ),
        (
            config.layer_replication,
            "`layer_replication`: layers that share their weights",
            "Merge it where it was made, and give the merged model.",
        ),
        (
            config.alora_invocation_tokens,
            "`alora_invocation_tokens`: it acts from a token on, which weights cannot",
            "Name another adapter, or the base alone.",
        ),
    ):
        if found:
            expected = f"settings of an adapter that can be merged in {path}"
            raise ModelError(expected, said, next_step)


def _check_weights(checkpoint: Checkpoint, adapted: Any, config: Any) -> None:
    """Refuse weights that would be left out, left at random, or are too long."""
    assert checkpoint.adapter is not None
    found = shapes_of(weight_files(checkpoint.adapter, ADAPTER_STEM))
    needed = _shapes(adapted, embeddings=False)
    known = _shapes(adapted, embeddings=True) | needed
    # Old versions of PEFT wrote the weights of the base beside those of the adapter.
    surplus = sorted(set(found) - set(known))
    missing = sorted(set(needed) - set(found))
    other = sorted(
        name for name in found if known.get(name, found[name]) != found[name]
    )
    for names, said in (
        (surplus, "surplus adapter keys, which the base has no place for"),
        (missing, "missing adapter keys"),
        (
            other,
            f"adapter keys of another shape, {_cause(found, known, other)}",
        ),
    ):
        if names:
            raise ModelError(
                f"an adapter that fits its base {checkpoint.directory}",
                f"{len(names)} {said}: {first_three(names)}",
                "The adapter is of another base, or its files are of two: name the "
                f"right base in {checkpoint.adapter / ADAPTER_CONFIG}, or copy both "
                "files again.",
            )


def _shapes(adapted: Any, *, embeddings: bool) -> dict[str, tuple[int, ...]]:
    state = get_peft_model_state_dict(adapted, save_embedding_layers=embeddings)
    return {name: tuple(weight.shape) for name, weight in state.items()}


def _cause(found: Shapes, known: Shapes, other: Sequence[str]) -> str:
    """Say why shapes differ: by the rank alone, or by the base."""
    if not other:
        return ""
    first = other[0]
    ranks = [1 if "lora_B" in name else 0 for name in other]
    by_rank = all(
        "lora_" in name
        and len(found[name]) == len(known[name]) == 2
        and found[name][1 - rank] == known[name][1 - rank]
        for name, rank in zip(other, ranks, strict=True)
    )
    if by_rank:
        rank = found[first][ranks[0]]
        return f"of rank {rank} where {ADAPTER_CONFIG} says {known[first][ranks[0]]}"
    said = f"{list(found[first])} where the base takes {list(known[first])}"
    vocabulary = all("embed" in name or "lm_head" in name for name in other)
    # Whoever adds tokens resizes the base before the training, and says so nowhere.
    return f"{said} (were tokens added? then merge it there)" if vocabulary else said


def _logits(
    model: Any, rows: Sequence[Sequence[int]]
) -> Float[Tensor, "position vocab"]:
    model.eval()
    device = model.get_input_embeddings().weight.device
    logits = [model(torch.tensor([row], device=device)).logits[0] for row in rows]
    return torch.cat(logits).float()


def _untie(model: Any) -> None:
    """Give the head a weight of its own where an adapter changes it or the embedding.

    Merged into the weight that both share, a change of one would change the other.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is nn.Embedding and type(head) is nn.Linear:
        return
    inner, outer = (
        each.get_base_layer() if hasattr(each, "get_base_layer") else each
        for each in (embedding, head)
    )
    if outer.weight is inner.weight:
        outer.weight = nn.Parameter(outer.weight.detach().clone(), requires_grad=False)


def _tell_ties(merged: Any) -> None:
    """Let the settings of a merged model say that its head is its own, if it is."""
    head = merged.get_output_embeddings()
    if head.weight is not merged.get_input_embeddings().weight:
        # Whoever writes the model would leave the head out otherwise.
        merged.config.tie_word_embeddings = False
        merged.all_tied_weights_keys = {}
