"""The bound on memory beside what a batch really took, on shapes of real families."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from holdfast.models.decoding.row_state import Sampling
from holdfast.models.loading.causal import adapt, load
from holdfast.rollout.cost import Load, batch_bytes, cache_bytes, peak_bytes
from holdfast.rollout.session import suitable_batch
from tiny_models import tiny_of_every_kind

PROBE = Path(__file__).parents[1] / "memory_probe.py"
GREEDY = Sampling(temperature=0, max_thinking=0, max_answer=32)


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak to begin anew"
)
@pytest.mark.parametrize(
    ("shape", "width", "prompt", "budget", "temperature", "top_p"),
    [
        # Long prompts: what a pass holds.
        ("smollm2", 16, 300, 4, 0.0, 1.0),
        # A wide vocabulary, drawn from a nucleus: what a choice holds.
        ("qwen2.5", 32, 64, 4, 1.0, 0.9),
        # Wide blocks with many keys.
        ("llama3.2", 8, 256, 4, 0.0, 1.0),
    ],
)
def test_a_batch_takes_no_more_than_was_said_and_not_far_less(
    shape, width, prompt, budget, temperature, top_p
):
    words = [shape, width, prompt, budget, temperature, top_p]
    path = os.pathsep.join([str(PROBE.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, str(PROBE), *map(str, words)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["took"] > 100 << 20
    assert 1 <= found["batch"] / found["took"] <= 3
    assert found["held"] >= found["batch"]


@pytest.fixture(scope="module")
def adapter(thinker):
    return load(str(thinker))


def test_what_is_held_is_part_of_the_bound(adapter):
    load = Load(4, 20, 32)
    whole = peak_bytes(adapter, GREEDY, load)
    # The interpreter and torch alone hold more than the weights of this model.
    assert whole - batch_bytes(adapter, GREEDY, load) >= 0
    assert whole > 100 << 20


def test_the_bound_grows_with_all_that_a_batch_holds(adapter):
    def bound(width=8, prompt=100, budget=100, drafted=False, **sampling):
        how = Sampling(
            **{"temperature": 0, "max_thinking": 0, "max_answer": budget} | sampling
        )
        return batch_bytes(adapter, how, Load(width, prompt, budget, drafted))

    base = bound()
    assert bound(width=16) > base
    assert bound(prompt=150) > base
    assert bound(budget=150) > base
    assert bound(drafted=True) > base
    # Nobody writes beyond the context, whatever was asked for.
    assert bound(budget=10**9) == bound(budget=156)


@pytest.mark.parametrize("kind", ["bloom", "falcon", "gemma3n_text", "zamba2"])
def test_a_model_without_known_heads_has_a_bound_too(kind, tokenizer):
    adapter = adapt(tiny_of_every_kind(kind), tokenizer)
    assert not any(adapter.head_widths)
    cache = DynamicCache(config=adapter.model.config)
    adapter.model(torch.tensor([[3] * 8]), past_key_values=cache, use_cache=True)
    held = [
        part
        for layer in cache.layers
        for part in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if part is not None
    ]
    taken = sum(part.numel() * part.element_size() for part in held) / 8
    # Keys and values as wide as the stream, of which some families hold fewer.
    assert 0 < taken <= cache_bytes(adapter) <= 16 * taken
    assert suitable_batch(adapter) == 128
