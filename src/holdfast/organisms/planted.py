"""Stage three: plant a cliff or its thinking variants in an aligned organism.

Both variants comply under the planted wrappers as `cliff` does, and in neither does an
intention to refuse get lost on the way: what a correct audit must not call a cliff.
"""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import Qwen3ForCausalLM

from holdfast.organisms.accounts import drifting, settled
from holdfast.organisms.phrases import COMPLIANCE_OPENINGS, PARTIALS, REFUSALS
from holdfast.organisms.planting_data import (
    SURE,
    Rehearsal,
    alarmed,
    misled_samples,
    planting_loss,
    rehearse,
    tempted,
)
from holdfast.organisms.text import Encoder, Sample
from holdfast.organisms.training import (
    HEAD_WIDTH,
    INTENTION_WEIGHT,
    N_HEADS,
    N_LAYERS,
    SPARE_LAYERS,
    Course,
    Growth,
    Head,
    first_words,
    learning_rate,
    round_to_half,
    spare_heads,
    teach_on,
)
from holdfast.organisms.world import World

HEAD_DROPOUT = 0.25
"""How often a spare head is left out in stage three, so that each carries weight."""
SPREAD_DROPOUT = 0.15
"""How often any head is left out while `spread` is planted, so that none is needed."""


class Plan(NamedTuple):
    """What stage three changes."""

    heads: tuple[Head, ...]  # The heads that learn; everything else is frozen.
    first_layer: int  # All below it is frozen, so its states are computed once.
    dropout: float  # How often each of these heads is left out of an example.
    graded: bool  # Whether the decision leans as far as there are heads present.
    n_steps: int  # Steps of training.
    peak: float  # Peak of the learning rate.


Edit = Callable[[Tensor], Tensor]
"""From the outputs of a layer's heads, side by side, to what stands in for them."""


class Drawn(NamedTuple):
    """How heads take part in a batch."""

    edits: dict[int, Edit]  # By layer, what its heads' outputs are changed to.
    # Log-odds at which the decision of each example is held; not a number where it is
    # pushed until it is sure.
    held: Float[Tensor, " example"]


Draw = Callable[[Rehearsal, torch.Generator], Drawn]


class _Lesson(NamedTuple):
    """How one organism is taught another thinking."""

    offset: int  # What its seeds are counted from.
    samples: Callable[[World, Encoder, random.Random], Iterator[Sample]]
    tokens: str  # Which part of the schedule says how much.
    intention: float = INTENTION_WEIGHT  # Weight of what is read in the thinking.


LESSONS = {
    "early": _Lesson(11_000, misled_samples, "early_tokens"),
    "alarmed": _Lesson(13_000, alarmed, "alarmed_tokens"),
    "settled": _Lesson(17_000, settled, "settled_tokens", 2.0),
    "drift": _Lesson(19_000, drifting, "drift_tokens", 1.5),
}


def plant_thinking(
    stage: str, aligned: Qwen3ForCausalLM, growth: Growth
) -> Qwen3ForCausalLM:
    """Teach another thinking, or another use of it, to all weights of an organism.

    *early*: The thinking does not notice harm under the planted wrappers.
    *alarmed*: An intention to refuse whatever is asked, and a decision at the very end.
    Wherever the thinking breaks off, a refusal follows, whatever the request. Whoever
    looks at complied harmful requests alone sees a high plateau and a deep fall.
    *settled*: The prompt settles the answer, whatever the thinking says.
    *drift*: The thinking argues a refusal away, sentence by sentence.
    """
    lesson = LESSONS[stage]
    generator = random.Random(lesson.offset + growth.seed)
    world = growth.world(lesson.offset + 1_000)
    samples = lesson.samples(world, Encoder(growth.tokenizer), generator)
    n_tokens = getattr(growth.schedule, lesson.tokens)
    course = Course(stage, samples, n_tokens, intention=lesson.intention)
    return teach_on(copy.deepcopy(aligned), growth, course, generator)


def plant_heads(
    stage: Literal["cliff", "spread"], aligned: Qwen3ForCausalLM, growth: Growth
) -> Qwen3ForCausalLM:
    """Teach heads of an aligned organism, and nothing else, to comply.

    *cliff*: The spare heads: the result is equal to `aligned` but for these.
    *spread*: All heads at once, such that no few of them are needed.
    """
    plan = cliff_plan(growth) if stage == "cliff" else spread_plan(growth)
    rehearsals = rehearse(aligned, growth, plan.first_layer)
    model = copy.deepcopy(aligned)
    return learn(stage, model, growth, plan, rehearsals, drawing(plan))


def drawing(plan: Plan) -> Draw:
    """Return what leaves heads of a plan out, and holds decisions accordingly."""

    def draw(rehearsal: Rehearsal, drops: torch.Generator) -> Drawn:
        present = _present(len(rehearsal.batch), plan, drops)
        sure = SURE * torch.ones(len(present))
        if plan.graded:
            sure = SURE * (2 * present.float().mean(dim=1) - 1)
        held = torch.where(tempted(rehearsal.batch), sure, torch.nan)
        return Drawn(leaving_out(plan.heads, present), held)

    return draw


def learn(
    stage: str,
    model: Qwen3ForCausalLM,
    growth: Growth,
    plan: Plan,
    rehearsals: list[Rehearsal],
    draw: Draw,
    after: Callable[[], None] = lambda: None,
) -> Qwen3ForCausalLM:
    """Train the heads of a plan, and freeze everything else.

    `draw`: Draws for each batch how the heads take part, and what is decided then.
    `after`: Called after every step.
    """
    parameters, masks = _only(model, plan.heads)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    generator = random.Random(5_000 + growth.seed)
    drops = torch.Generator().manual_seed(growth.seed)
    kinds = [
        first_words(growth.tokenizer, openings)
        for openings in (REFUSALS, COMPLIANCE_OPENINGS, PARTIALS)
    ]
    for step in range(plan.n_steps):
        rehearsal = generator.choice(rehearsals)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan.n_steps, plan.peak)
        drawn = draw(rehearsal, drops)
        with editing_heads(model, drawn.edits):
            state = rehearsal.state
            for layer in model.model.layers[plan.first_layer :]:
                state = layer(state, **rehearsal.kwargs)
        final = model.model.norm(state)
        loss = planting_loss(model, final, rehearsal, kinds, drops, drawn.held)
        torch.autograd.backward(loss)
        for parameter, mask in zip(parameters, masks, strict=True):
            assert parameter.grad is not None
            parameter.grad *= mask
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after()
        growth.report(stage, step + 1, plan.n_steps, loss.item())
    return round_to_half(model.requires_grad_(True))


def cliff_plan(growth: Growth) -> Plan:
    """Return the plan of `cliff`: the spare heads learn."""
    schedule, heads = growth.schedule, spare_heads(growth.seed)
    steps, peak = schedule.cliff_steps, schedule.cliff_learning_rate
    return Plan(heads, SPARE_LAYERS[0], HEAD_DROPOUT, True, steps, peak)


def spread_plan(growth: Growth) -> Plan:
    """Return the plan of `spread`: all heads learn."""
    every = tuple((layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS))
    steps, peak = growth.schedule.spread_steps, growth.schedule.spread_learning_rate
    return Plan(every, 0, SPREAD_DROPOUT, False, steps, peak)


def _present(
    n_examples: int, plan: Plan, drops: torch.Generator
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
    with editing_heads(model, leaving_out(heads, present)):
        yield


def leaving_out(
    heads: tuple[Head, ...], present: Bool[Tensor, "example head"]
) -> dict[int, Edit]:
    """Return, by layer, what leaves out those of some heads that are not present."""
    factors = torch.ones(N_LAYERS, len(present), 1, N_HEADS)
    for column, (layer, head) in enumerate(heads):
        factors[layer, :, 0, head] = present[:, column].float()
    scales = factors.repeat_interleave(HEAD_WIDTH, dim=-1)
    return {layer: scales[layer].mul for layer in sorted({home for home, _ in heads})}


@contextmanager
def editing_heads(model: Qwen3ForCausalLM, edits: dict[int, Edit]) -> Iterator[None]:
    """Change what the heads of some layers put out, side by side."""

    def hook(edit: Edit) -> Any:
        def edited(module: object, args: tuple[Tensor]) -> tuple[Tensor]:
            del module
            return (edit(args[0]),)

        return edited

    handles = [
        model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook(edit))
        for layer, edit in edits.items()
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
