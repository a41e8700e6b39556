#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0: a ready causal mask of four axes switches the sliding window of Gemma 3 off.
#
# A float mask of the shape `[batch, 1, query, key]` is how a causal mask is passed by hand, and it is right for Llama.
# Expected: layers of the type "sliding_attention" keep their window.
# Seen: the mask is handed to all layers as it is, so layers with a window see everything. Texts up to the length of the
# window show nothing; a longer one has other logits, without a warning.
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
WINDOW = 4
LAYERS = ["sliding_attention", "full_attention"]
ids = torch.arange(5, 17)[None]
seen = torch.ones(12, 12, dtype=torch.bool).tril()
mask = torch.zeros(12, 12).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
off = {}
for name, cause, config in (
    ("llama", transformers.LlamaForCausalLM, transformers.LlamaConfig(**SHAPE)),
    (
        "gemma3_text",
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig(**SHAPE, sliding_window=WINDOW, layer_types=LAYERS),
    ),
):
    torch.manual_seed(0)
    model = cause._from_config(config, attn_implementation="eager").eval()
    for n in (WINDOW, 12):
        with torch.no_grad():
            plain = model(ids[:, :n]).logits
            masked = model(ids[:, :n], attention_mask=mask[:, :, :n, :n]).logits
        off[name, n] = float((plain - masked).abs().max())
        print(f"{name}, {n} tokens, window {WINDOW}: the logits differ by {off[name, n]:.3f}")
assert off["llama", 12] == 0 and off["gemma3_text", WINDOW] == 0, "changed"
assert off["gemma3_text", 12] > 0.05, "changed"
PY
