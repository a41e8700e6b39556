#!/usr/bin/env bash
# transformers 5.23.0: `config.head_dim` of models with latent attention is the width of the rotary part, not of a head.
#
# Code that edits single heads cuts the input of the output projection into `num_attention_heads` slices of
# `config.head_dim`, which is right for Llama, Qwen 3 and their kin.
# Expected: no such attribute where the name has no one meaning, or the width of what a head writes.
# Seen: deepseek_v3 and glm4_moe_lite answer 64, which is `qk_rope_head_dim`, while a head writes `v_head_dim` = 128 and
# 256 numbers. 64 divides the width evenly, so slices by it raise nothing, and "head 1" is the second half or quarter of
# head 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import torch
import transformers

seen = {}
for name, config, kind in (
    ("deepseek_v3", transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
    ("glm4_moe_lite", transformers.Glm4MoeLiteConfig, transformers.Glm4MoeLiteForCausalLM),
):
    found = config(num_hidden_layers=1)
    with torch.device("meta"):
        projection = kind(found).model.layers[0].self_attn.o_proj
    width = projection.in_features // found.num_attention_heads
    seen[name] = (found.head_dim, width, projection.in_features % found.head_dim)
    print(f"{name}: config.head_dim {found.head_dim}, numbers that a head writes {width}")
assert seen == {"deepseek_v3": (64, 128, 0), "glm4_moe_lite": (64, 256, 0)}, "changed"
PY
