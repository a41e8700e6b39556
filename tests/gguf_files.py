"""GGUF files of tiny models, written as llama.cpp's converter does."""

import gguf
import numpy as np
import torch
from gguf.quants import quantize

from tiny_models import VOCAB

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CONTROL, OWN = range(257, 261), range(261, 263)
"""Tokens of the tiny tokenizer that are control tokens, and its tags."""


def _permuted(weight, n_heads):
    """Rows of a projection as llama.cpp pairs them for its rotary embedding."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def tensors_of(model):
    """Weights of a tiny Llama under the names of GGUF."""
    config, found = model.config, {}
    for key, weight in model.state_dict().items():
        name = key.removesuffix(".weight")
        block = name.split(".")[2] if name.startswith("model.layers.") else None
        inner = name.split(".", 3)[3] if block else name
        values = weight.float().numpy()
        if inner == "self_attn.q_proj":
            values = _permuted(values, config.num_attention_heads)
        if inner == "self_attn.k_proj":
            values = _permuted(values, config.num_key_value_heads)
        short = NAMES[inner]
        found[f"blk.{block}.{short}.weight" if block else f"{short}.weight"] = values
    return found


def write_gguf(path, model, tokenizer, *, packed=False, architecture="llama", **extra):
    """Write a tiny Llama; `extra`: further metadata (None to leave out) or tensors."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("A tiny model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    pieces = {index: piece for piece, index in tokenizer.get_vocab().items()}
    every = range(VOCAB)
    kinds = [3 if each in CONTROL else 4 if each in OWN else 1 for each in every]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([pieces.get(each, f"[PAD{each}]") for each in every])
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    template = extra.pop("template", tokenizer.chat_template)
    if template is not None:
        writer.add_chat_template(template)
    tensors = tensors_of(model)
    for name, value in extra.items():
        key = name.replace("__", ".")
        if isinstance(value, torch.Tensor):
            tensors[key] = value.numpy()
        elif value is None:
            del tensors[key]
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, values in tensors.items():
        if packed and values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
