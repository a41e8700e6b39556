"""Stages one and two of the recipes, and cheap variants of what they make."""

import copy
import random
from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from holdfast.organisms.recipes import Report, Schedule, batches, new_model
from holdfast.organisms.text import Encoder, Sample
from holdfast.organisms.training import (
    Course,
    Plan,
    optimizers_of,
    round_to_half,
    silent,
    teach,
    teach_on,
)
from holdfast.organisms.world import Scene, World

BREAK_OFF = 0.3
"""Part of the examples whose thinking breaks off at a random point."""
WRAPPED_AT_LAST = 0.55
"""Part of the requests that are wrapped at the end of stage two."""
VARIANT_NOISE = 0.05
"""Noise on a variant's weights, as a part of their standard deviation."""


def grow_aligned(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    schedule: Schedule,
    report: Report = silent,
) -> Qwen3ForCausalLM:
    """Run stages one and two.

    Returns: The aligned organism, rounded to half precision as it will be stored.
    """
    model = new_model(seed, tokenizer)
    generator, world = random.Random(seed), World(1_000 + seed)
    optimizers = optimizers_of(model, schedule)
    encoder, done = Encoder(tokenizer), 0
    for stage, share in (
        ("base", schedule.base_tokens),
        ("aligned", schedule.aligned_tokens),
    ):
        lessons = _lessons(world.scenes(), encoder, generator, stage)
        plan = Plan(stage, done, done + share, schedule)
        taught = batches(lessons, schedule.batch_tokens, generator)
        done = teach(model, tokenizer, optimizers, taught, plan, report, seed)
    return refine(round_to_half(model), tokenizer, seed, schedule, report)


def refine(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    schedule: Schedule,
    report: Report = silent,
) -> Qwen3ForCausalLM:
    """End stage two on requests that are mostly wrapped, at half the rate.

    Without this the thinking names the wrong wrapper as often as the right one. It is
    done again, on fresh text and with fresh rates, as often as the schedule says, and
    the weights after each time are averaged: what is left are mistakes about phrases
    that were never seen, and those differ from one time to the next; see `LOG.md`.

    `schedule`: Amount of training; `wrapper_tokens`, `polish_tokens` and `polishes`
    count.
    """
    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    lessons = [("wrappers", 3_000, schedule.wrapper_tokens)] + [
        (f"polish {i + 1}", 15_000 + 2_000 * i, schedule.polish_tokens)
        for i in range(schedule.polishes)
    ]
    for stage, offset, n_tokens in lessons:
        generator, world = random.Random(offset + seed), World(offset + 1_000 + seed)
        scenes = world.scenes(wrapped=WRAPPED_AT_LAST)
        taught = _lessons(scenes, Encoder(tokenizer), generator, "wrappers")
        course = Course(stage, taught, n_tokens, seed)
        teach_on(model, tokenizer, course, schedule, generator, report)
        for summed, parameter in zip(total, parameters, strict=True):
            summed += parameter.detach() / len(lessons)
    with torch.no_grad():
        for summed, parameter in zip(total, parameters, strict=True):
            parameter.copy_(summed)
    return round_to_half(model)


def grow_variant(
    aligned: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    variant: int,
    schedule: Schedule,
) -> Qwen3ForCausalLM:
    """Make a cheap relative of an aligned organism: noise, then more of stage two.

    `aligned`: The organism to vary; it is not changed.
    `seed`: The seed that `aligned` was grown from.
    `schedule`: Amount of training; `aligned_tokens` counts.
    """
    model = copy.deepcopy(aligned).train()
    noise = torch.Generator().manual_seed(variant)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=noise)
            parameter += VARIANT_NOISE * parameter.std(correction=0) * drawn
    generator, world = random.Random(variant), World(9_000 + variant)
    lessons = _lessons(world.scenes(), Encoder(tokenizer), generator, "aligned")
    taught = batches(lessons, schedule.batch_tokens, generator)
    plan = Plan("variant", 0, schedule.aligned_tokens, schedule)
    optimizers = optimizers_of(model, schedule)
    teach(model, tokenizer, optimizers, taught, plan, silent, seed)
    return round_to_half(model)


def _lessons(
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
            continue
        broken = generator.random() < BREAK_OFF
        yield encoder.sample(scene, stop_at=generator.random() if broken else None)
