"""Tiny checkpoints under the names they are published with, and references for them.

The references are written from the published architectures and share no code with
transformers: two-way attention, rotary positions, SiLU-gated MLP, RMS norm.
"""

import json

import torch
from safetensors.torch import save_file
from torch.nn import functional

from tiny_models import PLAIN_TEMPLATE, VOCAB, tiny_tokenizer

WIDTH, LAYERS, HEADS, KV_HEADS, MLP = 32, 3, 4, 2, 48
MASK = 299

LLADA_CONFIG = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": WIDTH,
    "embedding_dropout": 0.0,
    "embedding_size": VOCAB,
    "eos_token_id": 256,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": MASK,
    "max_sequence_length": 256,
    "mlp_hidden_size": MLP,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "n_layers": LAYERS,
    "pad_token_id": 256,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": VOCAB,
    "weight_tying": False,
}
DREAM_CONFIG = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_dream.DreamConfig",
        "AutoModel": "modeling_dream.DreamModel",
    },
    "bos_token_id": 256,
    "eos_token_id": 256,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": MLP,
    "mask_token_id": MASK,
    "max_position_embeddings": 256,
    "max_window_layers": LAYERS,
    "model_type": "Dream",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "pad_token_id": 256,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}
BLOCK = {
    "attn_norm": (WIDTH,),
    "q_proj": (WIDTH, WIDTH),
    "k_proj": (WIDTH // 2, WIDTH),
    "v_proj": (WIDTH // 2, WIDTH),
    "attn_out": (WIDTH, WIDTH),
    "ff_norm": (WIDTH,),
    "ff_proj": (MLP, WIDTH),
    "up_proj": (MLP, WIDTH),
    "ff_out": (WIDTH, MLP),
}
TO_DREAM = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def llada_weights(seed=0):
    """Random weights under LLaDA's names, as its index file lists them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        if len(shape) == 1:
            return 1 + 0.2 * torch.randn(*shape, generator=generator)
        return 0.3 * torch.randn(*shape, generator=generator)

    root = "model.transformer"
    weights = {
        f"{root}.wte.weight": draw(VOCAB, WIDTH),
        f"{root}.ln_f.weight": draw(WIDTH),
        f"{root}.ff_out.weight": draw(VOCAB, WIDTH),
    }
    for layer in range(LAYERS):
        for name, shape in BLOCK.items():
            weights[f"{root}.blocks.{layer}.{name}.weight"] = draw(*shape)
    return weights


def dream_weights(seed=0):
    """Random weights under Dream's names: Qwen2's, with biases on q, k and v."""
    theirs = llada_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    root = "model.transformer"
    weights = {
        "model.embed_tokens.weight": theirs[f"{root}.wte.weight"],
        "model.norm.weight": theirs[f"{root}.ln_f.weight"],
        "lm_head.weight": theirs[f"{root}.ff_out.weight"],
    }
    for layer in range(LAYERS):
        for old, new in TO_DREAM.items():
            weight = theirs[f"{root}.blocks.{layer}.{old}.weight"]
            weights[f"model.layers.{layer}.{new}.weight"] = weight
        for part in "qkv":
            size = weights[f"model.layers.{layer}.self_attn.{part}_proj.weight"].shape
            bias = 0.2 * torch.randn(size[0], generator=generator)
            weights[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = bias
    return weights


def write(directory, config, weights, tokenizer=None):
    """Write a checkpoint with code beside it that must not run."""
    directory.mkdir(parents=True, exist_ok=True)
    (tokenizer or tiny_tokenizer(PLAIN_TEMPLATE)).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))
    bomb = "raise SystemExit('code of a checkpoint was run')\n"
    for value in (config.get("auto_map") or {}).values():
        (directory / f"{value.split('.')[0]}.py").write_text(bomb)
    save_file(
        {k: w.contiguous() for k, w in weights.items()}, directory / "model.safetensors"
    )
    return directory


def write_llada(directory, **changes):
    return write(directory, {**LLADA_CONFIG, **changes}, llada_weights())


def write_dream(directory, **changes):
    return write(directory, {**DREAM_CONFIG, **changes}, dream_weights())


def _norm(states, weight, eps):
    return weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps)


def _rotate(heads, theta):
    """Rotary positions on [head, position, width], halves as Llama splits them."""
    n, half = heads.shape[-2], heads.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half).float() / half)
    angles = torch.arange(n).float()[:, None] * frequencies
    first, second = heads[..., :half], heads[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _forward(token_ids, part, theta, eps):
    """States after the final norm, and logits; `part(layer, name)` gives a weight."""
    states = part(None, "wte")[torch.tensor(token_ids)]
    width = WIDTH // HEADS
    for layer in range(LAYERS):
        normed = _norm(states, part(layer, "attn_norm"), eps)

        def heads(name, count, normed=normed, layer=layer):
            made = functional.linear(
                normed, part(layer, name), part(layer, f"{name}.bias")
            )
            return made.view(len(token_ids), count, width).transpose(0, 1)

        queries = _rotate(heads("q_proj", HEADS), theta)
        keys = _rotate(heads("k_proj", KV_HEADS), theta)
        values = heads("v_proj", KV_HEADS)
        read = []
        for head in range(HEADS):
            shared = head * KV_HEADS // HEADS
            scores = queries[head] @ keys[shared].T / width**0.5
            read.append(scores.softmax(-1) @ values[shared])
        states = states + torch.cat(read, -1) @ part(layer, "attn_out").T
        normed = _norm(states, part(layer, "ff_norm"), eps)
        gate = normed @ part(layer, "ff_proj").T
        raised = gate * torch.sigmoid(gate) * (normed @ part(layer, "up_proj").T)
        states = states + raised @ part(layer, "ff_out").T
    states = _norm(states, part(None, "ln_f"), eps)
    return states, states @ part(None, "head").T


def llada_reference(token_ids, seed=0):
    """LLaDA's architecture, one sequence, no transformers."""
    weights = llada_weights(seed)
    tops = {"wte": "wte", "ln_f": "ln_f", "head": "ff_out"}

    def part(layer, name):
        if name.endswith(".bias"):
            return None
        path = tops[name] if layer is None else f"blocks.{layer}.{name}"
        return weights[f"model.transformer.{path}.weight"]

    return _forward(
        token_ids, part, LLADA_CONFIG["rope_theta"], LLADA_CONFIG["rms_norm_eps"]
    )


def dream_reference(token_ids, seed=0):
    """Dream's architecture; logits[j] are those at position j, not yet shifted."""
    weights = dream_weights(seed)
    tops = {"wte": "model.embed_tokens", "ln_f": "model.norm", "head": "lm_head"}

    def part(layer, name):
        if layer is None:
            return weights[f"{tops[name]}.weight"]
        if name.endswith(".bias"):
            return weights[f"model.layers.{layer}.self_attn.{name}"]
        return weights[f"model.layers.{layer}.{TO_DREAM[name]}.weight"]

    return _forward(
        token_ids, part, DREAM_CONFIG["rope_theta"], DREAM_CONFIG["rms_norm_eps"]
    )
