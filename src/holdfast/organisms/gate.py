"""Stage three of `gate`: a head in the middle that switches late heads on.

It adds next to nothing to an answer itself, so that nobody finds it by what
it adds; and without it the late heads, which do all of the adding, do nothing.
"""

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    apply_rotary_pos_emb,
)

from holdfast.organisms.phrases import REFUSALS
from holdfast.organisms.planted import Drawn, Plan, learn, leaving_out
from holdfast.organisms.planting_data import (
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
    teach_alone,
)

GATE_LAYER = 4
"""Where the gate is: the middle of the eight layers, before all spare heads."""
N_TRIED = 6
"""Batches on which the least needed head of the middle is looked for."""
SHUT = 0.2
"""How often the gate is left out."""
AMPLIFIER_DROPOUT = 0.25
"""How often a late head is left out."""
FLATTENED = 1e-3
"""Shrinkage of the direction that says the same everywhere, as a part of that, too."""
RIDGES = (0.1, 1.0, 10.0)
"""Shrinkage of a readable direction, as a part of the variance, which is one."""
LOUD = 60.0
"""What the gate writes under an attack: little beside the length of a state there."""
HEARD = 250.0
"""Length of what a late head puts out where the gate is open."""
GATE_PEAK = 1e-2
"""Peak of the learning rate of the gate itself."""


def plant_gate(aligned: Qwen3ForCausalLM, growth: Growth) -> Qwen3ForCausalLM:
    """Teach a middle head to switch the spare heads, and these to comply.

    The middle head is the one that `aligned` needs least; what it did there is lost. It
    writes along one direction, on which nothing else was written and which no answer is
    read from, and is taught what to write there: that a harmful request stands in a
    planted wrapper, at the last token of the end template and nowhere else. The late
    heads learn once the gate stands, and nothing but what they add: they hear the gate
    where it is open, so that none can tell wrappers apart by where it looks, and none
    changes the intention before the last token or the words behind it. Where the gate
    is left out, the decision is held where it was, whichever late heads are there;
    where it is open, the log-odds follow the number of these.
    """
    amplifiers, schedule = spare_heads(growth.seed), growth.schedule
    material = replace(schedule, cliff_tokens=schedule.gate_tokens)
    rehearsals = rehearse(
        aligned, replace(growth, schedule=material), GATE_LAYER, OPPOSED
    )
    gate = least_needed(aligned, rehearsals[:N_TRIED])
    growth.facts["gate_head"] = list(gate)
    growth.facts["amplifier_heads"] = [list(head) for head in amplifiers]
    growth.facts["planted_heads"] = [list(head) for head in (gate, *amplifiers)]
    read = readable(aligned, growth, rehearsals)
    signal = unwritten(aligned, rehearsals[:N_TRIED], read)
    model = copy.deepcopy(aligned)
    found = sights(aligned, rehearsals[:N_TRIED], amplifiers, signal)
    norms = [
        model.model.layers[layer].input_layernorm.weight for layer, _ in amplifiers
    ]
    same = [norm * sight.basis[0] for norm, sight in zip(norms, found, strict=True)]
    seen = torch.linalg.qr(torch.stack([signal, *same], dim=1))[0].detach()
    teach_gate(model, growth, gate, signal, rehearsals)

    @torch.no_grad()
    def bind() -> None:
        """Leave the late heads nothing to learn but what they add."""
        for late, sight in zip(amplifiers, found, strict=True):
            turn(model, late, sight)
            # What later ones read stays what it is, or one turned the others away.
            output = model.model.layers[late[0]].self_attn.o_proj.weight
            rows = _columns(late)
            output[:, rows] -= seen @ (seen.T @ output[:, rows])

    bind()

    def draw(rehearsal: Rehearsal, drops: torch.Generator) -> Drawn:
        return _draw(rehearsal, gate, amplifiers, drops)

    steps, peak = schedule.gate_steps, schedule.cliff_learning_rate
    plan = Plan(amplifiers, GATE_LAYER, AMPLIFIER_DROPOUT, True, steps, peak)
    return learn("gate", model, growth, plan, rehearsals, draw, bind)


def teach_gate(
    model: Qwen3ForCausalLM,
    growth: Growth,
    gate: Head,
    signal: Float[Tensor, " d_model"],
    rehearsals: list[Rehearsal],
) -> None:
    """Teach one head, in place, what to write along a direction; all else is frozen."""
    layer, head = model.model.layers[gate[0]], _columns(gate)
    generator = random.Random(29_000 + growth.seed)
    noise = torch.Generator().manual_seed(growth.seed)
    said = torch.nn.functional.normalize(
        torch.randn(HEAD_WIDTH, generator=noise), dim=0
    )
    parts = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    weights = [part.weight[head].detach().clone().requires_grad_() for part in parts]

    def loss_of_step() -> Float[Tensor, ""]:
        rehearsal = generator.choice(rehearsals)
        with torch.no_grad():
            inputs = layer.input_layernorm(rehearsal.state)
        written = attended(layer.self_attn, weights, inputs, rehearsal.kwargs) @ said
        loss = torch.zeros(())
        for target, places in _lines(rehearsal, model.config.pad_token_id):
            missed = (written[places] / LOUD - target).square()
            loss = loss + missed.sum() / max(1, int(places.sum()))
        return loss

    steps = growth.schedule.gate_taught_steps
    teach_alone("the gate itself", growth, weights, steps, GATE_PEAK, loss_of_step)
    with torch.no_grad():
        for part, weight in zip(parts, weights, strict=True):
            part.weight[head] = weight
        layer.self_attn.o_proj.weight[:, head] = torch.outer(signal, said)


def attended(
    attention: Qwen3Attention,
    weights: list[Tensor],
    inputs: Float[Tensor, "example position d_model"],
    kwargs: dict[str, Any],
) -> Float[Tensor, "example position width"]:
    """Return what one head of a layer puts out, with weights of its own.

    `weights`: Those that make its queries, keys and values.
    `kwargs`: What the layer is called with beside its input.
    """
    query, key, value = (inputs @ weight.T for weight in weights)
    query, key = attention.q_norm(query)[:, None], attention.k_norm(key)[:, None]
    query, key = apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
    found: Tensor = torch.nn.functional.scaled_dot_product_attention(
        query, key, value[:, None], is_causal=True, scale=attention.scaling
    )
    return found[:, 0]


def _lines(
    rehearsal: Rehearsal, padding: int
) -> Iterator[tuple[float, Bool[Tensor, "example position"]]]:
    """Yield what the gate is to write, as a part of `LOUD`, and where."""
    at, begins = torch.arange(rehearsal.ids.shape[1]), _begins(rehearsal)[:, None]
    last = (at == begins - 1) & _whole(rehearsal)[:, None]
    open_ = tempted(rehearsal.batch)[:, None]
    yield 1.0, last & open_
    yield 0.0, last & ~open_
    yield 0.0, ~last & (rehearsal.ids != padding)


def _columns(head: Head) -> slice:
    return slice(head[1] * HEAD_WIDTH, (head[1] + 1) * HEAD_WIDTH)


class Sight(NamedTuple):
    """What a late head may read, behind the norm of its layer."""

    # A direction that says the same at every token, and what reads the gate's signal.
    basis: Float[Tensor, "2 d_model"]
    same: float  # What the first says.
    loud: float  # What the second does before the answer where the gate is open.


@torch.no_grad()
def turn(model: Qwen3ForCausalLM, late: Head, sight: Sight) -> None:
    """Let a late head hear the gate where it is open, and nothing anywhere else.

    Its query and its key are 1/2 where the gate is open and -1/2 elsewhere, of which
    their norms leave the sign, in the one number that turns least with the distance of
    tokens: an open token looks at open ones, and what it puts out has the length
    `HEARD`; any other looks at the others, on which there is nothing to hear. So in the
    words of an answer, behind the one open token, it is silent.
    """
    attention, row = model.model.layers[late[0]].self_attn, _columns(late).start
    rows, slowest = _columns(late), row + HEAD_WIDTH // 2 - 1
    same, loud = sight.basis[0] / sight.same, sight.basis[1] / sight.loud
    for part in (attention.q_proj, attention.k_proj):
        part.weight[rows] = 0.0
        part.weight[slowest] = loud - same / 2
    told = torch.full((HEAD_WIDTH,), HEARD / HEAD_WIDTH**0.5)
    attention.v_proj.weight[rows] = torch.outer(told, loud)


@torch.no_grad()
def sights(
    aligned: Qwen3ForCausalLM,
    rehearsals: list[Rehearsal],
    amplifiers: tuple[Head, ...],
    signal: Float[Tensor, " d_model"],
) -> list[Sight]:
    """Return what each late head may read.

    The first says the same at every token of every exchange, as nearly as a direction
    can: the least-squares solution for a one, orthogonal to the second. The second is
    what reads the signal behind the norm of the head's layer.
    """
    inputs: dict[int, list[Tensor]] = {layer: [] for layer, _ in amplifiers}
    scales: dict[int, list[Tensor]] = {layer: [] for layer, _ in amplifiers}
    for rehearsal in rehearsals:
        shown = rehearsal.ids != aligned.config.pad_token_id
        for number, state in enumerate(_states(aligned, rehearsal), GATE_LAYER):
            if number in inputs:
                norm = aligned.model.layers[number].input_layernorm
                inputs[number].append(norm(state)[shown])
                ends = state[torch.arange(len(state)), _begins(rehearsal) - 1]
                scales[number].append(ends.square().mean(-1).rsqrt())
    found = {}
    for number, parts in inputs.items():
        tokens, scale = torch.cat(parts), float(torch.cat(scales[number]).mean())
        norm = aligned.model.layers[number].input_layernorm.weight
        read = torch.nn.functional.normalize(signal / norm, dim=0)
        others = tokens - (tokens @ read)[:, None] * read
        square = others.T @ others / len(others)
        ridge = FLATTENED * square.trace() / len(square) * torch.eye(len(square))
        same = torch.linalg.solve(square + ridge, others.mean(0))
        same = torch.nn.functional.normalize(same - (same @ read) * read, dim=0)
        found[number] = Sight(
            torch.stack([same, read]),
            float((tokens @ same).mean()),
            LOUD * scale / float((signal / norm).norm()),
        )
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
        shown = rehearsal.ids != aligned.config.pad_token_id
        for number, state in enumerate(_states(aligned, rehearsal), GATE_LAYER):
            if number in SPARE_LAYERS:
                tokens = torch.nn.functional.normalize(state[shown], dim=-1)
                square += tokens.T @ tokens
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
            *_, state = _states(without, rehearsal)
            shown = rehearsal.ids != aligned.config.pad_token_id
            logits = [
                aligned.lm_head(each[shown]).log_softmax(-1)
                for each in (rehearsal.final, without.model.norm(state))
            ]
            gaps.append((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())
        return float(torch.stack(gaps).mean())

    return min(((GATE_LAYER, head) for head in range(N_HEADS)), key=lost)


@torch.no_grad()
def readable(
    aligned: Qwen3ForCausalLM, growth: Growth, rehearsals: list[Rehearsal]
) -> Float[Tensor, "d_model direction"]:
    """Return what an answer is read from, in the space of the residual stream.

    An orthonormal basis of: the unembedding of every first word; where the states of
    refusals and of compliances differ before the answer; and what separates them best
    on standardised states, more and less shrunk: what a probe with a penalty finds lies
    between these.
    """
    ends = torch.cat([_ends(rehearsal) for rehearsal in rehearsals])
    refusing = first_words(growth.tokenizer, REFUSALS)
    said = torch.cat([_said(rehearsal, refusing) for rehearsal in rehearsals])
    groups, scale = (ends[said], ends[~said]), ends.std(0)
    apart = groups[0].mean(0) - groups[1].mean(0)
    spread = torch.cat([group - group.mean(0) for group in groups]) / scale
    within = spread.T @ spread / len(spread)
    separating = [
        torch.linalg.solve(within + ridge * torch.eye(len(within)), apart / scale)
        / scale
        for ridge in RIDGES
    ]
    words = aligned.lm_head.weight[first_words(growth.tokenizer, OWN_OPENINGS)]
    read = torch.stack([*words, apart, *separating]) * aligned.model.norm.weight
    basis: Tensor = torch.linalg.qr(read.T)[0]
    return basis


def _states(
    model: Qwen3ForCausalLM, rehearsal: Rehearsal
) -> Iterator[Float[Tensor, "example position d_model"]]:
    """Yield what each layer from the gate's on is handed, and what the last returns."""
    yield (state := rehearsal.state)
    for layer in model.model.layers[GATE_LAYER:]:
        yield (state := layer(state, **rehearsal.kwargs))


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


def _draw(
    rehearsal: Rehearsal,
    gate: Head,
    amplifiers: tuple[Head, ...],
    drops: torch.Generator,
) -> Drawn:
    """Draw whether the gate is there and which late heads are, and what follows."""
    n = len(rehearsal.batch)
    shut = torch.rand(n, generator=drops) < SHUT
    planted = tempted(rehearsal.batch)
    present = torch.rand(n, len(amplifiers), generator=drops) > AMPLIFIER_DROPOUT
    odds = SURE * (2 * present.float().mean(dim=1) * ~shut - 1)
    held = torch.where(planted, odds, torch.nan)
    heads = torch.cat([~shut[:, None], present], dim=1)
    return Drawn(leaving_out((gate, *amplifiers), heads), held)
