#!/usr/bin/env bash
# bitsandbytes 0.50.2, torch 2.13.0: on a CPU, `state_dict()` of a 4-bit model that has run makes it another model.
#
# On processors with the wide bfloat16 unit (AVX512-BF16), weights of 4 bits are packed anew at the first pass.
# `state_dict()`, which hashing, checking and saving call, turns them back in place, and the next pass packs them again.
# Expected: reading the state changes nothing that is computed.
# Seen: logits move by more than half of the largest, in silence, and stay so. Before the first pass it does no harm.
set -euo pipefail
grep -q avx512_bf16 /proc/cpuinfo || { echo "this processor has no AVX512-BF16: nothing to see here"; exit 0; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import torch
import transformers

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.1,
)  # fmt: skip
transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained("model")
model = transformers.LlamaForCausalLM.from_pretrained(
    "model",
    quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True),
    dtype=torch.bfloat16,
    device_map={"": "cpu"},
)
ids = torch.arange(12)[None]


def logits():
    with torch.no_grad():
        return model(ids).logits.float()


model.state_dict()
before = logits()
again = float((logits() - before).abs().max())
model.state_dict()
after = float((logits() - before).abs().max())
largest = float(before.abs().max())
print(f"largest logit {largest:.2f}; second pass moves it by {again:.2f}, state_dict() in between by {after:.2f}")
assert again == 0 and after > 0.2 * largest, "changed"
PY
