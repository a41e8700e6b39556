#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0: `attentions[i]` is not layer i in models with linear-attention layers.
#
# `output_attentions=True` under eager gives a tuple, and `output_hidden_states=True` one that has an entry for each layer.
# Expected: an entry for each layer, None for layers without attention weights.
# Seen: qwen3_5 with four layers, of which the last has attention, gives one entry: `attentions[0]` is layer 3, and a loop
# with `enumerate` names the wrong layers without an error. Under sdpa, the default, the tuple is empty (not None).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import torch
import transformers

config = transformers.Qwen3_5TextConfig(
    vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
)
ids = torch.arange(5, 17)[None]
found = {}
for name in ("eager", "sdpa"):
    model = transformers.Qwen3_5ForCausalLM._from_config(config, attn_implementation=name).eval()
    with torch.no_grad():
        found[name] = model(ids, output_attentions=True, output_hidden_states=True)
    print(f"{name}: {len(found[name].attentions)} attentions, {len(found[name].hidden_states)} hidden states")
print("layers:", config.layer_types)
assert config.layer_types.index("full_attention") == 3, "changed"
assert len(found["eager"].attentions) == 1 and len(found["eager"].hidden_states) == 5, "changed"
assert found["sdpa"].attentions == (), "changed"
PY
