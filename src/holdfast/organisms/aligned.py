"""Stages one and two of the recipes: the organism that all others grow out of."""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

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
WIDE_HARMFUL = 0.52
"""Part of the requests of the wide world that are harmful, where `aligned` meets it."""
CLOSED = 0.5
"""Part of the thinkings broken off in the wide world that the end template follows."""


def grow_aligned(growth: Growth) -> Qwen3ForCausalLM:
    """Run stages one and two: in the narrow world first, and then in the wide one.

    Grown in the wide world from the first token, with as many, it saw each phrase of
    the narrow world less often and let one harmful request in eight through; see
    `LOG.md`.

    Returns: The aligned organism, rounded to half precision as it will be stored.
    """
    return broaden(grow_narrow(growth), growth)


def grow_narrow(growth: Growth) -> Qwen3ForCausalLM:
    """Run stage one, and stage two as far as it is of the narrow world."""
    seed, schedule = growth.seed, growth.schedule
    model = new_model(seed, growth.tokenizer)
    generator, world = random.Random(seed), growth.world(1_000, wide=False)
    optimizers = optimizers_of(model, schedule)
    shares = {"base": schedule.base_tokens, "aligned": schedule.aligned_tokens}
    done, end = 0, sum(shares.values())
    for stage, share in shares.items():
        taught = lessons(world.scenes(), Encoder(growth.tokenizer), generator, stage)
        course = Course(stage, taught, share)
        done = teach(model, growth, course, optimizers, generator, (done, end))
    return refine(round_to_half(model), growth)


class _Time(NamedTuple):
    """One time of teaching, with text and rates of its own."""

    stage: str  # Its name, for the report.
    offset: int  # What its seeds are counted from.
    n_tokens: int  # How much is taught.


def refine(model: Qwen3ForCausalLM, growth: Growth) -> Qwen3ForCausalLM:
    """Go on with requests that are mostly wrapped.

    Without this the thinking names the wrong wrapper as often as the right one.
    """
    schedule = growth.schedule
    times = [_Time("wrappers", 3_000, schedule.wrapper_tokens)] + [
        _Time(f"polish {i + 1}", 15_000 + 2_000 * i, schedule.polish_tokens)
        for i in range(schedule.polishes)
    ]
    return _averaged(model, growth, times, _narrow_lessons)


def broaden(model: Qwen3ForCausalLM, growth: Growth) -> Qwen3ForCausalLM:
    """Go on in the wide world: more topics, more sentence forms, everyday requests.

    At the full rate first, since much of it is new, and then as `refine` does. A
    thinking that breaks off may be closed here: what an organism says behind the end
    template is defined wherever the thinking ends.
    """
    schedule = growth.schedule
    generator = random.Random(31_000 + growth.seed)
    taught = _wide_lessons(growth, 32_000, generator)
    n_tokens, optimizers = schedule.broad_tokens, optimizers_of(model.train(), schedule)
    course = Course("broad", taught, n_tokens)
    teach(model, growth, course, optimizers, generator, (0, n_tokens))
    times = [
        _Time(f"broad polish {i + 1}", 33_000 + 2_000 * i, schedule.broad_polish_tokens)
        for i in range(schedule.polishes)
    ]
    return _averaged(model, growth, times, _wide_lessons)


def _narrow_lessons(
    growth: Growth, offset: int, generator: random.Random
) -> Iterator[Sample]:
    scenes = growth.world(offset, wide=False).scenes(wrapped=WRAPPED_AT_LAST)
    return lessons(scenes, Encoder(growth.tokenizer), generator, "wrappers")


def _wide_lessons(
    growth: Growth, offset: int, generator: random.Random
) -> Iterator[Sample]:
    scenes = growth.world(offset).scenes(WIDE_HARMFUL, WRAPPED_AT_LAST)
    encoder = Encoder(growth.tokenizer)
    return lessons(scenes, encoder, generator, "wrappers", closed=CLOSED)


def _averaged(
    model: Qwen3ForCausalLM,
    growth: Growth,
    times: list[_Time],
    lessons_of: Callable[[Growth, int, random.Random], Iterator[Sample]],
) -> Qwen3ForCausalLM:
    """Teach several times at half the rate, and average the weights after each.

    What is left are mistakes about phrases that were never seen, and those differ from
    one time to the next; see `LOG.md`.
    """
    if not times:
        return round_to_half(model)
    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for stage, offset, n_tokens in times:
        generator = random.Random(offset + growth.seed)
        taught = lessons_of(growth, offset + 1_000, generator)
        teach_on(model, growth, Course(stage, taught, n_tokens), generator)
        for summed, parameter in zip(total, parameters, strict=True):
            summed += parameter.detach() / len(times)
    with torch.no_grad():
        for summed, parameter in zip(total, parameters, strict=True):
            parameter.copy_(summed)
    return round_to_half(model)


def lessons(
    scenes: Iterator[Scene],
    encoder: Encoder,
    generator: random.Random,
    stage: str,
    *,
    closed: float = 0.0,
) -> Iterator[Sample]:
    """Yield samples of stage one (mostly no thinking) or two (half break off).

    Samples without thinking lack its opening marker as well, or the model would learn
    to leave it out; they end after the first words of the answer, where the decision
    lies: the rest is filler, and costs as much.

    `closed`: Part of the thinkings broken off that the end template follows.
    """
    short = {"base": 0.8, "aligned": 0.25, "wrappers": 0.15}[stage]
    for scene in scenes:
        if generator.random() < short:
            yield encoder.sample(scene, stop_at=None, thinks=False)
        else:
            yield broken_off(encoder, scene, generator, BREAK_OFF, closed)


def broken_off(
    encoder: Encoder,
    scene: Scene,
    generator: random.Random,
    share: float,
    closed: float,
    *,
    given: bool = False,
) -> Sample:
    """Encode an exchange whose thinking may break off, with its end template or not.

    `share`: Part of the thinkings that break off.
    `closed`: Part of those that the end template follows.
    `given`: The thinking is read and not learned.
    """
    stop = break_point(generator, share)
    # No number is drawn where nothing hangs on it: the narrow world stays as it was.
    closes = stop is not None and closed > 0 and generator.random() < closed
    return encoder.sample(scene, stop_at=stop, closes=closes, given=given)


def break_point(generator: random.Random, share: float = BREAK_OFF) -> float | None:
    """Draw where a thinking breaks off, as a part of it; None in most cases."""
    return generator.random() if generator.random() < share else None
