"""Grow a cheap variant of an aligned organism: noise on the weights, more training.

Usage: organisms_variant.py ALIGNED VARIANT OUT
"""

import json
import random
import sys
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from holdfast.organisms.aligned import lessons
from holdfast.organisms.catalogue import write
from holdfast.organisms.text import Encoder
from holdfast.organisms.training import (
    Course,
    Growth,
    Schedule,
    optimizers_of,
    round_to_half,
    teach,
)
from holdfast.organisms.world import World

VARIANT_NOISE = 0.05
"""Noise on a variant's weights, as a part of their standard deviation."""


def grow_variant(
    model: Qwen3ForCausalLM, growth: Growth, variant: int
) -> Qwen3ForCausalLM:
    """Make a cheap relative of an aligned organism, in place: noise, then stage two."""
    model.train()
    noise = torch.Generator().manual_seed(variant)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=noise)
            parameter += VARIANT_NOISE * parameter.std(correction=0) * drawn
    generator, world = random.Random(variant), World(9_000 + variant, wide=True)
    taught = lessons(world.scenes(), Encoder(growth.tokenizer), generator, "aligned")
    schedule = growth.schedule
    course = Course("variant", taught, schedule.aligned_tokens)
    end = schedule.base_tokens + schedule.aligned_tokens
    teach(model, growth, course, optimizers_of(model, schedule), generator, (0, end))
    return round_to_half(model)


def main(source: str, variant: str, out: str) -> None:
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    aligned = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32)
    truth = json.loads((Path(source) / "truth.json").read_text("utf-8"))
    schedule = Schedule(
        base_tokens=0,
        aligned_tokens=40_000,
        learning_rate=1e-3,
        embedding_learning_rate=1e-3,
    )
    growth = Growth(tokenizer, truth["seed"], schedule)
    grown = grow_variant(aligned, growth, int(variant))
    record = {**truth, "variant": int(variant), "variant_of": Path(source).name}
    write(grown, tokenizer, "aligned", record, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
