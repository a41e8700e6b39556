#!/usr/bin/env bash
# transformers 5.23.0: Jamba behind a cache, given more than one new token, starts its state-space layers anew.
#
# Reading a long prompt in pieces, continuing a cached prefix and checking drafts all hand several tokens to a cache.
# Expected: the logits of one whole pass, as one gets token by token, and as Bamba, Granite 4 and Nemotron-H give.
# Seen: the recurrent state of Jamba's mamba layers is used only where exactly one token comes; with several it is begun
# from nothing, while attention reads the whole cache. Nothing is raised, and logits are off.
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

config = transformers.JambaConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
    attn_layer_period=2,
    attn_layer_offset=1,
    expert_layer_period=2,
    expert_layer_offset=1,
    num_experts=4,
    num_experts_per_tok=2,
    mamba_d_state=8,
    mamba_d_conv=3,
    mamba_expand=2,
    mamba_dt_rank=4,
)
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_config(config).eval()
ids = torch.randint(0, 256, (1, 24))
found = {}
with torch.no_grad():
    whole = model(input_ids=ids, use_cache=False).logits[:, -1]
    for size in (1, 12):
        cache = DynamicCache(config=config)
        model(input_ids=ids[:, :12], past_key_values=cache, use_cache=True)
        for start in range(12, 24, size):
            places = torch.arange(start, start + size)
            out = model(
                input_ids=ids[:, places],
                position_ids=places[None],
                past_key_values=cache,
                use_cache=True,
            )
        found[size] = float((out.logits[:, -1] - whole).norm() / whole.norm())
print(f"one token at a time: {found[1]:.1e} off; twelve at once: {found[12]:.1e} off")
assert found[1] < 1e-5 and found[12] > 1e-3, "changed"
PY
