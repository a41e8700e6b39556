"""What loading has in common: device, arithmetic, template, parts and their proofs."""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any, Literal, TypeVar

import torch

from holdfast.data.chat.rendering import Rendering
from holdfast.data.chat.thinking import configure, thinking_format
from holdfast.data.chat.thinking_formats import named_thinker
from holdfast.errors import AdapterError, ModelError, SettingsError
from holdfast.models.containers.kept import kept, machine
from holdfast.models.containers.placement import BALANCED, SPREAD, balanced
from holdfast.models.finite import check_numbers
from holdfast.models.library import library_errors
from holdfast.models.loading.checkpoint import Checkpoint
from holdfast.models.loading.proofs import LIMITS, prove, require
from holdfast.models.loading.structure import Trunk
from holdfast.models.loading.weights import (
    WITHOUT_PROMPTS,
    identify,
    read_model,
    read_tokenizer,
)
from holdfast.models.model import LanguageModel, ModelIdentity, Proof

M = TypeVar("M", bound=LanguageModel)
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
# The rope types whose frequencies depend on the longest row of a batch.
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def choose_device(name: str) -> torch.device:
    """Return a device by name; "auto" takes CUDA, else MPS, else the CPU.

    "balanced" spreads a model over all GPUs (see `models.containers.placement`).

    Raises:
        SettingsError: If it is not to be had.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name == BALANCED:
        return balanced()
    try:
        device = torch.device(name)
        if device == SPREAD:
            raise RuntimeError("nothing runs there")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SettingsError(
            "a device of this machine, such as cpu, cuda, cuda:1, mps or balanced",
            f"{name} ({str(error).splitlines()[0]})",
            "Choose another --device, or leave it at auto.",
        ) from error
    return device


def choose_dtype(
    name: DtypeName, device: torch.device, config: dict[str, Any]
) -> torch.dtype:
    """Return the arithmetic of a name; "auto" takes float32 on the CPU.

    Elsewhere it takes the checkpoint's own, as its `config.json` names it.

    Raises:
        SettingsError: If it is none that proofs have limits for.
    """
    stored = config.get("dtype") or config.get("torch_dtype")
    if name == "auto":
        name = "float32" if device.type == "cpu" or not stored else stored
    dtype: torch.dtype | None = getattr(torch, str(name), None)
    if dtype is None or dtype not in LIMITS:
        raise SettingsError(
            "float32, bfloat16 or float16", str(name), "Choose another --dtype."
        )
    return dtype


def templated_tokenizer(
    checkpoint: Checkpoint, rendering: Rendering, *, native_class: str | None = None
) -> Any:
    """Read a tokenizer with a chat template, and say how that is rendered.

    `native_class`: As in `read_tokenizer`.

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


def open_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: DtypeName,
    tokenize: Callable[[Checkpoint], Any],
    **settings: Any,
) -> tuple[Any, Any, ModelIdentity]:
    """Read a checkpoint; return its model, its tokenizer and who it is.

    `tokenize`: Reads the tokenizer.
    `settings`: Further arguments of `read_model`.

    Raises:
        HoldfastError: As `choose_dtype`, `tokenize` and `read_model` do.
    """
    arithmetic = choose_dtype(dtype, device, checkpoint.config)
    tokenizer = tokenize(checkpoint)
    model = read_model(checkpoint, arithmetic, device, **settings).eval()
    # A method may have an arithmetic of its own.
    arithmetic = model.get_input_embeddings().weight.dtype
    return model, tokenizer, identify(checkpoint, tokenizer, arithmetic)


def check_tokenizer(tokenizer: Any, vocab: int, model_id: str) -> None:
    """Refuse a tokenizer without a chat template, or with too many tokens.

    Raises:
        ModelError: Says which of the two.
    """
    _check_template(tokenizer, model_id)
    if len(tokenizer) > vocab:
        raise ModelError(
            f"a tokenizer of at most {vocab} tokens, the rows of the embedding",
            f"{len(tokenizer)} tokens with {model_id}",
            "Take the tokenizer that belongs to the model.",
        )


class MissingTemplateError(ModelError):
    """A tokenizer has no chat template to render prompts with."""


def _check_template(tokenizer: Any, model_id: str) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise MissingTemplateError(
            f"a chat template with {model_id}",
            "none",
            "A base model has none: use its chat or instruct version. Else put the "
            "chat_template.jinja that it was trained with into the directory, or "
            f"beside its GGUF file. {WITHOUT_PROMPTS}",
        )


def part(module: Any, path: str) -> Any:
    """Return what lies at a path of attributes.

    Raises:
        AdapterError: If nothing does.
    """
    try:
        return reduce(getattr, path.split("."), module)
    except AttributeError as error:
        raise AdapterError(
            f"`{path}` in a {type(module).__name__}",
            "no such part",
            "The model was edited, or this version of transformers is not "
            "supported: load the model anew with the version that setup asks for.",
        ) from error


def shared_parts(
    model: Any,
    tokenizer: Any,
    trunk: Trunk,
    identity: ModelIdentity,
) -> dict[str, Any]:
    """Return the parts that every `LanguageModel` has but its head, by name.

    Raises:
        AdapterError: If there is no norm after the last layer.
        ModelError: If the tokenizer does not fit.
    """
    if tokenizer is not None:
        check_tokenizer(tokenizer, trunk.embedding.num_embeddings, identity.model_id)
    config = model.config.get_text_config()
    return {
        "model": model,
        "tokenizer": tokenizer,
        "base": trunk.base,
        "final_norm": trunk.final_norm,
        "embedding": trunk.embedding,
        "d_model": config.hidden_size,
        "max_positions": _max_positions(config),
        "identity": identity,
        "thinking": None if tokenizer is None else thinking_format(tokenizer),
    }


UNLIMITED = 1 << 15
"""Longest sequence of a model that has no limit of its own: one without positions."""


def _max_positions(config: Any) -> int:
    positions = int(getattr(config, "max_position_embeddings", None) or UNLIMITED)
    rope = getattr(config, "rope_parameters", None) or {}
    # Kinds of layers may have settings of their own, by name.
    each = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    for part in each:
        if part.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            # Beyond its first length such a model reads a row by the length of its
            # neighbours, and a result would depend on the plan of the batches.
            first = part.get("original_max_position_embeddings")
            first = first or getattr(config, "original_max_position_embeddings", None)
            positions = min(positions, int(first or positions))
    return positions


def proved(
    model: Any,
    identity: ModelIdentity,
    name_parts: Callable[[], M],
    shown: tuple[Proof, ...] = (),
    *,
    from_files: bool = False,
) -> M:
    """Name the parts of a model and prove that they are what their names say.

    `shown`: Proofs that it has passed already.
    `from_files`: Whether all of it was read from files that `identity` is the hash of.
        Looking through its weights and proving are done once then (see `kept`); a
        model in memory may differ from its weights in more than those.

    Raises:
        ModelError: If a weight is not finite.
        AdapterError: If a part is missing, or a proof fails that text rests on, or any
            of a model that fills in masks.
    """
    model.eval()
    with library_errors(
        AdapterError,
        f"a model that runs on two short rows of tokens ({identity.model_id})",
        "Its config.json does not fit its architecture: restore that file. If it is as "
        "published, this type cannot be read here yet: use another model.",
    ):
        named = name_parts()

        def compute() -> tuple[Proof, ...]:
            check_numbers(model, identity.model_id)
            return prove(named)

        key = {
            "weights": identity.weights_sha256,
            "dtype": identity.dtype,
            "class": type(model).__name__,
            "attention": model.config._attn_implementation,
            "places": str(getattr(model, "hf_device_map", "")),
            **machine(named.device),
        }
        found = (
            kept("proofs", key, compute, read=_read_proofs) if from_files else compute()
        )
    proofs = (*shown, *found, *named.proofs)
    require(proofs, identity.model_id, None if named.two_way else "text")
    return replace(named, proofs=proofs)


def _read_proofs(value: Any) -> tuple[Proof, ...]:
    """Return proofs that were kept; ValueError or TypeError if they are none."""
    proofs = tuple(Proof(*each) for each in value)
    if not proofs or any(type(proof.passed) is not bool for proof in proofs):
        raise ValueError("no proofs")
    return proofs
