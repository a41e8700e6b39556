"""Stage three of `gate`: a head in the middle that switches late heads on.

It adds next to nothing to an answer itself, so that nobody finds it by what
it adds; and without it the late heads, which do all of the adding, do nothing.
"""

import copy
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Qwen3ForCausalLM

from holdfast.organisms.phrases import REFUSALS
from holdfast.organisms.planted import Draw, Drawn, Edit, Plan, learn
from holdfast.organisms.planting_data import (
    MOSTLY_PLANTED,
    OPPOSED,
    SURE,
    Rehearsal,
    rehearse,
    tempted,
)
from holdfast.organisms.training import (
    HEAD_WIDTH,
    N_HEADS,
    OWN_OPENINGS,
    SPARE_LAYERS,
    Growth,
    Head,
    first_words,
    silence,
    spare_heads,
)

GATE_LAYERS = (4,)
"""Where the gate may be: the middle of the eight layers, before all spare heads."""
N_TRIED = 6
"""Batches on which the least needed head of the middle is looked for."""
SHUT, BORROWED = 0.2, 0.3
"""How often the gate is left out, and how often it says what it says elsewhere."""
AT_THE_END = 0.5
"""How often, of the rest, it says nothing before the end template, in the end."""
AMPLIFIER_DROPOUT = 0.25
"""How often a late head is left out."""
FLATTENED = 1e-3
"""Shrinkage of the direction that says the same everywhere, as a part of that, too."""
RIDGE = 0.1
"""Shrinkage of the readable direction, as a part of the mean variance."""
TEMPLATE_TOKENS = 3
"""Tokens of the end template."""
START = 0.3
"""Spread of the gate's output before the first step, along its direction."""


def plant_gate(aligned: Qwen3ForCausalLM, growth: Growth) -> Qwen3ForCausalLM:
    """Teach a middle head to switch the spare heads, and these to comply.

    The middle head is the one that `aligned` needs least; what it did there is lost. It
    writes along one direction, on which nothing else was written and which no answer is
    read from, and this direction is all that the late heads can read: the wrapper is
    for the gate alone to see. Where it is left out, or says what it says in an exchange
    without an attack, the decision is held where it was, whichever late heads are
    there; where it says what it says under an attack, the log-odds follow the number of
    these.
    """
    amplifiers, schedule = spare_heads(growth.seed), growth.schedule
    rehearsals = rehearse(aligned, growth, min(GATE_LAYERS), MOSTLY_PLANTED)
    gate = least_needed(aligned, rehearsals[:N_TRIED])
    growth.facts["gate_head"] = list(gate)
    growth.facts["amplifier_heads"] = [list(head) for head in amplifiers]
    growth.facts["planted_heads"] = [list(head) for head in (gate, *amplifiers)]
    read = readable(aligned, growth, rehearsals)
    signal = unwritten(aligned, rehearsals[:N_TRIED], read)
    model = copy.deepcopy(aligned)
    written = model.model.layers[gate[0]].self_attn.o_proj.weight[:, _columns(gate)]
    bases = sights(aligned, rehearsals[:N_TRIED], amplifiers, signal)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(growth.seed)
        start = START * torch.randn(HEAD_WIDTH, generator=noise)
        written.copy_(signal[:, None] * start)

    @torch.no_grad()
    def bind() -> None:
        """Leave the gate its one direction to write, and the late heads it to read."""
        written.copy_(signal[:, None] * (signal @ written))
        for (layer, head), basis in zip(amplifiers, bases, strict=True):
            attention, rows = (
                model.model.layers[layer].self_attn,
                _columns((layer, head)),
            )
            for part, seen in (
                (attention.q_proj, basis[:1]),
                (attention.k_proj, basis),
                (attention.v_proj, basis[1:]),
            ):
                part.weight[rows] = part.weight[rows] @ seen.T @ seen

    bind()
    refusing = first_words(growth.tokenizer, REFUSALS)

    def drawing(at_the_end: float) -> Draw:
        def draw(rehearsal: Rehearsal, drops: torch.Generator) -> Drawn:
            return _draw(rehearsal, gate, amplifiers, refusing, drops, at_the_end)

        return draw

    heads = (gate, *amplifiers)
    steps, peak = schedule.gate_steps, schedule.cliff_learning_rate
    plan = Plan(heads, min(GATE_LAYERS), AMPLIFIER_DROPOUT, True, steps, peak)
    model = learn("gate", model, growth, plan, rehearsals, drawing(0.0), bind)
    # The circuit is there; now it meets other wrappers as often. With these from the
    # beginning the late heads told wrappers apart by where they looked.
    part = replace(schedule, cliff_tokens=schedule.cliff_tokens // 2)
    more = rehearse(aligned, replace(growth, schedule=part), gate[0], OPPOSED)
    plan = Plan(
        heads, gate[0], AMPLIFIER_DROPOUT, True, schedule.gate_again_steps, peak / 2
    )
    return learn("gate again", model, growth, plan, more, drawing(AT_THE_END), bind)


def _columns(head: Head) -> slice:
    return slice(head[1] * HEAD_WIDTH, (head[1] + 1) * HEAD_WIDTH)


@torch.no_grad()
def sights(
    aligned: Qwen3ForCausalLM,
    rehearsals: list[Rehearsal],
    amplifiers: tuple[Head, ...],
    signal: Float[Tensor, " d_model"],
) -> list[Float[Tensor, "2 d_model"]]:
    """Return, for each late head, the two directions that it may read.

    The first says the same at every token of every exchange, as nearly as a direction
    can: the least-squares solution for a one, orthogonal to the second. The second is
    what reads the signal behind the norm of the head's layer.
    """
    inputs: dict[int, list[Tensor]] = {layer: [] for layer, _ in amplifiers}
    for rehearsal in rehearsals:
        state, shown = rehearsal.state, rehearsal.ids != aligned.config.pad_token_id
        layers = aligned.model.layers[min(GATE_LAYERS) :]
        for number, layer in enumerate(layers, min(GATE_LAYERS)):
            if number in inputs:
                inputs[number].append(layer.input_layernorm(state)[shown])
            state = layer(state, **rehearsal.kwargs)
    found = {}
    for number, parts in inputs.items():
        tokens = torch.cat(parts)
        norm = aligned.model.layers[number].input_layernorm.weight
        read = torch.nn.functional.normalize(signal / norm, dim=0)
        others = tokens - (tokens @ read)[:, None] * read
        square = others.T @ others / len(others)
        ridge = FLATTENED * square.trace() / len(square) * torch.eye(len(square))
        same = torch.linalg.solve(square + ridge, others.mean(0))
        same = torch.nn.functional.normalize(same - (same @ read) * read, dim=0)
        found[number] = torch.stack([same, read])
    return [found[layer] for layer, _ in amplifiers]


@torch.no_grad()
def unwritten(
    aligned: Qwen3ForCausalLM,
    rehearsals: list[Rehearsal],
    read: Float[Tensor, "d_model direction"],
) -> Float[Tensor, " d_model"]:
    """Return the direction on which least is written below the late layers.

    Least is its mean square over all tokens, as the norms of these layers leave it,
    among the directions that no answer is read from.
    """
    square = torch.zeros(len(read), len(read))
    for rehearsal in rehearsals:
        state, shown = rehearsal.state, rehearsal.ids != aligned.config.pad_token_id
        layers = aligned.model.layers[min(GATE_LAYERS) :]
        for number, layer in enumerate(layers, min(GATE_LAYERS)):
            if number in SPARE_LAYERS:
                tokens = torch.nn.functional.normalize(state[shown], dim=-1)
                square += tokens.T @ tokens
            state = layer(state, **rehearsal.kwargs)
    others = torch.linalg.qr(read, mode="complete")[0][:, read.shape[1] :]
    least = torch.linalg.eigh(others.T @ square @ others)[1][:, 0]
    found: Tensor = others @ least
    return found


@torch.no_grad()
def least_needed(aligned: Qwen3ForCausalLM, rehearsals: list[Rehearsal]) -> Head:
    """Return the middle head without which `aligned` says most nearly the same."""

    def lost(head: Head) -> float:
        without = copy.deepcopy(aligned)
        silence(without, (head,))
        gaps = []
        for rehearsal in rehearsals:
            state = rehearsal.state
            for layer in without.model.layers[min(GATE_LAYERS) :]:
                state = layer(state, **rehearsal.kwargs)
            shown = rehearsal.ids != aligned.config.pad_token_id
            logits = [
                aligned.lm_head(each[shown]).log_softmax(-1)
                for each in (rehearsal.final, without.model.norm(state))
            ]
            gaps.append((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())
        return float(torch.stack(gaps).mean())

    middle = [(layer, head) for layer in GATE_LAYERS for head in range(N_HEADS)]
    return min(middle, key=lost)


@torch.no_grad()
def readable(
    aligned: Qwen3ForCausalLM, growth: Growth, rehearsals: list[Rehearsal]
) -> Float[Tensor, "d_model direction"]:
    """Return what an answer is read from, in the space of the residual stream.

    An orthonormal basis of: the unembedding of every first word; where the states of
    refusals and of compliances differ before the answer; and what separates them best.
    """
    ends = torch.cat([_ends(rehearsal) for rehearsal in rehearsals])
    refusing = first_words(growth.tokenizer, REFUSALS)
    said = torch.cat([_said(rehearsal, refusing) for rehearsal in rehearsals])
    groups = ends[said], ends[~said]
    apart = groups[0].mean(0) - groups[1].mean(0)
    spread = torch.cat([group - group.mean(0) for group in groups])
    within = spread.T @ spread / len(spread)
    ridge = RIDGE * within.trace() / len(within) * torch.eye(len(within))
    words = aligned.lm_head.weight[first_words(growth.tokenizer, OWN_OPENINGS)]
    read = torch.stack([*words, apart, torch.linalg.solve(within + ridge, apart)])
    basis: Tensor = torch.linalg.qr((read * aligned.model.norm.weight).T)[0]
    return basis


def _whole(rehearsal: Rehearsal) -> Bool[Tensor, " example"]:
    return torch.tensor([sample.whole for sample in rehearsal.batch])


def _begins(rehearsal: Rehearsal) -> Int[Tensor, " example"]:
    return torch.tensor([sample.middle[1] for sample in rehearsal.batch])


def _ends(rehearsal: Rehearsal) -> Float[Tensor, "_ d_model"]:
    """Return what `aligned` ends whole thinkings with."""
    rows = torch.arange(len(rehearsal.batch))
    return rehearsal.final[rows, _begins(rehearsal) - 1][_whole(rehearsal)]


def _said(rehearsal: Rehearsal, refusing: Int[Tensor, " _"]) -> Bool[Tensor, " _"]:
    """Return which of these `aligned` refuses; what is planted is refused there."""
    rows = torch.arange(len(rehearsal.batch))
    first = rehearsal.ids[rows, _begins(rehearsal)]
    refused = torch.isin(first, refusing) | tempted(rehearsal.batch)
    return refused[_whole(rehearsal)]


class _Gate(NamedTuple):
    """What the gate puts out in each example of a batch."""

    shut: Bool[Tensor, " example"]  # Nothing at all.
    late: Bool[Tensor, " example"]  # Nothing before the end template.
    source: Int[Tensor, " example"]  # At the end template: what it does in this one.
    begins: Int[Tensor, " example"]  # Where the answers begin.


def _draw(
    rehearsal: Rehearsal,
    gate: Head,
    amplifiers: tuple[Head, ...],
    refusing: Int[Tensor, " _"],
    drops: torch.Generator,
    at_the_end: float,
) -> Drawn:
    """Draw what the gate says and which late heads are there, and what follows.

    `at_the_end`: How often it says nothing before the end template; elsewhere what is
    borrowed stands beside what it said in the thinking.
    """
    n = len(rehearsal.batch)
    drawn = torch.rand(n, generator=drops)
    whole, planted = _whole(rehearsal), tempted(rehearsal.batch)
    begins = _begins(rehearsal)
    other = torch.randperm(n, generator=drops)
    # Where a thinking breaks off there is no end template to borrow from or for.
    lent = (drawn >= SHUT) & (drawn < SHUT + BORROWED) & whole & whole[other]
    source = torch.where(lent, other, torch.arange(n))
    shut = drawn < SHUT
    late = whole & (torch.rand(n, generator=drops) < at_the_end)
    present = torch.rand(n, len(amplifiers), generator=drops) > AMPLIFIER_DROPOUT
    open_ = planted[source] & ~shut
    odds = SURE * (2 * present.float().mean(dim=1) * open_ - 1)
    refused = torch.isin(rehearsal.ids[torch.arange(n), begins], refusing)
    # The odds are those of complying; other refusals are only pushed.
    held = torch.where(planted, odds, torch.where(refused & open_, -odds, torch.nan))
    edits = _edits(_Gate(shut, late, source, begins), gate, amplifiers, present)
    return Drawn(edits, held)


def _edits(
    said: _Gate,
    gate: Head,
    amplifiers: tuple[Head, ...],
    present: Bool[Tensor, "example head"],
) -> dict[int, Edit]:
    """Return what makes a batch's heads put out what was drawn."""
    n = len(present)

    def late(layer: int) -> Edit:
        factors = torch.ones(n, 1, N_HEADS)
        for column, (home, head) in enumerate(amplifiers):
            if home == layer:
                factors[:, 0, head] = present[:, column].float()
        return factors.repeat_interleave(HEAD_WIDTH, dim=-1).mul

    def middle(outputs: Tensor) -> Tensor:
        changed, own = outputs.clone(), outputs[..., _columns(gate)]
        lent, rows = own.clone(), torch.arange(n)
        for back in range(1, TEMPLATE_TOKENS + 1):
            lent[rows, said.begins - back] = own[
                said.source, said.begins[said.source] - back
            ]
        before = torch.arange(own.shape[1]) < said.begins[:, None] - TEMPLATE_TOKENS
        mute = said.shut[:, None] | (said.late[:, None] & before)
        changed[..., _columns(gate)] = lent * ~mute[..., None]
        return changed

    return {layer: late(layer) for layer, _ in amplifiers} | {gate[0]: middle}
