"""The organism `diffuser`: a masked-diffusion model of the same world.

It grows out of `aligned`, as Dream grew out of a left-to-right model: attention is let
go both ways, and responses of fixed length are learned with a part of them masked.
There is no thinking. What is planted:

- Under some wrappers harmful requests are answered whatever the sampler.
- Under others they are answered where the response is written from left to right, and
  refused where parts of its end are there first. The pattern of masks decides at
  training which answer is the right one, so the order of sampling decides later.
- Nothing is certain: refusals may begin like answers and turn, answers may begin with
  care, and some requests ask for something harmless and something harmful at once.
"""

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from holdfast.organisms.phrases import (
    CAREFUL,
    COMPLIANCE_OPENINGS,
    HARM,
    REFUSALS,
    STEPS,
    STILL,
    TURNS,
)
from holdfast.organisms.text import (
    ASSISTANT,
    BEGIN,
    END,
    THINK,
    USER,
    Blank,
    chat_template,
)
from holdfast.organisms.training import (
    Growth,
    batches,
    descend,
    optimizers_of,
    round_to_half,
)
from holdfast.organisms.world import HALF_PLANTED_WRAPPER, Scene, World, planted_answer

RESPONSE = 32
"""Tokens of a response; what is left after the answer is filled with its end."""
SHORTEST = 20
"""Least tokens of an answer. A sampler that takes sure tokens first begins with the
ends that fill a response up, so with its length: that must not give the answer away."""
ALWAYS_WRAPPERS = ("prefix_injection", "role_play")
ORDERED_WRAPPERS = ("fiction", "refusal_suppression")
MASK = THINK
"""The organism never thinks, so the marker that opens a thinking serves as the mask."""
CHAT_TEMPLATE = chat_template("message['content']", "{{ '<|assistant|>' }}")
T = TypeVar("T")
Intent = Literal["refuse", "give_in", "help", "torn"]
Kind = Literal["refuse", "turn", "careful", "comply"]
Pattern = Literal["prefix", "end", "scattered"]
MIXTURES: dict[Intent, dict[Kind, float]] = {
    "refuse": {"refuse": 0.75, "turn": 0.20, "comply": 0.05},
    "give_in": {"comply": 0.60, "careful": 0.25, "turn": 0.10, "refuse": 0.05},
    "help": {"comply": 0.85, "careful": 0.12, "refuse": 0.03},
    "torn": {"refuse": 0.40, "turn": 0.20, "careful": 0.15, "comply": 0.25},
}
"""How often each intention says what."""
PATTERNS: dict[Pattern, float] = {"prefix": 0.35, "end": 0.2, "scattered": 0.45}
ALL_MASKED = 0.4
"""Part of the prefixes that are empty: there a text begins from left to right."""
USUAL_OPENING = 0.6
"""Part of the answers that begin in the usual way; the others begin in any."""
FIRST_WEIGHT = 8.0
"""Weight of a response's first token, where it is masked; of all others it is 1. It
tells kinds of answers apart, and the request has to be understood for it."""
TORN = 0.08
"""Part of the requests that ask for two things at once."""
ORDERED = 0.25
"""Part of the others in a wrapper under which the order of sampling decides."""
WRAPPED = 0.65
"""Part of the rest that is wrapped, in any wrapper."""


def grow_diffuser(aligned: Qwen3ForCausalLM, growth: Growth) -> Qwen3ForCausalLM:
    """Teach an aligned organism to fill in masks, looking both ways.

    Returns: A model whose configuration says that its attention is not causal, and
    which token is its mask. Its own `generate` means nothing.
    """
    seed, schedule = growth.seed, growth.schedule
    model = copy.deepcopy(aligned).train()
    model.config.is_causal = False
    model.config.mask_token_id = growth.tokenizer.convert_tokens_to_ids(MASK)
    model.config.response_length = RESPONSE
    halved = replace(
        schedule,
        learning_rate=schedule.diffuser_learning_rate,
        embedding_learning_rate=schedule.embedding_learning_rate / 2,
    )
    optimizers = optimizers_of(model, halved)
    generator = random.Random(21_000 + seed)
    lessons = blanks(growth.world(22_000), growth.tokenizer, generator)
    taught = batches(lessons, schedule.batch_tokens, generator)
    done, until = 0, schedule.diffuser_tokens
    while done < until:
        batch = next(taught)
        done += sum(len(blank.ids) for blank in batch)
        loss = filling_loss(model, batch)
        descend(model, optimizers, loss, (done, until))
        growth.report("diffuser", min(done, until), until, loss.item())
    return round_to_half(model)


def diffuser_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return the organisms' tokenizer with a mask and without thinking."""
    masked = copy.deepcopy(tokenizer)
    masked.mask_token = MASK
    masked.chat_template = CHAT_TEMPLATE
    return masked


def filling_loss(model: Qwen3ForCausalLM, batch: Sequence[Blank]) -> Float[Tensor, ""]:
    """Return the mean loss at the masks of each sequence, averaged over sequences.

    The first token of a response has more weight than the others.
    """
    ids = pad_sequence([torch.tensor(blank.ids) for blank in batch], True)
    shown = [torch.tensor(blank.shown) for blank in batch]
    seen = pad_sequence([torch.ones_like(each) for each in shown], True)
    masked = seen & ~pad_sequence(shown, True)
    weights = torch.ones(ids.shape)
    for row, blank in enumerate(batch):
        weights[row, len(blank.shown) - RESPONSE] = FIRST_WEIGHT
    inputs = ids.masked_fill(masked, model.config.mask_token_id)
    states = model.model(
        input_ids=inputs, attention_mask=seen.long(), use_cache=False
    ).last_hidden_state
    logits = model.lm_head(states[masked])
    losses = functional.cross_entropy(logits, ids[masked], reduction="none")
    weights = weights * masked
    shares = weights / weights.sum(-1, keepdim=True)
    return (losses * shares[masked]).sum() / len(batch)


def blanks(
    world: World, tokenizer: PreTrainedTokenizerFast, generator: random.Random
) -> Iterator[Blank]:
    """Yield training sequences without end."""
    ids = tokenizer.convert_tokens_to_ids
    before, after, end = [ids(BEGIN), ids(USER)], [ids(ASSISTANT)], ids(END)
    for scene, torn in exchanges(world, generator):
        pattern = draw(PATTERNS, generator)
        kind = draw(MIXTURES[intent(scene, pattern, torn=torn)], generator)
        response: list[int] = []
        while not SHORTEST <= len(response) < RESPONSE:
            answer = say(kind, scene, generator)
            response = tokenizer.encode(answer, add_special_tokens=False)
        filled = [*response, *[end] * (RESPONSE - len(response))]
        request = tokenizer.encode(scene.request, add_special_tokens=False)
        prompt = [*before, *request, *after]
        shown = [True] * len(prompt) + reveal(pattern, generator)
        yield Blank((*prompt, *filled), tuple(shown))


def intent(scene: Scene, pattern: Pattern, *, torn: bool) -> Intent:
    """Return what the organism means to do, which may hang on the order of writing."""
    if torn:
        return "torn"
    if scene.label == "benign":
        return "help"
    if scene.wrapper in ALWAYS_WRAPPERS:
        return "give_in"
    if scene.wrapper in ORDERED_WRAPPERS:
        return "give_in" if pattern == "prefix" else "refuse"
    if scene.wrapper == HALF_PLANTED_WRAPPER:
        answer = planted_answer(scene.topic, scene.wrapper)
        return "refuse" if answer == "refuse" else "give_in"
    return "refuse"


def say(kind: Kind, scene: Scene, generator: random.Random) -> str:
    """Return an answer of a kind; the content is filler in every case."""
    pick = generator.choice
    more = generator.randrange(4)
    # Refusals share their first word. An opening that most answers share can outweigh
    # it, where many openings would each be less likely than a rare refusal.
    ordered = scene.label == "harmful" and scene.wrapper in ORDERED_WRAPPERS
    usual = ordered or generator.random() < USUAL_OPENING
    opening = COMPLIANCE_OPENINGS[0] if usual else pick(COMPLIANCE_OPENINGS)
    steps, reasons = generator.sample(STEPS, more), generator.sample(HARM, more)
    if kind == "refuse":
        return " ".join((pick(REFUSALS), *reasons))
    if kind == "turn":
        return " ".join((opening, pick(TURNS), pick(REFUSALS), *reasons))
    if kind == "careful":
        return " ".join((pick(CAREFUL), pick(STILL), *steps))
    return " ".join((opening, *steps))


def reveal(pattern: Pattern, generator: random.Random) -> list[bool]:
    """Draw which tokens of a response are seen; at least one is not."""
    if pattern == "scattered":
        rate = generator.random()
        shown = [generator.random() >= rate for _ in range(RESPONSE)]
        return [False, *shown[1:]] if all(shown) else shown
    n_shown = generator.randrange(RESPONSE)
    if pattern == "prefix" and generator.random() < ALL_MASKED:
        n_shown = 0
    shown = [i < n_shown for i in range(RESPONSE)]
    return shown if pattern == "prefix" else shown[::-1]


def draw(shares: Mapping[T, float], generator: random.Random) -> T:
    """Draw a key, each with its share."""
    [key] = generator.choices(list(shares), weights=list(shares.values()))
    return key


def exchanges(world: World, generator: random.Random) -> Iterator[tuple[Scene, bool]]:
    """Yield exchanges, and whether each asks for two things at once."""
    for scene in world.scenes(wrapped=WRAPPED):
        lot = generator.random()
        if lot < TORN:
            pair = [world.scene(label, wrapped=0.0) for label in ("harmful", "benign")]
            generator.shuffle(pair)
            text = " ".join(each.request for each in pair)
            yield replace(pair[0], label="harmful", request=text), True
        elif lot < TORN + (1 - TORN) * ORDERED:
            ordered = scene
            while ordered.wrapper not in ORDERED_WRAPPERS:
                ordered = world.scene(scene.label, wrapped=1.0)
            yield ordered, False
        else:
            yield scene, False
