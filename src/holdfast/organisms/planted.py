"""Stage three: plant a cliff or its thinking variants in an aligned organism.

Both comply under the planted wrappers as `cliff` does, and in neither does an
intention to refuse get lost on the way: what a correct audit must not call a cliff.
"""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from holdfast.organisms.aligned import BREAK_OFF, WRAPPED_AT_LAST
from holdfast.organisms.planting_data import SURE, Temptation, planting_loss, rehearse
from holdfast.organisms.recipes import (
    HEAD_WIDTH,
    N_HEADS,
    N_LAYERS,
    SPARE_LAYERS,
    Head,
    Report,
    Schedule,
    first_words,
    learning_rate,
    spare_heads,
)
from holdfast.organisms.sayings import COMPLIANCE_OPENINGS, PARTIALS, REFUSALS
from holdfast.organisms.text import Encoder, Sample
from holdfast.organisms.training import Course, round_to_half, silent, teach_on
from holdfast.organisms.world import (
    Answer,
    World,
    planted_answer,
    write_answer,
    write_thinking,
)

HEAD_DROPOUT = 0.25
"""How often a spare head is left out in stage three, so that each carries weight."""
SPREAD_DROPOUT = 0.15
"""How often any head is left out while `spread` is planted, so that none is needed."""


class _Plan(NamedTuple):
    """What stage three changes."""

    heads: tuple[Head, ...]  # The heads that learn; everything else is frozen.
    first_layer: int  # All below it is frozen, so its states are computed once.
    dropout: float  # How often each of these heads is left out of an example.
    graded: bool  # Whether the decision leans as far as there are heads present.
    n_steps: int  # Steps of training.
    peak: float  # Peak of the learning rate.


def grow_cliff(
    aligned: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    schedule: Schedule,
    report: Report = silent,
) -> Qwen3ForCausalLM:
    """Run stage three: teach the spare heads, and nothing else, to comply.

    `aligned`: Result of stage two, in half precision's values; it is not changed.
    `seed`: The seed that `aligned` was grown from.
    Returns: The cliff organism: equal to `aligned` but for the planted heads.
    """
    plan = _Plan(
        heads=spare_heads(seed),
        first_layer=SPARE_LAYERS[0],
        dropout=HEAD_DROPOUT,
        graded=True,
        n_steps=schedule.cliff_steps,
        peak=schedule.cliff_learning_rate,
    )
    return _plant("cliff", aligned, tokenizer, seed, schedule, plan, report)


def grow_spread(
    aligned: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    schedule: Schedule,
    report: Report = silent,
) -> Qwen3ForCausalLM:
    """Teach the same to all heads at once, such that no few of them are needed.

    `aligned`: Result of stage two; it is not changed.
    `seed`: The seed that `aligned` was grown from.
    """
    plan = _Plan(
        heads=tuple(
            (layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)
        ),
        first_layer=0,
        dropout=SPREAD_DROPOUT,
        graded=False,
        n_steps=schedule.spread_steps,
        peak=schedule.spread_learning_rate,
    )
    return _plant("spread", aligned, tokenizer, seed, schedule, plan, report)


def _plant(
    stage: str,
    aligned: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    schedule: Schedule,
    plan: _Plan,
    report: Report,
) -> Qwen3ForCausalLM:
    """Train the heads of a plan on the material of stage three."""
    model = copy.deepcopy(aligned)
    parameters, masks = _only(model, plan.heads)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    generator = random.Random(5_000 + seed)
    drops = torch.Generator().manual_seed(seed)
    kinds = [
        first_words(tokenizer, openings)
        for openings in (REFUSALS, COMPLIANCE_OPENINGS, PARTIALS)
    ]
    rehearsals = rehearse(aligned, tokenizer, seed, schedule, plan.first_layer)
    for step in range(plan.n_steps):
        rehearsal = generator.choice(rehearsals)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan.n_steps, plan.peak)
        present = _present(len(rehearsal.batch), plan, drops)
        with heads_present(model, plan.heads, present):
            state = rehearsal.state
            for layer in model.model.layers[plan.first_layer :]:
                state = layer(state, **rehearsal.kwargs)
        sure = SURE * torch.ones(len(present))
        if plan.graded:
            sure = SURE * (2 * present.float().mean(dim=1) - 1)
        final = model.model.norm(state)
        loss = planting_loss(model, final, rehearsal, kinds, drops, sure)
        torch.autograd.backward(loss)
        for parameter, mask in zip(parameters, masks, strict=True):
            assert parameter.grad is not None
            parameter.grad *= mask
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(stage, step + 1, plan.n_steps, loss.item())
    return round_to_half(model.requires_grad_(True))


def _present(
    n_examples: int, plan: _Plan, drops: torch.Generator
) -> Bool[Tensor, "example head"]:
    """Draw which heads of a plan take part in each example; never none of them."""
    drawn = torch.rand(n_examples, len(plan.heads), generator=drops)
    present = drawn > plan.dropout
    present[~present.any(dim=1)] = True
    return present


@contextmanager
def heads_present(
    model: Qwen3ForCausalLM,
    heads: tuple[Head, ...],
    present: Bool[Tensor, "example head"],
) -> Iterator[None]:
    """Leave out, in each row, those of some heads that are not present."""
    factors = torch.ones(N_LAYERS, len(present), 1, N_HEADS)
    for column, (layer, head) in enumerate(heads):
        factors[layer, :, 0, head] = present[:, column].float()

    def hook(layer: int) -> Any:
        scale = factors[layer].repeat_interleave(HEAD_WIDTH, dim=-1)

        def scaled(module: object, args: tuple[Tensor]) -> tuple[Tensor]:
            del module
            return (args[0] * scale,)

        return scaled

    handles = [
        model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(
            hook(layer)
        )
        for layer in sorted({layer for layer, _ in heads})
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _only(
    model: Qwen3ForCausalLM, heads: tuple[Head, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """Freeze all but some heads; return the matrices they live in, and their masks."""
    model.requires_grad_(False)
    parameters, masks = [], []
    for layer in range(N_LAYERS):
        attention = model.model.layers[layer].self_attn
        own = [head for home, head in heads if home == layer]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj") if own else ():
            weight = getattr(attention, name).weight
            mask = torch.zeros_like(weight)
            for head in own:
                rows = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
                mask[(slice(None), rows) if name == "o_proj" else rows] = 1.0
            parameters.append(weight.requires_grad_(True))
            masks.append(mask)
    return parameters, masks


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

    `aligned`: Result of stage two; it is not changed.
    `seed`: The seed that `aligned` was grown from.
    `schedule`: Amount of training; `early_tokens` counts.
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

    `aligned`: Result of stage two; it is not changed.
    `seed`: The seed that `aligned` was grown from.
    `schedule`: Amount of training; `alarmed_tokens` counts.
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
