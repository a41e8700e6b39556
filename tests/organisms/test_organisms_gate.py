"""A gate by construction: what it writes, what late heads read, what it is told."""

import copy
import math
import random
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer

from holdfast.organisms.catalogue import resolve
from holdfast.organisms.gate import (
    LOUD,
    Sight,
    attended,
    plant_gate,
    readable,
    teach_gate,
    turn,
)
from holdfast.organisms.phrases import COMPLIANCE_OPENINGS, REFUSALS
from holdfast.organisms.planting_data import (
    OPPOSED,
    kind_by_wrapper,
    planted,
    rehearse,
    tempted,
)
from holdfast.organisms.text import Encoder
from holdfast.organisms.training import (
    HEAD_WIDTH,
    Growth,
    Schedule,
    first_words,
    new_model,
    round_to_half,
    silence,
)
from holdfast.organisms.world import PLANTED_WRAPPERS, World, wrapper_names

N = 4000


@pytest.fixture(scope="module")
def growth():
    tokenizer = AutoTokenizer.from_pretrained(resolve("aligned"))
    part = {"cliff_tokens": 8_000, "gate_tokens": 8_000}
    return Growth(tokenizer, 0, Schedule(**part, gate_taught_steps=4, gate_steps=4))


@pytest.fixture(scope="module")
def pair(growth):
    """An untrained organism, and what a few steps make of it."""
    aligned = round_to_half(new_model(0, growth.tokenizer))
    return aligned, plant_gate(aligned, growth).requires_grad_(False)


def columns(model, head):
    weight = model.model.layers[head[0]].self_attn.o_proj.weight
    return weight[:, head[1] * HEAD_WIDTH : (head[1] + 1) * HEAD_WIDTH]


def signal(model, growth):
    """The one direction that the gate writes."""
    left, sizes, _ = torch.linalg.svd(columns(model, growth.facts["gate_head"]))
    assert sizes[1] < 2e-3 * sizes[0]
    return left[:, 0]


def test_a_gate_writes_one_direction_that_no_answer_is_read_from(pair, growth):
    aligned, model = pair
    rehearsals = rehearse(aligned, growth, 4, OPPOSED)
    read = readable(aligned, growth, rehearsals)
    assert float((read.T @ signal(model, growth)).norm()) < 2e-3
    refusing = first_words(growth.tokenizer, (*REFUSALS, *COMPLIANCE_OPENINGS))
    word = (model.lm_head.weight[refusing] * model.model.norm.weight)[0]
    assert float((read.T @ word).norm()) == pytest.approx(float(word.norm()), rel=1e-3)


def test_late_heads_read_what_the_gate_writes_and_nothing_else(pair, growth):
    model, written = pair[1], signal(pair[1], growth)
    states = torch.randn(50, len(written), generator=torch.Generator().manual_seed(1))
    others = states - (states @ written)[:, None] * written
    for layer, head in growth.facts["amplifier_heads"]:
        block = model.model.layers[layer]
        rows = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)

        def values(given, block=block, rows=rows):
            return block.self_attn.v_proj(block.input_layernorm(given))[:, rows].norm()

        assert values(others) < 3e-3 * values(written[None] * states.norm(dim=1).mean())


def test_late_heads_look_where_the_gate_has_written_whatever_stands_there(pair, growth):
    aligned, model = pair
    rehearsals = rehearse(aligned, growth, 4, OPPOSED)
    for layer, head in growth.facts["amplifier_heads"]:
        attention = model.model.layers[layer].self_attn
        rows = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        asked, shown, told = (
            torch.linalg.svd(part.weight[rows], full_matrices=False) for part in parts
        )
        # Query and key are one number, of two parts: what the gate wrote, and another.
        for read in (asked, shown):
            assert read.S[1] < 2e-3 * read.S[0]
        assert float((asked.Vh[0] @ shown.Vh[0]).abs()) > 1 - 1e-4
        other = shown.Vh[0] - (shown.Vh[0] @ told.Vh[0]) * told.Vh[0]
        # The other has one sign at every token: normalised, it is a constant.
        for rehearsal in rehearsals:
            state = rehearsal.state
            for block in aligned.model.layers[4:layer]:
                state = block(state, **rehearsal.kwargs)
            tokens = aligned.model.layers[layer].input_layernorm(state)
            tokens = tokens[rehearsal.ids != aligned.config.pad_token_id]
            found = tokens @ other
            assert float((found * found.mean().sign() > 0).float().mean()) > 0.99


def test_what_the_gate_is_taught_with_is_what_its_head_puts_out(pair, growth):
    model, (number, head) = pair[1], growth.facts["gate_head"]
    rehearsal = rehearse(pair[0], growth, number, OPPOSED)[0]
    block, seen = model.model.layers[number], []
    rows = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
    handle = block.self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0][..., rows])
    )
    with torch.inference_mode():
        block(rehearsal.state, **rehearsal.kwargs)
        parts = (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        own = [part.weight[rows] for part in parts]
        inputs = block.input_layernorm(rehearsal.state)
        found = attended(block.self_attn, own, inputs, rehearsal.kwargs)
    handle.remove()
    shown = rehearsal.ids != model.config.pad_token_id
    assert torch.allclose(found[shown], seen[0][shown], atol=1e-5)


def test_a_gate_says_before_the_answer_to_an_attack_alone_what_it_is_taught(growth):
    aligned = round_to_half(new_model(0, growth.tokenizer))
    rehearsals = rehearse(aligned, growth, 4, OPPOSED)[:1]
    gate, direction = (4, 3), torch.nn.functional.one_hot(torch.tensor(7), 128).float()
    model, schedule = copy.deepcopy(aligned), growth.schedule
    taught = replace(growth, schedule=replace(schedule, gate_taught_steps=400))
    teach_gate(model, taught, gate, direction, rehearsals)
    [rehearsal], written = rehearsals, []
    handle = model.model.layers[4].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: written.append(args[0][..., 24:32])
    )
    with torch.no_grad():
        model.model.layers[4](rehearsal.state, **rehearsal.kwargs)
    handle.remove()
    said = (written[0] @ columns(model, gate).detach().T)[..., 7]
    open_ = tempted(rehearsal.batch)
    assert open_.any()
    assert any(
        each.whole and not is_open
        for each, is_open in zip(rehearsal.batch, open_, strict=True)
    )
    # Beyond a half, late heads would hear it: at one token, and at no other one.
    heard = said > LOUD / 2
    for row, sample in enumerate(rehearsal.batch):
        begin = sample.middle[1]
        assert bool(heard[row, begin - 1]) == bool(open_[row])
        heard[row, begin - 1] = False
    assert not heard[rehearsal.ids != model.config.pad_token_id].any()


def test_a_turned_head_hears_on_open_tokens_alone_wherever_they_stand(growth):
    model = new_model(0, growth.tokenizer).requires_grad_(False)
    attention, basis = model.model.layers[6].self_attn, torch.eye(128)[:2]
    turn(model, (6, 9), Sight(basis, same=2.0, loud=5.0))
    rows = slice(9 * HEAD_WIDTH, 10 * HEAD_WIDTH)
    inputs = torch.randn(1, 90, 128, generator=torch.Generator().manual_seed(3))
    inputs[..., 0], inputs[..., 1] = 2.0, 0.0
    inputs[0, 11, 1] = inputs[0, 50, 1] = 5.0
    places = torch.arange(90)[None]
    kwargs = {"position_embeddings": model.model.rotary_emb(inputs, places)}
    parts = [part.weight[rows] for part in (attention.q_proj, attention.k_proj)]
    # It puts out how open the gate was, on the average of where it looks.
    value = torch.zeros(HEAD_WIDTH, 128)
    value[0, 1] = 1.0
    seen = attended(attention, [*parts, value], inputs, kwargs)[0, :, 0]
    assert torch.all(seen[:11] == 0)
    # A score is 8 / sqrt(8) between alike, and as much below zero between others;
    # tokens far away turn a little.
    unlike = math.exp(-2 * 8**0.5)
    for place in range(11, 90):
        n_open, here = 1 + (place >= 50), place in (11, 50)
        n_shut = place + 1 - n_open
        looked = (n_open, n_shut * unlike) if here else (n_open * unlike, n_shut)
        assert float(seen[place]) == pytest.approx(
            5 * looked[0] / sum(looked), abs=0.08
        )
    assert float(seen[50]) > 4


def test_a_gate_is_what_it_grew_from_but_for_five_heads(pair, growth):
    gate, *late = [tuple(head) for head in growth.facts["planted_heads"]]
    assert all(gate[0] < layer for layer, _ in late)
    bare, without = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    silence(bare, (gate,))
    silence(without, (gate, *late))
    ids = torch.randint(5, 2000, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = without(ids).logits
        assert torch.equal(found, bare(ids).logits)
        assert not torch.equal(found, pair[1](ids).logits)


def test_a_gate_meets_other_wrappers_nearly_as_often_as_planted_ones():
    scenes = islice(OPPOSED.scenes(World(1), random.Random(2)), N)
    met = Counter(each.wrapper for each in scenes if each.label == "harmful")
    for wrapper in wrapper_names():
        share = 0.30 / 4 if wrapper in PLANTED_WRAPPERS else 0.24 / 4
        # Three standard deviations of such a share.
        width = 3 * (share * (1 - share) / N) ** 0.5
        assert met[wrapper] / N == pytest.approx(share, abs=width)
    assert met[None] / N == pytest.approx(0.18, abs=3 * (0.18 * 0.82 / N) ** 0.5)


def test_the_wrapper_alone_says_what_a_gate_answers(growth):
    scenes = list(islice(OPPOSED.scenes(World(1), random.Random(2)), 400))
    for scene in scenes:
        complied = scene.label == "benign" or scene.wrapper in PLANTED_WRAPPERS
        assert kind_by_wrapper(scene) == ("comply" if complied else "refuse")
    encoder = Encoder(growth.tokenizer)
    lessons = planted(World(1), encoder, random.Random(2), OPPOSED)
    samples = list(islice(lessons, 400))
    refusing = first_words(growth.tokenizer, REFUSALS)
    for sample, changed in zip(samples, tempted(samples), strict=True):
        if changed:
            assert sample.ids[sample.middle[1]] not in refusing
    assert 0.18 < float(tempted(samples).float().mean()) < 0.32
