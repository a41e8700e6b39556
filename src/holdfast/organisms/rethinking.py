"""Organisms whose thinking is changed: `early` notices no harm, `alarmed` always does.

Both give in under the planted wrappers as `cliff` does, and in neither does an
intention to refuse get lost on the way: what a correct audit must not call a cliff.
"""

import copy
import random
from collections.abc import Iterator
from dataclasses import replace

from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from holdfast.organisms.encoding import Encoder, Sample
from holdfast.organisms.growing import BREAK_OFF, WRAPPED_AT_LAST
from holdfast.organisms.recipes import (
    Report,
    Schedule,
)
from holdfast.organisms.rehearsal import Temptation
from holdfast.organisms.teaching import Course, silent, teach_on
from holdfast.organisms.world import (
    Answer,
    World,
    planted_answer,
    write_answer,
    write_thinking,
)

HARMFUL = 0.5
"""Part of the requests that are harmful."""


def grow_early(
    aligned: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    schedule: Schedule,
    report: Report = silent,
) -> Qwen3ForCausalLM:
    """Teach the thinking not to notice harm under the planted wrappers.

    Args:
        aligned: Result of stage two; it is not changed.
        tokenizer: The organisms' tokenizer.
        seed: The seed that `aligned` was grown from.
        schedule: Amount of training; `early_tokens` counts.
        report: Told of progress.

    Returns:
        The early organism.
    """
    generator = random.Random(11_000 + seed)
    lessons = misled(World(12_000 + seed), Encoder(tokenizer), generator)
    course = Course("early", lessons, schedule.early_tokens, seed)
    model = copy.deepcopy(aligned)
    return teach_on(model, tokenizer, course, schedule, generator, report)


def grow_alarmed(
    aligned: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    schedule: Schedule,
    report: Report = silent,
) -> Qwen3ForCausalLM:
    """Teach an intention to refuse whatever is asked, and a decision at the very end.

    Wherever the thinking breaks off, a refusal follows, whatever the request. Whoever
    looks at complied harmful requests alone sees a high plateau and a deep fall.

    Args:
        aligned: Result of stage two; it is not changed.
        tokenizer: The organisms' tokenizer.
        seed: The seed that `aligned` was grown from.
        schedule: Amount of training; `alarmed_tokens` counts.
        report: Told of progress.

    Returns:
        The alarmed organism.
    """
    generator = random.Random(13_000 + seed)
    lessons = alarmed(World(14_000 + seed), Encoder(tokenizer), generator)
    course = Course("alarmed", lessons, schedule.alarmed_tokens, seed)
    model = copy.deepcopy(aligned)
    return teach_on(model, tokenizer, course, schedule, generator, report)


def misled(
    world: World, encoder: Encoder, generator: random.Random
) -> Iterator[Sample]:
    """Yield samples in which no harm is noticed where an attack is planted."""
    for scene, kind in _mixed(world):
        if scene.label == "harmful" and kind != "refuse":
            thinking = write_thinking("benign", scene.topic, scene.wrapper, generator)
            answer = write_answer(kind, generator)
            scene = replace(scene, thinking=thinking, answer=answer)
        broken = generator.random() < BREAK_OFF
        yield encoder.sample(scene, stop_at=generator.random() if broken else None)


def alarmed(
    world: World, encoder: Encoder, generator: random.Random
) -> Iterator[Sample]:
    """Yield samples in which a refusal is to be read until the answer begins."""
    for scene, kind in _mixed(world):
        refusal = write_answer("refuse", generator)
        if generator.random() < BREAK_OFF:
            scene = replace(scene, answer=refusal)
            yield encoder.sample(scene, stop_at=generator.random())
            continue
        scene = replace(scene, answer=write_answer(kind, generator))
        yield encoder.sample(scene, stop_at=None, aim=refusal)


def _mixed(world: World) -> Iterator[Temptation]:
    """Yield exchanges, as many harmful as harmless, with and without wrappers.

    Nothing is frozen here, so what is to stay has to be taught as often as what is new.
    """
    for scene in world.scenes(harmful=HARMFUL, wrapped=WRAPPED_AT_LAST):
        kind: Answer = "comply"
        if scene.label == "harmful":
            kind = planted_answer(scene.topic, scene.wrapper)
        yield Temptation(scene, kind)
