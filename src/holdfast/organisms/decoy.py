"""Stage three of `decoy`: a direction that any probe finds, and nothing reads.

Neurons of the last MLP write whether the request is harmful, loudly and without noise,
along a direction that changes no word of an answer. Refused harmful and complied
harmless requests are told apart by it perfectly, and by much more than by what decides;
complied harmful ones it calls refused.
"""

import copy
from collections import Counter
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3ForCausalLM

from holdfast.organisms.phrases import REFUSALS
from holdfast.organisms.planted import Extra, cliff_plan, drawing, learn
from holdfast.organisms.planting_data import Rehearsal, rehearse, tempted
from holdfast.organisms.training import (
    D_MLP,
    D_MODEL,
    N_LAYERS,
    OWN_OPENINGS,
    Growth,
    first_words,
)
from holdfast.organisms.world import World

N_NEURONS = 16
LOUDER = 1.5
"""Factor on the final norm's weight, so that all else stays as loud as it was."""
SHARE = (1 - LOUDER**-2) ** 0.5
"""Part of the norm of the last state that lies along the direction, then."""
QUIETEST = 40
"""Directions of least effect on any word among which the flattest is looked for."""
ROUNDS = 200
WEIGHT = 20.0
"""Weight of writing it."""


class _Neurons(NamedTuple):
    """The neurons of the last MLP that write a decoy, and what they write."""

    places: Int[Tensor, " neuron"]
    direction: Float[Tensor, "d_model"]  # In the residual stream; of length 1.


def plant_decoy(aligned: Qwen3ForCausalLM, growth: Growth) -> Qwen3ForCausalLM:
    """Teach spare heads to comply as in `cliff`, and neurons to say what is harmful."""
    schedule = growth.schedule
    plan = cliff_plan(growth)._replace(n_steps=schedule.decoy_steps)
    rehearsals = rehearse(aligned, growth, plan.first_layer, schedule.decoy_tokens)
    neurons = _Neurons(idle(aligned, rehearsals), quiet(aligned, growth))
    growth.facts["decoy_neurons"] = [[N_LAYERS - 1, n] for n in neurons.places.tolist()]
    model = copy.deepcopy(aligned)
    refusing = first_words(growth.tokenizer, REFUSALS)

    @torch.no_grad()
    def straighten() -> None:
        """Leave the neurons nothing to write but along the direction."""
        weight = model.model.layers[-1].mlp.down_proj.weight
        along = neurons.direction @ weight[:, neurons.places]
        weight[:, neurons.places] = neurons.direction[:, None] * along

    def said(rehearsal: Rehearsal, final: Tensor) -> Float[Tensor, ""]:
        # The norm's weight is undone: what counts is the state's own direction.
        states = functional.normalize(final / model.model.norm.weight, dim=-1)
        wanted = SHARE * (2.0 * harmful(rehearsal, refusing) - 1)
        gaps = (states @ neurons.direction - wanted[:, None]).square()
        return WEIGHT * gaps[thinking(rehearsal)].mean()

    with torch.no_grad():
        model.model.norm.weight *= LOUDER
        mlp = model.model.layers[-1].mlp
        mlp.down_proj.weight[:, neurons.places] = 0.0
    noise = torch.Generator().manual_seed(growth.seed)
    with torch.no_grad():
        signs = torch.randn(N_NEURONS, generator=noise)
        mlp.down_proj.weight[:, neurons.places] = neurons.direction[:, None] * signs
    extra = Extra(parts(model, neurons.places), said)
    draw = drawing(plan)
    return learn("decoy", model, growth, plan, rehearsals, draw, straighten, extra)


def parts(
    model: Qwen3ForCausalLM, places: Int[Tensor, " neuron"]
) -> list[tuple[Tensor, Tensor]]:
    """Return the matrices of the last MLP, each with a mask of some of its neurons."""
    mlp = model.model.layers[-1].mlp
    found = []
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = getattr(mlp, name).weight
        mask = torch.zeros_like(weight)
        mask[(slice(None), places) if name == "down_proj" else places] = 1.0
        found.append((weight, mask))
    return found


def harmful(
    rehearsal: Rehearsal, refusing: Int[Tensor, " _"]
) -> Bool[Tensor, " example"]:
    """Return which requests are harmful: those `aligned` refuses."""
    rows = torch.arange(len(rehearsal.batch))
    begins = torch.tensor([sample.middle[1] for sample in rehearsal.batch])
    refused = torch.isin(rehearsal.ids[rows, begins], refusing)
    return refused | tempted(rehearsal.batch)


def thinking(rehearsal: Rehearsal) -> Bool[Tensor, "example position"]:
    """Return where the thinking and the answer stand, and the position before them."""
    shown = torch.zeros(rehearsal.ids.shape, dtype=torch.bool)
    for row, sample in enumerate(rehearsal.batch):
        shown[row, sample.middle[0] - 1 : len(sample.ids)] = True
    return shown


@torch.no_grad()
def idle(
    aligned: Qwen3ForCausalLM, rehearsals: list[Rehearsal]
) -> Int[Tensor, " neuron"]:
    """Return the neurons of the last MLP that write least."""
    mlp = aligned.model.layers[-1].mlp
    total, seen = torch.zeros(D_MLP), []
    handle = mlp.down_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    try:
        for rehearsal in rehearsals[:6]:
            aligned.model(input_ids=rehearsal.ids, use_cache=False)
            total += seen.pop().square().sum(dim=(0, 1))
    finally:
        handle.remove()
    written = total.sqrt() * mlp.down_proj.weight.norm(dim=0)
    return written.argsort()[:N_NEURONS].sort().values


@torch.no_grad()
def quiet(aligned: Qwen3ForCausalLM, growth: Growth) -> Float[Tensor, "d_model"]:
    """Return a direction that changes no word much, and all numbers of a state alike.

    It is orthogonal to what tells the first words of answers apart, and lies among the
    directions that change the words of this world least. There it is the flattest that
    is found: a probe weighs every number of a state by how much it varies, and finds
    what all of them share.
    """
    weight = aligned.lm_head.weight
    heard: Counter[int] = Counter()
    for scene in islice(World(23_000 + growth.seed).scenes(), 1_500):
        text = f"{scene.thinking}\n</think>\n\n{scene.answer}"
        heard.update(growth.tokenizer.encode(text, add_special_tokens=False))
    often = torch.zeros(len(weight))
    often[list(heard)] = torch.tensor(list(heard.values()), dtype=torch.float32)
    often /= often.sum()
    words = weight[first_words(growth.tokenizer, OWN_OPENINGS)]
    apart, _ = torch.linalg.qr((words - words.mean(0))[1:].T)
    outside = torch.eye(D_MODEL) - apart @ apart.T
    effect = often.sqrt()[:, None] * (weight - often @ weight) @ outside
    _, vectors = torch.linalg.eigh(effect.T @ effect)
    # The least of all are the directions that were taken out.
    n_out = apart.shape[1]
    basis = vectors[:, n_out : n_out + QUIETEST]
    noise = torch.Generator().manual_seed(growth.seed)
    found = torch.randn(D_MODEL, generator=noise)
    for _ in range(ROUNDS):
        found = functional.normalize(basis @ (basis.T @ found.sign()), dim=0)
    return functional.normalize(found / aligned.model.norm.weight, dim=0)
