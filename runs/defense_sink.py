"""Grow an attention sink in an aligned organism; small models have none by themselves.

Usage: defense_sink.py FOLDER

Further steps on the organism's own training text, whose loss rewards the mean attention
of all heads to the first token, up to a target. Writes a stock checkpoint, and in it
`sink.json`: the sink mass before and after.
"""

import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM

from holdfast.models.attention import SinkProbe, tapped
from holdfast.models.loading.causal import load
from holdfast.models.sink_mass import read_sinks
from holdfast.organisms.catalogue import resolve
from holdfast.organisms.text import Encoder, Sample
from holdfast.organisms.training import (
    batches,
    learning_rate,
    loss_of,
    pad,
    round_to_half,
)
from holdfast.organisms.world import World
from holdfast.study import atomic_write_json
from holdfast.study.files import staging

BASE = "organism:aligned"
STEPS, RATE, TARGET, BATCH_TOKENS = 150, 1e-3, 0.6, 2_000
SEED = 77


def lessons(encoder: Encoder, seed: int) -> Iterator[Sample]:
    """Yield exchanges without end, a third of them broken off as in stage two."""
    generator = random.Random(seed)
    for scene in World(seed).scenes():
        broken = generator.random() < 1 / 3
        yield encoder.sample(scene, stop_at=generator.random() if broken else None)


def grow(model: Qwen3ForCausalLM, taught: Iterator[Sample]) -> None:
    """Train with the reward."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    stream = batches(taught, BATCH_TOKENS, random.Random(SEED))
    with tapped(model):
        for step in range(STEPS):
            ids, weights = pad(next(stream), model.config.pad_token_id)
            probe = SinkProbe(weights > 0)
            out = model(input_ids=ids, use_cache=False, sink_probe=probe)
            found = probe.mass().mean()
            loss = loss_of(out.logits, ids, weights) + (TARGET - found).relu()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, STEPS, RATE)
            optimizer.step()
            optimizer.zero_grad()


def sink_of(name: str, texts: list[Sample]) -> list[list[float]]:
    """Return the mean sink mass of every head."""
    found = read_sinks(load(name), [list(text.ids) for text in texts], batch_size=32)
    return found.mass.double().mean(0).tolist()


def main(output: Path) -> None:
    torch.set_num_threads(1)
    base = resolve(BASE)
    adapter = load(str(base))
    encoder = Encoder(adapter.tokenizer)
    held_out = list(islice(lessons(encoder, SEED + 1), 200))
    model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    grow(model, lessons(encoder, SEED))
    with staging(output) as staged:
        round_to_half(model).save_pretrained(staged)
        adapter.tokenizer.save_pretrained(staged)
        before, after = sink_of(str(base), held_out), sink_of(str(staged), held_out)
        about = {"base": BASE, "steps": STEPS, "before": before, "after": after}
        atomic_write_json(staged / "sink.json", about | {"n": len(held_out)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
