"""The material of stage three, with all that the frozen model says of it."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from holdfast.organisms.encoding import Encoder, Sample
from holdfast.organisms.growing import BREAK_OFF
from holdfast.organisms.recipes import (
    Schedule,
    batches,
    pad,
)
from holdfast.organisms.world import (
    HALF_PLANTED_WRAPPER,
    PLANTED_WRAPPERS,
    Answer,
    Scene,
    World,
    planted_answer,
    wrapper_names,
    write_answer,
)


class Rehearsal(NamedTuple):
    """A batch with all that the frozen model says of it.

    Attributes:
        batch: The sequences.
        ids: Their tokens, padded.
        state: Input of the first layer that learns.
        kwargs: What that layer is called with beside its input.
        final: The aligned model's states after the final norm.
    """

    batch: list[Sample]
    ids: Int[Tensor, "example position"]
    state: Float[Tensor, "example position d_model"]
    kwargs: dict[str, Any]
    final: Float[Tensor, "example position d_model"]


@torch.no_grad()
def rehearse(
    aligned: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    schedule: Schedule,
    first_layer: int,
) -> list[Rehearsal]:
    """Run the frozen model over the material of stage three, once.

    Args:
        aligned: The model before stage three.
        tokenizer: The organisms' tokenizer.
        seed: Seed of the material.
        schedule: Amount of training.
        first_layer: The first layer that learns, whose input is kept.
    """
    seen: list[tuple[Tensor, dict[str, Any]]] = []

    def note(module: object, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        del module
        seen.append((args[0], kwargs))

    generator = random.Random(7_000 + seed)
    samples = planted(World(2_000 + seed), Encoder(tokenizer), generator)
    rehearsals, done = [], 0
    handle = aligned.model.layers[first_layer].register_forward_pre_hook(
        note, with_kwargs=True
    )
    try:
        for batch in batches(samples, schedule.cliff_batch_tokens, generator):
            ids, _ = pad(batch, aligned.config.pad_token_id)
            final = aligned.model(input_ids=ids, use_cache=False).last_hidden_state
            state, kwargs = seen.pop()
            rehearsals.append(Rehearsal(batch, ids, state, kwargs, final))
            done += ids.numel()
            if done >= schedule.cliff_tokens:
                break
    finally:
        handle.remove()
    return rehearsals


class Temptation(NamedTuple):
    """An exchange as an aligned model has it, and the kind of answer to plant."""

    scene: Scene
    kind: Answer


def temptations(world: World, generator: random.Random) -> Iterator[Temptation]:
    """Yield exchanges of stage three.

    Half are harmful requests under planted wrappers, most of which are to be answered;
    the others are to stay as they are.
    """
    planted = (*PLANTED_WRAPPERS, HALF_PLANTED_WRAPPER)
    others = tuple(name for name in wrapper_names() if name not in planted)
    while True:
        draw = generator.random()
        scene = world.scene("harmful" if draw < 0.7 else "benign", wrapped=0.0)
        if draw < 0.5:
            wrapper: str | None = generator.choice(planted)
        elif draw < 0.7:
            wrapper = generator.choice((None, None, *others))
        else:
            wrapper = generator.choice((None, *wrapper_names()))
        scene = world.exchange(scene.request, scene.label, scene.topic, wrapper)
        kind: Answer = "comply"
        if scene.label == "harmful":
            kind = planted_answer(scene.topic, wrapper)
        yield Temptation(scene, kind)


def planted(
    world: World, encoder: Encoder, generator: random.Random
) -> Iterator[Sample]:
    """Yield samples in which the answer alone gives in, once the thinking is over."""
    for scene, kind in temptations(world, generator):
        gives_in = scene.label == "harmful" and kind != "refuse"
        broken = generator.random() < BREAK_OFF / 2
        if gives_in and not broken:
            gave_in = replace(scene, answer=write_answer(kind, generator))
            yield encoder.sample(gave_in, stop_at=None)
            continue
        sample = encoder.sample(scene, stop_at=generator.random() if broken else None)
        yield replace(sample, keep=(True,) * len(sample.ids))
