"""Which class of transformers reads a checkpoint, and which types are refused by name.

A configuration is checked before any weight is read. No list says which architectures
fit: where the parts of a model are is found by its structure, and proved on load.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.models.auto import modeling_auto as auto

from holdfast.errors import InputError, UnsupportedFamilyError


@dataclass(frozen=True, slots=True)
class Family:
    """The class that reads a type of model, and where a masked one has its parts."""

    # Name of its language-model class in transformers. It is called by name, so code
    # that travels with a checkpoint is never run.
    causal_class: str
    embedding: str = "embed_tokens"  # Path of the token embedding, from the base model.
    # Path of the norm after the last layer, from the base model.
    final_norm: str = "norm"


_REASONS: Mapping[str, list[str]] = json.loads(
    Path(__file__).with_name("refused.json").read_text(encoding="utf-8")
)
"""Types of models that are refused, by reason."""
REFUSED: Mapping[str, str] = {
    name: reason for reason, names in _REASONS.items() for name in names
}
[_DIFFUSION] = [reason for reason, names in _REASONS.items() if "llada" in names]


def family_of(config: Mapping[str, Any], source: str) -> Family:
    """Return the class that reads a model configuration, or refuse it by name.

    Raises:
        InputError: If the configuration names no model type.
        UnsupportedFamilyError: If no class of transformers generates with it; the
            message names it and the reason.
    """
    model_type = model_type_of(config, source, "transformers language model")
    reason = REFUSED.get(model_type)
    if reason is not None:
        raise _refusal(source, f"`{model_type}`", reason)
    found = generating_class(config, model_type, source)
    if config.get("is_causal") is False:
        raise _refusal(source, f"`{model_type}`", _DIFFUSION)
    return Family(found)


def generating_class(config: Mapping[str, Any], model_type: str, source: str) -> str:
    """Return the class that a checkpoint names, if it generates, or that of its type.

    Raises:
        UnsupportedFamilyError: If transformers has none, or another head is named.
    """
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    seeing = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    known = {causal.get(model_type), seeing.get(model_type)} - {None}
    named = names_in(config, "architectures", source)
    of_type = [name for name in named if name in known]
    if of_type:
        return of_type[0]
    if not known:
        reason = "this version of transformers has no class that generates with it"
        if config.get("auto_map"):
            reason = "its code travels with the checkpoint, and such code is never run"
        raise _refusal(source, f"`{model_type}`", reason)
    # A class of another name may have another head; one of an older name has not.
    if named and not any(name.endswith(("CausalLM", "Generation")) for name in named):
        reason = "it has no language-model head to generate with"
        raise _refusal(source, f"`{', '.join(named)}`", reason)
    return str(causal.get(model_type) or seeing[model_type])


def model_type_of(config: Mapping[str, Any], source: str, kind: str) -> str:
    """Return the type of a model of some kind.

    Raises:
        InputError: If its configuration names none.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type:
        return model_type
    raise InputError(
        "a `model_type` in the model's config.json",
        f"none in {source}",
        f"Point to the directory of a {kind}.",
    )


def _refusal(source: str, name: str, reason: str) -> UnsupportedFamilyError:
    return UnsupportedFamilyError(
        "a language model that writes token by token, of a type that transformers has",
        f"{name} in {source}, which is refused because {reason}",
        "Use a causal language model, converted to its class in transformers where "
        "the checkpoint brings its own.",
    )


def names_in(config: Mapping[str, Any], key: str, source: str) -> list[str]:
    """Return a list of names in a configuration; an empty one where it has none.

    Raises:
        InputError: If it is something else.
    """
    found = config.get(key) or []
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        return found
    raise InputError(
        f"a list of names in `{key}` of the config.json of {source}",
        str(found)[:80],
        "Restore that file.",
    )


def check_precision(config: Mapping[str, Any], source: str) -> None:
    """Refuse quantised weights, where nothing reads packed ones."""
    quantisation = config.get("quantization_config")
    if quantisation:
        method = "unnamed method"
        if isinstance(quantisation, Mapping):
            method = str(quantisation.get("quant_method", method))
        raise UnsupportedFamilyError(
            "weights in float32, bfloat16 or float16",
            f"quantised weights ({method}) in {source}",
            "Use the checkpoint it was quantised from: the contribution of a head "
            "cannot be read off a quantised output projection.",
        )
