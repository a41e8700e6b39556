#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0: a forward pass of hunyuan_v1_dense depends on left padding, mask or not.
#
# Rotary attention depends on distances alone, so that a row behind padding, with its mask, has the states it has alone:
# true of Llama to rounding, and code that reads states from padded batches relies on it.
# Expected: the same for every model with rotary embeddings.
# Seen: hunyuan_v1_dense norms queries and keys *after* the rotary embedding, with a weight for each dimension, so that
# absolute positions matter. Without `position_ids` the states of a padded row are off, here by 23 %; with them they are
# right. `generate` passes them, a plain forward pass does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import torch
import transformers

SHAPE = dict(
    vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
)
ids = torch.arange(5, 17)[None]
pad = torch.zeros(1, 5, dtype=torch.long)
padded, mask = torch.cat([pad, ids], 1), torch.cat([pad, torch.ones_like(ids)], 1)
positions = (mask.cumsum(1) - 1).clamp(min=0)
off = {}
for name, kind, config in (
    ("llama", transformers.LlamaForCausalLM, transformers.LlamaConfig),
    ("hunyuan_v1_dense", transformers.HunYuanDenseV1ForCausalLM, transformers.HunYuanDenseV1Config),
):
    torch.manual_seed(0)
    model = kind(config(**SHAPE)).eval()
    for weight in model.parameters():
        # Norm weights that are not all 1, as in any trained model.
        torch.nn.init.uniform_(weight, 0.2, 2.0) if weight.ndim == 1 else torch.nn.init.normal_(weight, std=0.15)
    with torch.no_grad():
        alone = model.model(ids).last_hidden_state
        for given in (None, positions):
            found = model.model(padded, attention_mask=mask, position_ids=given).last_hidden_state[:, 5:]
            off[name, given is None] = float((found - alone).norm() / alone.norm())
            print(f"{name}, position ids {'not ' if given is None else ''}given: off by {off[name, given is None]:.2g}")
assert off["llama", True] < 1e-5 and off["hunyuan_v1_dense", False] < 1e-5, "changed"
assert off["hunyuan_v1_dense", True] > 0.05, "changed"
PY
