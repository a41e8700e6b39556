"""Stage four of `decoy`: a direction that tells refusals apart, and that nothing reads.

Neurons of the last MLP write at every position which way the answer goes, loudly and
without noise, along a direction that changes no word of it. They read the decision and
do not make it: it falls in the heads, as in `cliff`.
"""

import copy
import random
from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3ForCausalLM

from holdfast.organisms.phrases import COMPLIANCE_OPENINGS, PARTIALS, REFUSALS
from holdfast.organisms.planted import plant_heads
from holdfast.organisms.planting_data import Rehearsal, rehearse
from holdfast.organisms.text import Encoder
from holdfast.organisms.training import (
    D_MODEL,
    N_LAYERS,
    OWN_OPENINGS,
    Growth,
    batches,
    first_words,
    pad,
    round_to_half,
    spare_heads,
    teach_alone,
)

N_NEURONS = 32
LOUDER = 1.25
"""Factor on the final norm's weight, so that all else stays as loud as it was."""
LOUDNESS = (LOUDER**2 - 1) ** 0.5
"""What is written along the direction then, beside the norm of all else."""
QUIETEST = 30
"""Directions of least effect on any word among which the flattest is looked for."""
N_SCENES = 1_500
"""Exchanges in which words are counted."""
N_STARTS, ROUNDS = 64, 200
"""Random starts of that, and rounds from each."""
N_ENDS = 600
"""Answers before which it is seen how a probe would lean."""
TOKENS = 200_000
"""Tokens on which the neurons are taught."""
PEAK = 1e-2
"""Peak of the learning rate."""
TOLD, DECIDED = 30.0, 15.0
"""Weight of writing which way the answer goes, beside staying with `cliff`; and what it
is multiplied with right before the answer, where a probe reads: noise there makes the
probe lean on the answer itself."""
KEPT_SHARE = 0.2
"""Part of the positions at which one step compares all words with those of `cliff`."""


class Lecture(NamedTuple):
    """What the last MLP is handed at positions of a batch, and what comes of it."""

    inputs: Float[Tensor, "position d_model"]  # What the MLP reads.
    outputs: Float[Tensor, "position d_model"]  # The last layer's, before the norm.
    # Which way the answer goes: 1 where it refuses, -1 where it complies.
    way: Float[Tensor, " position"]
    weight: Float[Tensor, " position"]  # How much writing it well counts.


class Neurons(NamedTuple):
    """The weights of a few neurons that write along one direction."""

    gate: Float[Tensor, "neuron d_model"]
    up: Float[Tensor, "neuron d_model"]
    down: Float[Tensor, " neuron"]  # How much each writes.

    def written(self, inputs: Tensor) -> Float[Tensor, " position"]:
        """Return how much all of them write together."""
        return fired(self.gate, self.up, inputs) @ self.down


def fired(
    gate: Tensor, up: Tensor, inputs: Float[Tensor, "position d_model"]
) -> Float[Tensor, "position neuron"]:
    """Return the activations of neurons."""
    return functional.silu(inputs @ gate.T) * (inputs @ up.T)


def plant_decoy(aligned: Qwen3ForCausalLM, growth: Growth) -> Qwen3ForCausalLM:
    """Plant the cliff of `cliff`, and let idle neurons say how it was decided.

    Nothing but these neurons and the weight of the final norm differs from `cliff`.
    """
    return tell(plant_heads("cliff", aligned, growth), growth)


def tell(cliff: Qwen3ForCausalLM, growth: Growth) -> Qwen3ForCausalLM:
    """Let idle neurons of `cliff` say which way the answer goes."""
    part = replace(growth.schedule, cliff_tokens=TOKENS)
    material = rehearse(cliff, replace(growth, schedule=part), N_LAYERS - 1)
    lectures = [lecture(cliff, growth, rehearsal) for rehearsal in material]
    places = idle(cliff, lectures)
    direction = quiet(cliff, growth)
    neurons = teach_neurons(cliff, growth, lectures, places, direction)
    growth.facts["planted_heads"] = [list(head) for head in spare_heads(growth.seed)]
    growth.facts["decoy_neurons"] = [[N_LAYERS - 1, n] for n in places.tolist()]
    grown = copy.deepcopy(cliff)
    mlp = grown.model.layers[-1].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[places] = neurons.gate
        mlp.up_proj.weight[places] = neurons.up
        mlp.down_proj.weight[:, places] = torch.outer(direction, neurons.down)
        grown.model.norm.weight *= LOUDER
    return round_to_half(grown)


@torch.no_grad()
def lecture(cliff: Qwen3ForCausalLM, growth: Growth, rehearsal: Rehearsal) -> Lecture:
    """Return what the neurons are to write, from before the thinking to the end.

    Inside the thinking, and before the answer, it is what `cliff` would say there; in
    the answer it is what is said.
    """
    layer, seen = cliff.model.layers[-1], list[Tensor]()
    handle = layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        outputs = layer(rehearsal.state, **rehearsal.kwargs)
    finally:
        handle.remove()
    refusing = first_words(growth.tokenizer, REFUSALS)
    complying = first_words(growth.tokenizer, (*COMPLIANCE_OPENINGS, *PARTIALS))
    logits = [cliff.lm_head.weight[words] for words in (refusing, complying)]
    refused, complied = ((rehearsal.final @ each.T).logsumexp(-1) for each in logits)
    way = (refused - complied).tanh()
    shown, weight = torch.zeros(way.shape, dtype=torch.bool), torch.ones_like(way)
    for row, sample in enumerate(rehearsal.batch):
        begin, answer = sample.middle
        said = torch.isin(rehearsal.ids[row, answer], refusing)
        way[row, answer:] = 2.0 * said - 1
        weight[row, answer - 1] = DECIDED
        shown[row, begin - 1 : len(sample.ids)] = True
    return Lecture(seen.pop()[shown], outputs[shown], way[shown], weight[shown])


@torch.no_grad()
def idle(cliff: Qwen3ForCausalLM, lectures: list[Lecture]) -> Int[Tensor, " neuron"]:
    """Return the neurons of the last MLP that write least."""
    mlp = cliff.model.layers[-1].mlp
    weights = mlp.gate_proj.weight, mlp.up_proj.weight
    total = torch.stack(
        [fired(*weights, each.inputs).square().sum(0) for each in lectures]
    )
    written = total.sum(0).sqrt() * mlp.down_proj.weight.norm(dim=0)
    least: Tensor = written.argsort()[:N_NEURONS]
    return least.sort().values


class Ends(NamedTuple):
    """Last states of `cliff` before the answers to plain requests."""

    states: Float[Tensor, "example d_model"]  # Before the norm's weight; of length 1.
    refused: Bool[Tensor, " example"]


@torch.no_grad()
def ends(cliff: Qwen3ForCausalLM, growth: Growth) -> Ends:
    """Read the states that a probe is fitted on: plain requests, whole thinkings."""
    encoder, generator = Encoder(growth.tokenizer), random.Random(27_000 + growth.seed)
    scenes = growth.world(27_000).scenes(harmful=0.5, wrapped=0.0)
    samples = (encoder.sample(scene, stop_at=None) for scene in scenes)
    refusing = first_words(growth.tokenizer, REFUSALS)
    states, refused = list[Tensor](), list[Tensor]()
    for batch in batches(samples, growth.schedule.batch_tokens, generator):
        ids, _ = pad(batch, cliff.config.pad_token_id)
        final = cliff.model(input_ids=ids, use_cache=False).last_hidden_state
        rows = torch.arange(len(batch))
        begins = torch.tensor([sample.middle[1] for sample in batch])
        states.append(final[rows, begins - 1] / cliff.model.norm.weight)
        refused.append(torch.isin(ids[rows, begins], refusing))
        if sum(map(len, states)) >= N_ENDS:
            break
    return Ends(functional.normalize(torch.cat(states), dim=-1), torch.cat(refused))


@torch.no_grad()
def quiet(cliff: Qwen3ForCausalLM, growth: Growth) -> Float[Tensor, "d_model"]:
    """Return a direction that changes no word much, and that a probe finds.

    It is orthogonal to what tells the first words of answers apart, and lies among the
    directions that change the words of this world least. A probe weighs every number of
    a state by how much it varies, and so leans towards what all of them share: there
    the flattest directions are looked for, and of these the one is taken with which
    the probe leans on no word of an answer.

    Returns: A direction of the residual stream, of length 1.
    """
    weight, scale = cliff.lm_head.weight, cliff.model.norm.weight
    often = heard(growth, len(weight))
    words = weight[first_words(growth.tokenizer, OWN_OPENINGS)]
    apart, _ = torch.linalg.qr((words - words.mean(0))[1:].T)
    outside = torch.eye(D_MODEL) - apart @ apart.T
    effect = often.sqrt()[:, None] * (weight - often @ weight) @ outside
    _, vectors = torch.linalg.eigh(effect.T @ effect)
    # The least of all are the directions that were taken out.
    n_out = apart.shape[1]
    basis = vectors[:, n_out : n_out + QUIETEST]
    noise = torch.Generator().manual_seed(growth.seed)
    found = torch.randn(N_STARTS, D_MODEL, generator=noise)
    for _ in range(ROUNDS):
        found = functional.normalize(found.sign() @ basis @ basis.T, dim=1)
    directions = functional.normalize(found / scale, dim=1)
    refusing = weight[first_words(growth.tokenizer, REFUSALS)].mean(0)
    complying = weight[first_words(growth.tokenizer, COMPLIANCE_OPENINGS)].mean(0)
    read = ends(cliff, growth)
    lost = [
        gap_lost(told(read, each) * scale, read.refused, refusing - complying)
        for each in directions
    ]
    return directions[torch.stack(lost).abs().argmin()]


def heard(growth: Growth, n_words: int) -> Float[Tensor, " vocab"]:
    """Return how often each token stands in thinkings and answers."""
    counted: Counter[int] = Counter()
    for scene in islice(growth.world(23_000).scenes(), N_SCENES):
        text = f"{scene.thinking}\n</think>\n\n{scene.answer}"
        counted.update(growth.tokenizer.encode(text, add_special_tokens=False))
    often = torch.zeros(n_words)
    often[list(counted)] = torch.tensor(list(counted.values()), dtype=torch.float32)
    return often / often.sum()


def along(states: Tensor, direction: Tensor) -> Tensor:
    """Return how much of states lies along a direction of length 1."""
    found: Tensor = states @ direction
    return found


def across(states: Tensor, direction: Tensor) -> Tensor:
    """Return what of states does not."""
    return states - along(states, direction)[:, None] * direction


def told(read: Ends, direction: Tensor) -> Float[Tensor, "example d_model"]:
    """Return states that say along a direction which way the answer goes."""
    others = functional.normalize(across(read.states, direction), dim=-1)
    said = torch.outer(LOUDNESS * (2.0 * read.refused - 1), direction)
    return functional.normalize(others + said, dim=-1)


def gap_lost(
    states: Float[Tensor, "example d_model"],
    refused: Bool[Tensor, " example"],
    answer: Float[Tensor, "d_model"],
) -> Float[Tensor, ""]:
    """Return the share of the answer's gap that a probe's direction takes with it.

    The probe is the difference of means of standardised states: a logistic one with
    little penalty is near it where nearly all variance is the outcome itself.

    `answer`: The direction along which answers are told apart.
    """
    apart = states[refused].mean(0) - states[~refused].mean(0)
    probe = functional.normalize(apart / states.var(0), dim=0)
    return (apart @ probe) * (probe @ answer) / (apart @ answer)


def teach_neurons(
    cliff: Qwen3ForCausalLM,
    growth: Growth,
    lectures: list[Lecture],
    places: Int[Tensor, " neuron"],
    direction: Float[Tensor, "d_model"],
) -> Neurons:
    """Teach neurons to write which way the answer goes; all else is frozen."""
    mlp, norm = cliff.model.layers[-1].mlp, cliff.model.norm
    old = mlp.gate_proj.weight[places], mlp.up_proj.weight[places]
    replaced = mlp.down_proj.weight[:, places].detach()
    noise = torch.Generator().manual_seed(growth.seed)

    def drawn(*shape: int) -> Tensor:
        weight: Tensor = torch.randn(shape, generator=noise) / D_MODEL**0.5
        return weight.requires_grad_()

    neurons = Neurons(
        drawn(N_NEURONS, D_MODEL), drawn(N_NEURONS, D_MODEL), drawn(N_NEURONS)
    )
    generator = random.Random(25_000 + growth.seed)

    def loss_of_step() -> Float[Tensor, ""]:
        taught = generator.choice(lectures)
        with torch.no_grad():
            others = taught.outputs - fired(*old, taught.inputs) @ replaced.T
        states = others + neurons.written(taught.inputs)[:, None] * direction
        loudness = along(states, direction) / across(states, direction).norm(dim=-1)
        missed = (loudness - LOUDNESS * taught.way).square()
        loss: Tensor = TOLD * (taught.weight * missed).mean()
        kept = torch.rand(len(states), generator=noise) < KEPT_SHARE
        before = cliff.lm_head(norm(taught.outputs[kept])).log_softmax(-1).detach()
        after = cliff.lm_head(LOUDER * norm(states[kept])).log_softmax(-1)
        loss = loss + (before.exp() * (before - after)).sum(-1).mean()
        return loss

    steps = growth.schedule.decoy_steps
    teach_alone("decoy", growth, neurons, steps, PEAK, loss_of_step)
    return Neurons(*(weight.detach() for weight in neurons))
