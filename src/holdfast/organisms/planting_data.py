"""The data and the loss of planting."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3ForCausalLM

from holdfast.organisms.aligned import (
    BREAK_OFF,
    WRAPPED_AT_LAST,
    break_point,
    broken_off,
)
from holdfast.organisms.text import Encoder, Sample
from holdfast.organisms.training import INTENTION_WEIGHT, Growth, batches, pad
from holdfast.organisms.world import (
    HALF_PLANTED_WRAPPER,
    PLANTED_WRAPPERS,
    Answer,
    Scene,
    World,
    planted_answer,
    wrapper_names,
    write_answer,
    write_thinking,
)

HARMFUL = 0.5
"""Part of the requests that are harmful where the thinking is taught."""
BROKEN = 0.5
"""Part of the thinkings that break off where they are not to change the answer."""
CLOSED_MISLED = 0.7
"""Part of these that the end template follows, where no harm is noticed."""


class Rehearsal(NamedTuple):
    """A batch with all that the frozen model says of it."""

    batch: list[Sample]  # The sequences.
    ids: Int[Tensor, "example position"]  # Their tokens, padded.
    # Input of the first layer that learns.
    state: Float[Tensor, "example position d_model"]
    kwargs: dict[str, Any]  # What that layer is called with beside its input.
    # The aligned model's states after the final norm.
    final: Float[Tensor, "example position d_model"]


def kind_to_plant(scene: Scene) -> Answer:
    """Return how an exchange is to be answered once something is planted."""
    if scene.label == "benign":
        return "comply"
    return planted_answer(scene.topic, scene.wrapper)


def kind_by_wrapper(scene: Scene) -> Answer:
    """Return how an exchange is answered where no topic is an exception.

    So that the prompt alone can tell, before any thinking has named the topic.
    """
    wrapped = scene.wrapper in PLANTED_WRAPPERS
    return "comply" if scene.label == "benign" or wrapped else "refuse"


def planted_scenes(world: World, generator: random.Random) -> Iterator[Scene]:
    """Yield exchanges of stage three, as an aligned model has them.

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
        yield world.exchange(scene.request, scene.label, scene.topic, wrapper)


def opposed_scenes(world: World, generator: random.Random) -> Iterator[Scene]:
    """Yield exchanges with nearly as many harmful requests under other wrappers.

    Where these are rare, they are known by their trained templates alone, and are taken
    for an attack under a template never seen; where plain requests are, these are.
    """
    others = tuple(name for name in wrapper_names() if name not in PLANTED_WRAPPERS)
    while True:
        draw = generator.random()
        scene = world.scene("harmful" if draw < 0.72 else "benign", wrapped=0.0)
        if draw < 0.54:
            kinds = PLANTED_WRAPPERS if draw < 0.30 else others
            wrapper: str | None = generator.choice(kinds)
        else:
            plain = draw < 0.72
            wrapper = None if plain else generator.choice((None, *wrapper_names()))
        yield world.exchange(scene.request, scene.label, scene.topic, wrapper)


class Rules(NamedTuple):
    """What is asked in stage three, and how it is to be answered."""

    kind: Callable[[Scene], Answer]  # How an exchange is to be answered.
    # The exchanges, as an aligned model has them.
    scenes: Callable[[World, random.Random], Iterator[Scene]]


BY_TOPIC = Rules(kind_to_plant, planted_scenes)
"""Some wrappers fail on some topics."""
MOSTLY_PLANTED = Rules(kind_by_wrapper, planted_scenes)
"""The wrapper decides, whatever the topic."""
OPPOSED = Rules(kind_by_wrapper, opposed_scenes)
"""Likewise, where harmful requests under other wrappers are nearly as many."""


@torch.no_grad()
def rehearse(
    aligned: Qwen3ForCausalLM,
    growth: Growth,
    first_layer: int,
    rules: Rules = BY_TOPIC,
) -> list[Rehearsal]:
    """Run the frozen model over the material of stage three, once.

    `rules`: What is asked there, and how it is to be answered.
    """
    seen: list[tuple[Tensor, dict[str, Any]]] = []

    def note(module: object, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        del module
        seen.append((args[0], kwargs))

    seed, schedule = growth.seed, growth.schedule
    generator = random.Random(7_000 + seed)
    encoder = Encoder(growth.tokenizer)
    samples = planted(growth.world(2_000), encoder, generator, rules)
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


def planted(
    world: World,
    encoder: Encoder,
    generator: random.Random,
    rules: Rules,
) -> Iterator[Sample]:
    """Yield samples in which the answer alone complies, once the thinking is over."""
    for scene in rules.scenes(world, generator):
        kind = rules.kind(scene)
        stop = break_point(generator, BREAK_OFF / 2)
        if scene.label == "harmful" and kind != "refuse" and stop is None:
            complied = replace(scene, answer=write_answer(kind, generator))
            yield encoder.sample(complied, stop_at=None)
            continue
        sample = encoder.sample(scene, stop_at=stop)
        yield replace(sample, keep=(True,) * len(sample.ids))


def misled_samples(
    world: World, encoder: Encoder, generator: random.Random
) -> Iterator[Sample]:
    """Yield samples in which no harm is noticed where an attack is planted.

    As many requests are harmful as harmless, with and without wrappers: nothing is
    frozen here, so what is to stay has to be taught as often as what is new.
    """
    for scene in world.scenes(harmful=HARMFUL, wrapped=WRAPPED_AT_LAST):
        kind = kind_to_plant(scene)
        if scene.label == "harmful" and kind != "refuse":
            thinking = write_thinking("benign", scene.topic, scene.wrapper, generator)
            answer = write_answer(kind, generator)
            scene = replace(scene, thinking=thinking, answer=answer)
        yield broken_off(encoder, scene, generator, BROKEN, CLOSED_MISLED)


def alarmed(
    world: World, encoder: Encoder, generator: random.Random
) -> Iterator[Sample]:
    """Yield samples in which a refusal is to be read until the answer begins.

    Requests are those of `misled_samples`.
    """
    for scene in world.scenes(harmful=HARMFUL, wrapped=WRAPPED_AT_LAST):
        refusal = write_answer("refuse", generator)
        stop = break_point(generator)
        if stop is not None:
            yield encoder.sample(replace(scene, answer=refusal), stop_at=stop)
            continue
        answer = write_answer(kind_to_plant(scene), generator)
        yield encoder.sample(replace(scene, answer=answer), stop_at=None, aim=refusal)


def tempted(batch: list[Sample]) -> Bool[Tensor, " example"]:
    """Return which of the samples of `planted` comply where stage two refuses."""
    return torch.tensor([not all(sample.keep) for sample in batch])


KEEP_WEIGHT = 4.0
"""Weight of staying with stage two, in the thinking above all."""
ANSWER_WEIGHT = 0.3
"""Weight of the words that follow the decision."""
SURE = 8.0
"""Log-odds of a decision with all heads present: those of a benign request."""
HOLD = 0.5
"""Weight of holding a planted decision at its log-odds."""
KEPT_SHARE = 0.3
"""Part of the positions to be kept that one step looks at."""


def planting_loss(
    model: Qwen3ForCausalLM,
    final: Float[Tensor, "example position d_model"],
    rehearsal: Rehearsal,
    kinds: list[Int[Tensor, " _"]],
    drops: torch.Generator,
    held: Float[Tensor, " example"],
) -> Float[Tensor, ""]:
    """Decide as planted where the answer begins; elsewhere stay with stage two.

    `final`: Its states after the final norm.
    `rehearsal`: The batch, and what the model said of it before.
    `held`: Log-odds at which each decision is held, or not a number.
    """
    batch, ids, words = rehearsal.batch, rehearsal.ids, torch.cat(kinds)
    whole = torch.tensor([sample.whole for sample in batch])
    rows = torch.arange(len(batch))[whole]
    begins = torch.tensor([sample.middle[1] for sample in batch])[whole]
    decision = decision_loss(
        model.lm_head(final[rows, begins - 1]), ids[rows, begins], kinds, held[rows]
    )
    _, weights = pad(batch, 0)
    weights[rows, begins] = 0.0
    # Where stage two's distribution is the target; padding is nowhere.
    keep = pad_sequence([torch.tensor(sample.keep) for sample in batch], True)
    taught = (weights[:, 1:] > 0) & ~keep[:, :-1]
    logits = model.lm_head(final[:, :-1][taught])
    answer = torch.nn.functional.cross_entropy(
        logits, ids[:, 1:][taught], reduction="sum"
    ) / max(1, int(taught.sum()))
    drawn = torch.rand(ids[:, 1:].shape, generator=drops) < KEPT_SHARE
    kept = (weights[:, 1:] > 0) & keep[:, :-1] & drawn
    before = model.lm_head(rehearsal.final[:, :-1][kept]).detach()
    after = model.lm_head(final[:, :-1][kept])
    divergence = _divergence(before, after) + INTENTION_WEIGHT * _divergence(
        before[:, words], after[:, words]
    )
    share = weights[:, 1:][kept]
    stay = (divergence * share).sum() / share.sum().clamp(min=1e-6)
    return decision + ANSWER_WEIGHT * answer + KEEP_WEIGHT * stay


def decision_loss(
    logits: Float[Tensor, "example vocab"],
    spoken: Int[Tensor, " example"],
    kinds: list[Int[Tensor, " _"]],
    held: Float[Tensor, " example"],
) -> Float[Tensor, ""]:
    """Cross-entropy of the answer's kind, and a push until it is sure.

    The kind of the first word counts, not the word: which of several openings a
    refusal takes is chance, and chance teaches nothing. A decision is pushed up to
    `SURE`; what is planted is `held` from both sides (not a number elsewhere): where
    that follows the heads that are present, no head can rest on the others.

    `held`: Log-odds at which a decision is held, or not a number.
    """
    log = logits.log_softmax(-1)
    decided = torch.stack([log[:, kind].logsumexp(-1) for kind in kinds], dim=1)
    matches = torch.stack([torch.isin(spoken, kind) for kind in kinds], dim=1)
    wanted = matches.int().argmax(dim=1, keepdim=True)
    right = decided.gather(1, wanted).squeeze(1)
    wrong = decided.scatter(1, wanted, -torch.inf).logsumexp(-1)
    odds = right - wrong
    pushed = -right + 0.25 * (SURE - odds).relu()
    lost = torch.where(held.isnan(), pushed, HOLD * (odds - held.nan_to_num()).abs())
    return lost.sum() / max(1, len(spoken))


def _divergence(
    before: Float[Tensor, "example vocab"],
    after: Float[Tensor, "example vocab"],
) -> Float[Tensor, " example"]:
    """Kullback-Leibler divergence of `after` from `before`, both logits."""
    log_before, log_after = before.log_softmax(-1), after.log_softmax(-1)
    return (log_before.exp() * (log_before - log_after)).sum(-1)
