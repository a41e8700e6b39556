"""Run by the test of memory, in a process of its own: bound and peak as JSON."""

import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.loading.causal import adapt
from holdfast.rollout.cost import Load, _held, batch_bytes, peak_bytes
from tiny_models import PLAIN_TEMPLATE, tiny_tokenizer

# The shapes of real families, with as many layers as take seconds.
SHAPES = {
    # SmolLM2-135M: narrow and deep.
    "smollm2": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
            "num_key_value_heads": 3, "vocab_size": 49152, "num_hidden_layers": 12,
        },
    ),
    # Qwen2.5-0.5B: a wide vocabulary.
    "qwen2.5": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {
            "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
            "num_key_value_heads": 2, "vocab_size": 151936, "num_hidden_layers": 3,
        },
    ),
    # Llama-3.2-1B: wide blocks and many keys.
    "llama3.2": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 32000, "num_hidden_layers": 2,
        },
    ),
}  # fmt: skip


def main(shape, width, prompt, budget, temperature, top_p):
    kind, config, sizes = SHAPES[shape]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    more = {"max_position_embeddings": 8192, "tie_word_embeddings": True}
    model = kind(config(**sizes, **more, eos_token_id=2, pad_token_id=0))
    adapter = adapt(model.eval(), tiny_tokenizer(PLAIN_TEMPLATE))
    sampling = Sampling(
        temperature=temperature, top_p=top_p, max_thinking=0, max_answer=budget
    )
    now, _ = _held(adapter)
    load = Load(width, prompt, budget)
    bound = peak_bytes(adapter, sampling, load)
    batch = batch_bytes(adapter, sampling, load)
    prompts = [([5 + place] * prompt, place) for place in range(width)]
    # A little shorter each, so that there is padding, and a mask for it.
    prompts = [(ids[place % 3 :], seed) for place, (ids, seed) in enumerate(prompts)]
    # What loading took is no part of it.
    Path("/proc/self/clear_refs").write_text("5")
    for _ in generate(adapter, prompts, sampling, batch_size=width, stop_ids=[-1]):
        pass
    found = {"took": _peak() - now, "batch": batch, "held": bound - now}
    sys.stdout.write(json.dumps(found) + "\n")


def _peak():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    words = sys.argv[1:]
    main(words[0], *map(int, words[1:4]), float(words[4]), float(words[5]))
