#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: target_modules="all-linear" means opposite things in two mixtures of experts.
#
# Expected: every linear layer but the head, as the name says; in a mixture of experts attention and experts, or neither.
# Seen: in qwen3_moe attention, all experts *and the router* get an adapter; in gpt_oss attention alone, without a warning:
# its experts, most of the model, and the router stay as they are. One fine-tuning setting trains the routing of one family
# and leaves the experts of the other out.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import warnings

import transformers
from peft import LoraConfig, get_peft_model

SHAPE = dict(
    vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
)
models = {
    "qwen3_moe": transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
        )
    ),
    "gpt_oss": transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)
    ),
}
parts, said = {}, {}
for name, model in models.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    names = [each for each, _ in adapted.named_parameters() if ".lora_A" in each]
    parts[name] = sorted({each.split(".lora_A")[0].split(".layers.0.")[1] for each in names if ".layers.0." in each})
    said[name] = [str(each.message) for each in caught if "expert" in str(each.message)]
    print(f"{name}: {', '.join(parts[name])}")
assert "mlp.gate" in parts["qwen3_moe"] and "mlp.experts" in parts["qwen3_moe"], "changed"
assert all(part.startswith("self_attn.") for part in parts["gpt_oss"]), "changed"
assert not said["gpt_oss"], "changed"
PY
