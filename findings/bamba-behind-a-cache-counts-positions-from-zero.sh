#!/usr/bin/env bash
# transformers 5.23.0: Bamba behind a cache, without position_ids, takes every new token for the first.
#
# A forward pass with `past_key_values` and one new token is how states and logits are read step by step.
# Expected: positions go on behind what is cached, as in Llama, Jamba or Granite 4, which derive them from the cache.
# Seen: Bamba counts them from 0 in every pass, so its rotary attention layers read the new token at position 0. Nothing
# is raised; logits are off by some percent on a tiny random model. With position_ids they agree to rounding, and so
# `generate`, which passes them, is right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import DynamicCache

SHAPE = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
)
MAMBA = dict(
    mamba_d_state=8,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_expand=2,
    mamba_n_groups=1,
    mamba_d_conv=3,
    mamba_chunk_size=8,
)


def off(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 256, (1, 24))
    found = []
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
        for given in ({}, {"position_ids": torch.tensor([[23]])}):
            cache = DynamicCache(config=config)
            model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
            last = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, **given)
            found.append(float((last.logits[:, -1] - whole).norm() / whole.norm()))
    return found


bamba = off(transformers.BambaConfig(**SHAPE, **MAMBA, attn_layer_indices=[1, 3]))
llama = off(transformers.LlamaConfig(**SHAPE))
print(f"Bamba: {bamba[0]:.1e} off without position_ids, {bamba[1]:.1e} with them")
print(f"Llama: {llama[0]:.1e} off without position_ids, {llama[1]:.1e} with them")
assert bamba[0] > 1e-3 and max(bamba[1], *llama) < 1e-5, "changed"
PY
