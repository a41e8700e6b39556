#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0: the tensors that save_pretrained writes have other names than the state_dict.
#
# Tools that edit, hash or compare a checkpoint go through its safetensors files by the names of the model's modules.
# Experts are known to be fused in memory. Expected: norms and projections have one name.
# Seen: olmo_hybrid is saved with `attention_layer_norm` and three convolutions for each linear layer where memory has
# `input_layernorm` and one. Loading maps them back, so the reload is exact, and a tool that looks a name up finds nothing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import tempfile

import torch
import transformers
from safetensors import safe_open

shape = dict(
    vocab_size=100, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
    pad_token_id=0, eos_token_id=1, bos_token_id=1,
)
config = transformers.OlmoHybridConfig(num_hidden_layers=4, **shape)
model = transformers.OlmoHybridForCausalLM(config).eval()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    with safe_open(f"{folder}/model.safetensors", "pt") as tensors:
        disk = set(tensors.keys())
    again = transformers.OlmoHybridForCausalLM.from_pretrained(folder).eval()
memory = set(model.state_dict())
print("on disk alone:  ", sorted(disk - memory)[:4])
print("in memory alone:", sorted(memory - disk)[:3])
same = all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
assert same, "the reload is not exact: changed"
assert "model.layers.0.attention_layer_norm.weight" in disk - memory, "changed"
assert "model.layers.0.input_layernorm.weight" in memory - disk, "changed"
PY
