#!/usr/bin/env bash
# transformers 5.23.0: a copy of an FP8 checkpoint that was expanded on loading is packed again, and does not say so.
#
# Without a GPU of compute capability 8.9, or with `dequantize=True`, blocks of FP8 are expanded and the model is a plain
# one: nn.Linear, 16 bits, no `quantization_config`.
# Expected: `save_pretrained` writes what is in memory, or the packed form together with its configuration.
# Seen: it writes float8 weights and `weight_scale_inv` (the head and the embedding too, which were never packed), and a
# config.json without a word of it. Whoever loads the copy takes float8 numbers for weights; the scales are left over.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$work"
CUDA_VISIBLE_DEVICES="" TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import json

import safetensors.torch
import torch
import transformers

BLOCK = 128
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, initializer_range=0.1,
)  # fmt: skip
transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained("fp8")
weights = safetensors.torch.load_file("fp8/model.safetensors")
for name in [each for each in weights if each.endswith("proj.weight")]:
    rows, columns = (size // BLOCK for size in weights[name].shape)
    blocks = weights[name].float().reshape(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448
    weights[name] = (blocks / scales).reshape(weights[name].shape).to(torch.float8_e4m3fn)
    weights[f"{name}_scale_inv"] = scales[:, 0, :, 0].contiguous()
safetensors.torch.save_file(weights, "fp8/model.safetensors", metadata={"format": "pt"})
settings = json.load(open("fp8/config.json")) | {
    "quantization_config": {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head"],
    }
}  # fmt: skip
json.dump(settings, open("fp8/config.json", "w"))
ids = torch.arange(12)[None]


def read(folder):
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        return model, model(ids).logits.float()


model, before = read("fp8")
plain = {weight.dtype for weight in model.parameters()}
model.save_pretrained("copy")
_, after = read("copy")
held = safetensors.torch.load_file("copy/model.safetensors")
packed = [name for name, weight in held.items() if weight.dtype == torch.float8_e4m3fn]
said = "quantization_config" in json.load(open("copy/config.json"))
off = float((after - before).abs().max() / before.abs().max())
print(f"in memory: {plain}; in the copy {len(packed)} packed weights, the head among them: {'lm_head.weight' in packed};")
print(f"config.json says so: {said}; largest change of a logit over the largest logit: {off:.1f}")
assert plain == {torch.bfloat16} and packed and not said and off > 0.5, "changed"
PY
