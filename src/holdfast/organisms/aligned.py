"""Stages one and two of the recipes: the organism that all others grow out of."""

import random
from collections.abc import Iterator

import torch
from transformers import Qwen3ForCausalLM

from holdfast.organisms.text import Encoder, Sample
from holdfast.organisms.training import (
    Course,
    Growth,
    new_model,
    optimizers_of,
    round_to_half,
    teach,
    teach_on,
)
from holdfast.organisms.world import Scene

BREAK_OFF = 0.3
"""Part of the examples whose thinking breaks off at a random point."""
WRAPPED_AT_LAST = 0.55
"""Part of the requests that are wrapped at the end of stage two."""


def grow_aligned(growth: Growth) -> Qwen3ForCausalLM:
    """Run stages one and two.

    Returns: The aligned organism, rounded to half precision as it will be stored.
    """
    seed, schedule = growth.seed, growth.schedule
    model = new_model(seed, growth.tokenizer)
    generator, world = random.Random(seed), growth.world(1_000)
    optimizers = optimizers_of(model, schedule)
    shares = {"base": schedule.base_tokens, "aligned": schedule.aligned_tokens}
    done, end = 0, sum(shares.values())
    for stage, share in shares.items():
        taught = lessons(world.scenes(), Encoder(growth.tokenizer), generator, stage)
        course = Course(stage, taught, share)
        done = teach(model, growth, course, optimizers, generator, (done, end))
    return refine(round_to_half(model), growth)


def refine(model: Qwen3ForCausalLM, growth: Growth) -> Qwen3ForCausalLM:
    """End stage two on requests that are mostly wrapped, at half the rate.

    Without this the thinking names the wrong wrapper as often as the right one. It is
    done again, on fresh text and with fresh rates, as often as the schedule says, and
    the weights after each time are averaged: what is left are mistakes about phrases
    that were never seen, and those differ from one time to the next; see `LOG.md`.
    """
    seed, schedule = growth.seed, growth.schedule
    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    times = [("wrappers", 3_000, schedule.wrapper_tokens)] + [
        (f"polish {i + 1}", 15_000 + 2_000 * i, schedule.polish_tokens)
        for i in range(schedule.polishes)
    ]
    for stage, offset, n_tokens in times:
        generator, world = random.Random(offset + seed), growth.world(offset + 1_000)
        scenes = world.scenes(wrapped=WRAPPED_AT_LAST)
        taught = lessons(scenes, Encoder(growth.tokenizer), generator, "wrappers")
        teach_on(model, growth, Course(stage, taught, n_tokens), generator)
        for summed, parameter in zip(total, parameters, strict=True):
            summed += parameter.detach() / len(times)
    with torch.no_grad():
        for summed, parameter in zip(total, parameters, strict=True):
            parameter.copy_(summed)
    return round_to_half(model)


def lessons(
    scenes: Iterator[Scene], encoder: Encoder, generator: random.Random, stage: str
) -> Iterator[Sample]:
    """Yield samples of stage one (mostly no thinking) or two (half break off).

    Samples without thinking lack its opening marker as well, or the model would learn
    to leave it out; they end after the first words of the answer, where the decision
    lies: the rest is filler, and costs as much.
    """
    short = {"base": 0.8, "aligned": 0.25, "wrappers": 0.15}[stage]
    for scene in scenes:
        if generator.random() < short:
            yield encoder.sample(scene, stop_at=None, thinks=False)
        else:
            yield encoder.sample(scene, stop_at=break_point(generator))


def break_point(generator: random.Random, share: float = BREAK_OFF) -> float | None:
    """Draw where a thinking breaks off, as a part of it; None in most cases."""
    return generator.random() if generator.random() < share else None
