"""Which architectures fit, where their parts are, and which are refused and why.

The table is checked against a model's `config.json` before any weight is read.
A type that is in neither table is refused too: its parts may have the right names
and still mean something else.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import InputError, UnsupportedFamilyError

FITTING_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True, slots=True)
class Family:
    """Where the parts of one architecture are."""

    # Name of its language-model class in transformers. It is called by name, so code
    # that travels with a checkpoint is never run.
    causal_class: str
    layers: str = "layers"  # Path of the list of blocks, from the base model.
    embedding: str = "embed_tokens"  # Path of the token embedding, from the base model.
    # Path of the norm after the last block, from the base model.
    final_norm: str = "norm"
    attention: str = "self_attn"  # Path of the attention, from a block.
    # Path of the output projection, from the attention.
    output_projection: str = "o_proj"
    # Path of the norm in front of the MLP, from a block. What enters it is the residual
    # stream after the attention has been added.
    mlp_norm: str = "post_attention_layernorm"


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "mixtral": Family("MixtralForCausalLM"),
    "phi3": Family("Phi3ForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM"),
    "smollm3": Family("SmolLM3ForCausalLM"),
}
_REASONS: Mapping[str, list[str]] = json.loads(
    Path(__file__).with_name("refused.json").read_text(encoding="utf-8")
)
"""Types of models that are refused, by reason."""
REFUSED: Mapping[str, str] = {
    name: reason for reason, names in _REASONS.items() for name in names
}
[_DIFFUSION] = [reason for reason, names in _REASONS.items() if "llada" in names]


def family_of(config: Mapping[str, Any], source: str) -> Family:
    """Return the family of a model configuration, or refuse it by name.

    Raises:
        InputError: If the configuration names no model type.
        UnsupportedFamilyError: If the architecture does not fit; the message
            names it, the reason, and the families that fit.
    """
    model_type = model_type_of(config, source, "transformers language model")
    reason = REFUSED.get(model_type) or _unknown(model_type, config)
    if reason is None and config.get("is_causal") is False:
        reason = _DIFFUSION
    if reason is not None:
        raise _refusal(source, f"`{model_type}`", reason)
    _check_layer_types(config, source)
    _check_head(config, source)
    return FAMILIES[model_type]


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
        "an architecture whose heads can be measured one by one",
        f"{name} in {source}, which is refused because {reason}",
        f"Use a model of one of these types: {', '.join(sorted(FAMILIES))}.",
    )


def _unknown(model_type: str, config: Mapping[str, Any]) -> str | None:
    if model_type in FAMILIES:
        return None
    if config.get("auto_map"):
        return "its code travels with the checkpoint, and such code is never run"
    return "nobody has proved where its parts are"


def _check_layer_types(config: Mapping[str, Any], source: str) -> None:
    odd = sorted(set(names_in(config, "layer_types", source)) - FITTING_LAYER_TYPES)
    if odd:
        name = f"`{config['model_type']}` with layers of type {', '.join(odd)}"
        raise _refusal(source, name, "only full and sliding attention are proved")


def _check_head(config: Mapping[str, Any], source: str) -> None:
    architectures = names_in(config, "architectures", source)
    if architectures and not any(name.endswith("CausalLM") for name in architectures):
        name = f"`{', '.join(architectures)}`"
        raise _refusal(source, name, "it has no language-model head to generate with")


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
