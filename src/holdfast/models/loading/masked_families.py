"""Which masked-diffusion models can be read, and how each becomes a native class.

Code that travels with a checkpoint is never run. LLaDA is Llama's architecture and
Dream is Qwen2's, with attention both ways: their configurations are translated and
LLaDA's weights renamed. A setting that the native class would not honour is refused.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.errors import InputError, UnsupportedFamilyError
from holdfast.models.loading.families import Family, check_precision, model_type_of

Config = Mapping[str, Any]
NATIVE_NEXT = (
    "Convert its weights to a Llama, Qwen2 or Qwen3 checkpoint with "
    '`"is_causal": false` and a `mask_token_id` in its config.json, '
    "if that is its architecture."
)


@dataclass(frozen=True, slots=True)
class MaskedFamily:
    """How a family of masked-diffusion models is read."""

    parts: Family  # The native class, and where its embedding and its final norm are.
    # Modules from the state after the final norm to logits, in turn.
    head: tuple[str, ...] = ("lm_head",)
    # Whether the state at one position predicts the token at the next, as in a model
    # that was trained left to right first.
    shift: bool = False
    # From the checkpoint's `config.json` to settings of the native configuration; None
    # where the checkpoint is native.
    translate: Callable[[Config, str], dict[str, Any]] | None = None
    # Regular expressions on the names of weights, and what they become.
    keys: Mapping[str, str] = field(default_factory=dict)
    # Native class to read a tokenizer whose code travels with it.
    tokenizer_class: str | None = None
    stops: tuple[str, ...] = ()  # Texts of further tokens that end an answer.


# Settings and names of the published checkpoints: what they say and the native class
# takes for granted (`required`), and what LLaDA's own configuration class takes where
# its file says nothing (`defaults`).
_PUBLISHED = json.loads(
    Path(__file__).with_name("published.json").read_text(encoding="utf-8")
)
# One group an expression is all that the loader of transformers can put back.
_LLADA_KEYS = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
} | {
    rf"^model\.transformer\.blocks\.(\d+)\.{theirs}\.": rf"model.layers.\1.{ours}."
    for theirs, ours in _PUBLISHED["llada_block"].items()
}


def _llada(config: Config, source: str) -> dict[str, Any]:
    known = {**_PUBLISHED["llada_defaults"], **config}
    _require(known, _PUBLISHED["llada_required"], source)
    _require_named(config, ("d_model", "n_heads", "n_layers", "vocab_size"), source)
    kv_heads = known["n_kv_heads"]
    if kv_heads is None:
        kv_heads = 1 if config.get("multi_query_attention") else known["n_heads"]
    width = known["mlp_hidden_size"] or known["mlp_ratio"] * known["d_model"]
    return {
        "vocab_size": known["embedding_size"] or known["vocab_size"],
        "hidden_size": known["d_model"],
        "intermediate_size": width,
        "num_hidden_layers": known["n_layers"],
        "num_attention_heads": known["n_heads"],
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": known["max_sequence_length"],
        "rms_norm_eps": known["rms_norm_eps"],
        "rope_theta": known["rope_theta"],
        "tie_word_embeddings": known["weight_tying"],
        "eos_token_id": config.get("eos_token_id"),
        "pad_token_id": config.get("pad_token_id"),
        "bos_token_id": config.get("bos_token_id"),
    }


def _dream(config: Config, source: str) -> dict[str, Any]:
    required, kept = _PUBLISHED["dream_required"], _PUBLISHED["dream_kept"]
    _require({**required, **config}, required, source)
    _require_named(config, kept[:6], source)
    return {name: config[name] for name in kept if name in config}


MASKED: Mapping[str, MaskedFamily] = {
    "llada": MaskedFamily(
        Family("LlamaForCausalLM"),
        translate=_llada,
        keys=_LLADA_KEYS,
        stops=("<|eot_id|>",),
    ),
    "Dream": MaskedFamily(
        Family("Qwen2ForCausalLM"),
        shift=True,
        translate=_dream,
        tokenizer_class="Qwen2Tokenizer",
        stops=("<|im_end|>",),
    ),
    "modernbert": MaskedFamily(
        Family(
            "ModernBertForMaskedLM",
            embedding="embeddings.tok_embeddings",
            final_norm="final_norm",
        ),
        head=("head", "decoder"),
        stops=("[SEP]",),
    ),
}
TWO_WAY: Mapping[str, MaskedFamily] = {
    "llama": MaskedFamily(Family("LlamaForCausalLM")),
    "qwen2": MaskedFamily(Family("Qwen2ForCausalLM")),
    "qwen3": MaskedFamily(Family("Qwen3ForCausalLM")),
}
"""Native types that are masked-diffusion models where they say `is_causal: false`."""
_NOT_PROVED = "nobody has proved its attention, its experts and its blocks here"
_REASONS: Mapping[str, str] = {
    "diffusion_gemma": (
        "it has no mask token; `load_diffusion_gemma` of "
        "`holdfast.models.diffusion.gemma` reads it"
    ),
    "llada_moe": _NOT_PROVED,
    "llada2_moe": _NOT_PROVED,
    "sdar": _NOT_PROVED,
    "sdar_moe": _NOT_PROVED,
    "Fast_dLLM_Qwen": _NOT_PROVED,
}


def is_masked(config: Config) -> bool:
    """Return whether a configuration is of a masked-diffusion model, read or not."""
    model_type = config.get("model_type")
    two_way = model_type in TWO_WAY and config.get("is_causal") is False
    return two_way or model_type in MASKED or model_type in _REASONS


def masked_family_of(config: Config, source: str) -> MaskedFamily:
    """Return the family of a masked-diffusion model, or refuse it by name.

    Raises:
        InputError: If the configuration names no model type.
        UnsupportedFamilyError: If the architecture is not in the table, or a
            setting of it would be lost; the message names it and the next step.
    """
    model_type = model_type_of(config, source, "masked-diffusion model")
    check_precision(config, source)
    two_way = config.get("is_causal") is False
    family = TWO_WAY.get(model_type) if two_way else MASKED.get(model_type)
    if family is None:
        raise _refusal(model_type, config, source)
    if family.translate is not None:
        family.translate(config, source)
    return family


def _refusal(model_type: str, config: Config, source: str) -> UnsupportedFamilyError:
    step = NATIVE_NEXT
    if model_type in _REASONS:
        reason = _REASONS[model_type]
    elif model_type in TWO_WAY:
        reason = "it attends to what came before alone, and decodes left to right"
        step = "Load it with `holdfast.models.loading.causal.load`."
    elif config.get("auto_map"):
        reason = "its code travels with the checkpoint, and such code is never run"
    else:
        reason = "nobody has proved that it is a masked-diffusion model"
    types = ", ".join([*MASKED, *(f"{name} with is_causal false" for name in TWO_WAY)])
    return UnsupportedFamilyError(
        f"a masked-diffusion model of one of these types: {types}",
        f"`{model_type}` in {source}, which is refused because {reason}",
        step,
    )


def _require(config: Config, required: Config, source: str) -> None:
    odd = [name for name, value in required.items() if config.get(name) != value]
    if odd:
        wanted = ", ".join(f"{name} {required[name]}" for name in odd)
        found = ", ".join(f"{name} {config.get(name)}" for name in odd)
        raise UnsupportedFamilyError(
            f"the published architecture of `{config['model_type']}` ({wanted})",
            f"{found} in {source}",
            "The native class would not honour that; use a published checkpoint.",
        )


def _require_named(config: Config, names: Sequence[str], source: str) -> None:
    missing = [name for name in names if name not in config]
    if missing:
        raise InputError(
            f"{', '.join(missing)} in the model's config.json",
            f"none in {source}",
            "Restore that file.",
        )
