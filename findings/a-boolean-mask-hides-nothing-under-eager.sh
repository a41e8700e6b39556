#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0: a boolean mask of four axes masks under sdpa and hides nothing under eager.
#
# Who wants a mask of his own (two prompts behind one prefix, a tree of drafts) passes `[batch, 1, query, key]`. PyTorch's
# own attention takes booleans, True for what may be seen.
# Expected: the same logits under both implementations, as with a mask of two axes; or an error.
# Seen: under eager the booleans are added to the scores as 0 and 1. Nothing is masked: the first token sees the last one,
# and changing the last token moves the first token's logits.
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
other = ids.clone()
other[0, -1] = 3
mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
moved = {}
for name in ("eager", "sdpa"):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=name).eval()
    with torch.no_grad():
        first = [model(each, attention_mask=mask).logits[0, 0] for each in (ids, other)]
        plain = model(ids).logits[0, 0]
    moved[name] = float((first[0] - first[1]).abs().max())
    print(f"{name}: changing token 12 moves the logits of token 1 by {moved[name]:.3f}")
    print(f"{name}: the masked first token is {float((first[0] - plain).abs().max()):.3f} from the plain one")
assert moved["sdpa"] == 0 and moved["eager"] > 0.01, "changed"
PY
