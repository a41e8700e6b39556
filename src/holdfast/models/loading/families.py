"""Which architectures fit, where their parts are, and which are refused and why.

The table is checked against a model's `config.json` before any weight is read.
A type that is in neither table is refused too: its parts may have the right names
and still mean something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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
_POST_NORM = (
    "a norm after the attention rescales the sum of the heads, "
    "so the contributions of heads no longer add up in the residual stream"
)
_SINKS = (
    "a learned sink takes part of every attention row, "
    "so what a head reads is not a mean over tokens"
)
_HYBRID = (
    "some layers are linear-attention or state-space layers, "
    "which have no heads that could be scaled alone"
)
_NO_HEADS = "it has no attention heads"
_LATENT = (
    "its multi-head latent attention has values of another width than its keys, "
    "and that has not been proved yet"
)
_SCALED = (
    "the attention output is multiplied before it is added to the residual stream, "
    "so contributions of heads would be off by that factor"
)
_OFFSET = (
    "its norms store their weight as an offset from one, "
    "so contributions folded through the norm would be wrong"
)
_DIFFUSION = (
    "it is a diffusion model, which attends both ways and has no next-token decoding: "
    "`holdfast.models.loading.masked.load_masked` reads those it knows, step by step"
)
_TWO_WAY = "it attends both ways and does not generate token by token"
_REASONS: Mapping[str, tuple[str, ...]] = {
    _POST_NORM: (
        *("gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"),
        *("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
        *("olmo2", "olmo3", "flex_olmo", "exaone4", "glm4"),
    ),
    _SINKS: (
        *("gpt_oss", "mimo_v2_flash", "granite_swa", "granitemoe_swa"),
        *("deepseek_v4", "flint", "hy_v4"),
    ),
    _HYBRID: (
        *("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe"),
        *("qwen3_5_moe_text", "olmo_hybrid", "kimi_linear", "minimax"),
        *("bamba", "jamba", "zamba", "zamba2", "falcon_h1", "nemotron_h"),
        *("granitemoehybrid", "bailing_hybrid", "lfm2", "lfm2_moe", "lfm3"),
        "recurrent_gemma",
    ),
    _NO_HEADS: ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"),
    _LATENT: (
        *("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"),
        *("glm_moe_dsa", "longcat_flash", "minicpm3", "mistral4", "youtu"),
    ),
    _SCALED: ("granite", "granitemoe", "granitemoeshared", "hyperclovax"),
    _OFFSET: ("gemma",),
    _DIFFUSION: ("diffusion_gemma", "llada", "llada2_moe", "Dream", "dream"),
    _TWO_WAY: ("bert", "roberta", "deberta_v2", "modernbert"),
}
REFUSED: Mapping[str, str] = {
    name: reason for reason, names in _REASONS.items() for name in names
}


def family_of(config: Mapping[str, Any], source: str) -> Family:
    """Return the family of a model configuration, or refuse it by name.

    Args:
        config: The model's `config.json`.
        source: The model's id or path, for the message.

    Returns:
        Where the parts of this architecture are.

    Raises:
        InputError: If the configuration names no model type.
        UnsupportedFamilyError: If the architecture does not fit; the message
            names it, the reason, and the families that fit.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise InputError(
            "a `model_type` in the model's config.json",
            f"none in {source}",
            "Point to the directory of a transformers language model.",
        )
    reason = REFUSED.get(model_type) or _unknown(model_type, config)
    if reason is None and config.get("is_causal") is False:
        reason = _DIFFUSION
    if reason is not None:
        raise _refusal(source, f"`{model_type}`", reason)
    _check_layer_types(config, source)
    _check_head(config, source)
    _check_precision(config, source)
    return FAMILIES[model_type]


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

    Args:
        config: The model's `config.json`.
        key: Which setting.
        source: The model's id or path, for the message.

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


def _check_precision(config: Mapping[str, Any], source: str) -> None:
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
