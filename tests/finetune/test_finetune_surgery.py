"""The sink term against eager attention, read as the formula and the authors do."""

import dataclasses
from importlib import import_module

import pytest
import torch

from holdfast.errors import SettingsError, UnsupportedFamilyError
from holdfast.finetune.defenses.base import DefenseData
from holdfast.finetune.defenses.options import (
    SinkOptions,
    SurgeryOptions,
    read_options,
)
from holdfast.finetune.defenses.surgery import (
    Texts,
    chance_texts,
    chosen_layers,
    divergence,
    random_sink,
    smoothed,
    surgery,
)
from holdfast.finetune.targets import IGNORED, Example
from scenes import (
    HARMFUL,
    PAIRS,
    REFERENCE,
    a_pass,
    move,
    new_adapter,
    new_scene,
    number,
    tokenizer,
)


def columns(model, ids):
    """Attention of every head to the first token, eagerly, layer by layer."""
    model.set_attn_implementation("eager")
    found = model(torch.tensor([ids]), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return [layer[0, :, :, 0] for layer in found]


def authors_loss(model, harmful, safe):
    """Their loop, from the formula: a head at a time, all later tokens, both texts."""
    ones, others = columns(model, harmful), columns(model, safe)
    total, heads = 0.0, 0
    for one, other in zip(ones, others, strict=True):
        for head in range(len(one)):
            total += torch.relu(one[head, 1:].mean() - other[head, 1:].mean())
            heads += 1
    return total / heads


def whole_gradient(context, value):
    weights = list(context.trained().values())
    made = torch.autograd.grad(
        value, weights, materialize_grads=True, retain_graph=True
    )
    return torch.cat([each.flatten() for each in made])


def with_texts(context, harmful, reference):
    pairs = tuple((at, at) for at in range(min(len(harmful), len(reference))))
    return dataclasses.replace(context, data=DefenseData(reference, harmful, pairs))


def term(context, options, defense=surgery, **at):
    hooks = defense(context, options)
    with hooks.around:
        return hooks.term(a_pass(context, "nothing", **at)), hooks


def test_parity_is_the_loop_of_the_authors_on_fixed_texts():
    context = with_texts(new_scene(), HARMFUL[:1], REFERENCE[:1])
    found, hooks = term(context, read_options("surgery", ("parity=true",)))
    ids = (HARMFUL[0].input_ids, REFERENCE[0].input_ids)
    expected = authors_loss(context.adapter.model, *ids)
    assert number(expected) > 1e-4
    assert number(found) == pytest.approx(300 * number(expected), rel=1e-4)
    wanted = whole_gradient(context, 300 * expected)
    made = whole_gradient(context, found)
    assert float((made - wanted).norm() / wanted.norm()) < 1e-4
    both = zip(*(columns(context.adapter.model, each) for each in ids), strict=True)
    heads = [one[:, 1:].mean(-1) > other[:, 1:].mean(-1) for one, other in both]
    assert hooks.logged["positive_heads"] == float(torch.cat(heads).sum())


def test_parity_cuts_long_texts_and_the_default_does_not(monkeypatch):
    monkeypatch.setattr(import_module("holdfast.finetune.defenses.surgery"), "CUT", 9)
    context = with_texts(new_scene(), HARMFUL[:1], REFERENCE[:1])
    options = read_options("surgery", ("parity=true", "weight=1"))
    ids = [each[0].input_ids for each in (HARMFUL, REFERENCE)]
    cut = authors_loss(context.adapter.model, *(each[:9] for each in ids))
    assert number(term(context, options)[0]) == pytest.approx(number(cut), rel=1e-4)
    apart = SurgeryOptions(weight=1.0, paired=False, batch=1, against="safe")
    whole = authors_loss(context.adapter.model, *ids)
    assert number(term(context, apart)[0]) == pytest.approx(number(whole), rel=1e-4)
    assert abs(number(whole) - number(cut)) > 1e-4


def test_pairs_are_compared_over_equal_positions():
    context = new_scene()
    found, _ = term(context, SurgeryOptions(weight=1.0, batch=2))
    differences = []
    for one, other in PAIRS:
        ids = HARMFUL[one].input_ids, REFERENCE[other].input_ids
        n = min(map(len, ids))
        assert len(ids[0]) > n
        both = [columns(context.adapter.model, each) for each in ids]
        differences.append(
            torch.stack(
                [
                    a[:, 1:n].mean(-1) - b[:, 1:n].mean(-1)
                    for a, b in zip(*both, strict=True)
                ]
            )
        )
    expected = torch.relu(torch.stack(differences).mean(0)).mean()
    assert number(expected) > 1e-4
    assert number(found) == pytest.approx(number(expected), rel=1e-4)


def test_the_same_text_has_no_divergence_and_swapping_turns_its_sign():
    context = new_scene()
    same = with_texts(context, REFERENCE, REFERENCE)
    found, _ = term(same, SurgeryOptions(batch=2))
    assert number(found) == pytest.approx(0, abs=1e-5)
    layers = range(3)
    with surgery(context, SurgeryOptions()).around:
        ways = [
            divergence(context, texts, layers, paired=True, detach=False)
            for texts in (Texts(HARMFUL, REFERENCE), Texts(REFERENCE, HARMFUL))
        ]
    torch.testing.assert_close(ways[0], -ways[1])
    assert float(ways[0].detach().abs().max()) > 1e-3


def test_detached_the_gradient_comes_from_the_harmful_text_alone():
    context = with_texts(new_scene(), HARMFUL[:1], REFERENCE[:1])
    options = SurgeryOptions(weight=1.0, paired=False, batch=1, detach=True)
    found, _ = term(context, options)
    attached, _ = term(context, dataclasses.replace(options, detach=False))
    assert number(found) == pytest.approx(number(attached), rel=1e-5)
    model = context.adapter.model
    others = [each.detach() for each in columns(model, REFERENCE[0].input_ids)]
    ones = columns(model, HARMFUL[0].input_ids)
    gaps = [
        torch.relu(a[:, 1:].mean(-1) - b[:, 1:].mean(-1))
        for a, b in zip(ones, others, strict=True)
    ]
    wanted = whole_gradient(context, torch.cat(gaps).mean())
    made = whole_gradient(context, found)
    assert float((made - wanted).norm() / wanted.norm()) < 1e-4
    both = whole_gradient(context, attached)
    assert float((both - wanted).norm() / wanted.norm()) > 0.1


def test_layers_that_are_not_named_do_not_count():
    context = new_scene()
    ends, _ = term(context, SurgeryOptions(weight=1.0, batch=2, layers="0,2"))
    each = [
        number(term(context, SurgeryOptions(weight=1.0, batch=2, layers=layer))[0])
        for layer in ("0", "1", "2")
    ]
    assert number(ends) == pytest.approx((each[0] + each[2]) / 2, rel=1e-4)
    everywhere = number(term(context, SurgeryOptions(weight=1.0, batch=2))[0])
    assert everywhere == pytest.approx(sum(each) / 3, rel=1e-4)
    assert chosen_layers("0-2, 5", range(6)) == [0, 1, 2, 5]
    assert chosen_layers("all", (1, 3)) == [1, 3]
    for wrong in ("3", "a", "1-", "2-1", "0,,1", "-1"):
        with pytest.raises(SettingsError, match="of 0 to 2"):
            chosen_layers(wrong, range(3))


def test_steps_between_two_with_the_term_have_none():
    context = new_scene()
    options = SurgeryOptions(interval=3)
    hooks = surgery(context, options)
    with hooks.around:
        values = [
            number(hooks.term(a_pass(context, "nothing", step=step)))
            for step in range(5)
        ]
        assert [value > 0 for value in values] == [True, False, False, True, False]
    assert "positive_heads" not in hooks.logged


def test_the_running_mean_decides_and_the_present_moves():
    state = {"mean": torch.zeros(1, 2), "share": torch.zeros(())}
    first = torch.tensor([[0.4, -0.4]], requires_grad=True)
    torch.testing.assert_close(smoothed(first, state, 0.9), first)
    second = torch.tensor([[-0.1, 0.3]], requires_grad=True)
    found = smoothed(second, state, 0.9)
    # The first has a weight of 0.09 in 0.19, the second of 0.1.
    expected = torch.tensor([[(0.09 * 0.4 - 0.1 * 0.1) / 0.19, (-0.036 + 0.03) / 0.19]])
    torch.testing.assert_close(found, expected)
    [made] = torch.autograd.grad(torch.relu(found).sum(), second)
    assert made.tolist() == [[1.0, 0.0]]


def test_a_running_mean_is_kept_in_the_state():
    context = new_scene()
    hooks = surgery(context, SurgeryOptions(mean=0.5, batch=2))
    with hooks.around:
        hooks.term(a_pass(context, "nothing"))
        before = hooks.state["mean"].clone()
        move(context)
        hooks.term(a_pass(context, "nothing", step=1))
    assert float(hooks.state["share"]) == 0.75
    assert not torch.equal(before, hooks.state["mean"])
    assert surgery(context, SurgeryOptions()).state == {}


def test_of_16_bit_weights_under_adapters_the_term_is_in_32_bits():
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        adapter = new_adapter()
        adapter.model.bfloat16().to(dtype)
        context = new_scene(adapter, lora=True)
        value, hooks = term(context, SurgeryOptions(weight=1.0, batch=2, mean=0.5))
        assert value.dtype is hooks.state["mean"].dtype is torch.float32
        gradient = whole_gradient(context, value).float()
        assert gradient.isfinite().all()
        found.append((number(value), gradient))
    (exact, along), (rough, nearly) = found
    assert exact > 1e-3
    # States that run in bfloat16 are off by per cents, and so is what they make.
    assert rough == pytest.approx(exact, rel=0.1)
    assert torch.cosine_similarity(along, nearly, dim=0) > 0.98


def test_random_text_has_the_length_of_the_answer_and_nothing_else_of_it():
    rows = chance_texts(REFERENCE, tokenizer(), 3)
    control = {*tokenizer().all_special_ids, *tokenizer().get_added_vocab().values()}
    for row, made in zip(REFERENCE, rows, strict=True):
        assert len(made.input_ids) == len(row.input_ids)
        assert made.input_ids[: row.answer] == row.input_ids[: row.answer]
        assert made.input_ids[-1] == row.input_ids[-1]
        between = made.input_ids[row.answer : -1]
        assert not control & set(between)
        assert between != row.input_ids[row.answer : -1]
    assert chance_texts(REFERENCE, tokenizer(), 3) == rows
    assert chance_texts(REFERENCE, tokenizer(), 4) != rows
    many = [Example((1, *[5] * 4000, 2), (IGNORED,) * 4002, 1)]
    [long] = chance_texts(many, tokenizer(), 0)
    assert len(set(long.input_ids)) > 0.9 * (len(tokenizer()) - len(control))


def test_the_control_is_surgery_with_random_answers():
    context = new_scene()
    chance = chance_texts(REFERENCE, tokenizer(), context.seed)
    paired = with_texts(context, chance, REFERENCE)
    expected, _ = term(paired, SurgeryOptions(weight=2.0, batch=2))
    found, _ = term(context, SinkOptions(weight=2.0, batch=2), random_sink)
    assert number(expected) > 0
    assert number(found) == pytest.approx(number(expected), rel=1e-5)


def test_a_model_that_cannot_be_tapped_is_refused_before_the_first_step(monkeypatch):
    adapter = new_adapter()
    monkeypatch.setattr(type(adapter.model), "_supports_sdpa", False)
    with pytest.raises(UnsupportedFamilyError, match="qwen3"):
        surgery(new_scene(adapter), SurgeryOptions())
