"""Each defense against a closed form or an oracle that shares no code with it."""

import math

import pytest
import torch

from holdfast.finetune.defenses import options as of
from holdfast.finetune.defenses.anchors import distance, kl, ldifs
from holdfast.finetune.defenses.base import seeded_order
from holdfast.finetune.defenses.constrained import constrained, penalty, strengths
from holdfast.finetune.defenses.forward import states_of
from holdfast.finetune.defenses.lisa import in_safe_state, lisa
from holdfast.finetune.defenses.plain import none, reference_loss, safe_rows, safeinstr
from holdfast.finetune.defenses.safegrad import conflict, safegrad
from scenes import (
    REFERENCE,
    TASK,
    a_pass,
    collate,
    logits,
    move,
    new_scene,
    number,
)

TINY = pytest.approx(0.0, abs=1e-6)


def gradients(context, value):
    weights = list(context.trained().values())
    made = torch.autograd.grad(
        value, weights, materialize_grads=True, retain_graph=True
    )
    return torch.cat([each.flatten() for each in made])


@pytest.mark.parametrize(
    ("defense", "options"),
    [(none, of.Options()), (safeinstr, of.SafeInstrOptions())],
)
def test_no_defense_and_mixed_rows_act_at_no_step(defense, options):
    hooks = defense(new_scene(), options)
    assert (hooks.swap, hooks.term, hooks.gradient, hooks.state) == (None,) * 3 + ({},)


def test_safe_rows_are_a_share_of_the_tasks():
    assert safe_rows(1000, of.SafeInstrOptions()) == 30
    assert safe_rows(10, of.SafeInstrOptions()) == 1
    assert safe_rows(10, of.SafeInstrOptions(ratio=0.5)) == 5
    assert safe_rows(10, of.SafeInstrOptions(ratio=0.0)) == 0


def test_the_control_adds_the_cross_entropy_of_the_safe_rows():
    context = new_scene()
    hooks = reference_loss(context, of.ReferenceLossOptions(weight=0.5, batch=2))
    found = hooks.term(a_pass(context, "nothing")).detach()
    made, targets = logits(context.adapter.model, REFERENCE)
    expected = torch.nn.functional.cross_entropy(made.detach(), targets)
    assert number(found) == pytest.approx(0.5 * number(expected), rel=1e-5)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("on", ["task", "reference"])
def test_kl_is_nothing_at_first_and_then_what_the_formula_says(on, lora):
    context = new_scene(lora=lora)
    rows = TASK if on == "task" else REFERENCE
    with torch.no_grad():
        before, _ = logits(context.adapter.model, rows)
    hooks = kl(context, of.AnchorOptions(weight=3.0, on=on, batch=2))
    found = hooks.term(a_pass(context, hooks.reads))
    assert number(found) == TINY
    assert float(gradients(context, found).abs().max()) < 1e-6
    move(context)
    after, _ = logits(context.model, rows)
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    found = hooks.term(a_pass(context, hooks.reads))
    assert 0.01 < number(expected)
    assert number(found) == pytest.approx(3 * number(expected), rel=1e-4)
    wanted = gradients(context, 3 * expected)
    torch.testing.assert_close(gradients(context, found), wanted, rtol=1e-3, atol=1e-5)


def test_the_aligned_model_stays_what_it_was_and_leaves_the_other_as_it_is():
    for lora in (False, True):
        context = new_scene(lora=lora)
        batch = collate(TASK)
        first = context.aligned.states(batch, "last").last[0]
        trained = list(context.trained())
        move(context)
        again = context.aligned.states(batch, "last").last[0]
        assert torch.equal(first, again)
        assert not torch.allclose(
            first, states_of(context.adapter, batch, "last").last[0]
        )
        assert context.model.training
        assert list(context.trained()) == trained


def test_lisa_turns_from_safe_rows_to_the_tasks_and_back():
    options = of.LisaOptions(align_steps=2, task_steps=3, batch=2)
    assert [in_safe_state(step, options) for step in range(7)] == [
        *(True, True),
        *(False, False, False),
        *(True, True),
    ]
    context = new_scene()
    hooks = lisa(context, options)
    assert set(hooks.swap(0, 0)) == set(REFERENCE)
    assert hooks.swap(2, 2) is None
    never = lisa(context, of.LisaOptions(align_steps=0))
    assert all(never.swap(step, step) is None for step in range(200))


def test_lisa_pulls_to_where_the_weights_were_at_the_last_turn():
    context = new_scene()
    n = sum(weight.numel() for weight in context.trained().values())
    hooks = lisa(
        context, of.LisaOptions(rho=0.5, align_steps=2, task_steps=2, begin=0.0)
    )
    shift(context, 0.1)
    at = a_pass(context, "nothing", step=1)
    found = hooks.term(at)
    assert number(found) == pytest.approx(0.25 * n * 0.01, rel=1e-4)
    torch.testing.assert_close(
        gradients(context, found), torch.full((n,), 0.05), rtol=1e-4, atol=1e-6
    )
    # The turn: what pulls now is where the weights are.
    hooks.swap(2, 2)
    assert number(hooks.term(at._replace(step=2))) == TINY
    shift(context, 0.2)
    hooks.swap(3, 3)
    found = hooks.term(at._replace(step=3))
    assert number(found) == pytest.approx(0.25 * n * 0.04, rel=1e-4)


def shift(context, by):
    with torch.no_grad():
        for weight in context.trained().values():
            weight += by


def test_lisa_pulls_at_nothing_in_the_first_tenth():
    context = new_scene()
    hooks = lisa(context, of.LisaOptions())
    shift(context, 0.1)
    at = a_pass(context, "nothing", steps=40)
    assert number(hooks.term(at._replace(step=4))) == 0
    assert number(hooks.term(at._replace(step=5))) > 0


D = torch.linspace(-8, 8, 33, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0, 30.0])
def test_the_penalty_is_the_published_loss_less_cross_entropy(beta):
    ratio = D.clone().requires_grad_()
    found = penalty(ratio, torch.full_like(D, beta))
    published = -2 / beta * torch.nn.functional.logsigmoid(beta * D)
    torch.testing.assert_close(found, published + D - 2 / beta * math.log(2))
    assert number(found.min()) >= 0
    # With the cross-entropy, whose gradient is -1, the factor of the paper.
    factor = 1 - torch.autograd.grad(found.sum(), ratio)[0]
    torch.testing.assert_close(factor, 2 * torch.sigmoid(-beta * D))


def test_the_penalty_has_both_its_limits():
    wide = torch.full_like(D, 1e4)
    torch.testing.assert_close(penalty(D, wide), D.abs(), atol=1e-3, rtol=0)
    assert float(penalty(D, torch.zeros_like(D)).max()) < 1e-4
    ratio = torch.tensor([1e-4, 300.0], requires_grad=True)
    made = torch.autograd.grad(penalty(ratio, torch.full((2,), 2.0)).sum(), ratio)[0]
    torch.testing.assert_close(made, torch.tensor([1e-4, 1.0]))


def test_strength_is_large_for_the_first_tokens_of_an_answer_alone():
    options = of.ConstrainedOptions(early=3)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0, 0, 0]]).bool()
    found = strengths(options, mask, 0)
    assert found[0, 2:7].tolist() == pytest.approx([0.5, 2, 2, 0.1, 0.1])
    assert found[1, 1:5].tolist() == pytest.approx([0.5, 2, 2, 0.1])
    # One token of the end template comes first, and is not what an answer begins with.
    found = strengths(options, mask, 1)
    assert found[0, 2:7].tolist() == pytest.approx([0.1, 0.5, 2, 2, 0.1])


@pytest.mark.parametrize("lora", [False, True])
def test_constrained_tuning_has_the_gradient_of_the_paper(lora):
    context = new_scene(lora=lora)
    before, targets = logits(context.adapter.model, TASK)
    first = before.detach().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    hooks = constrained(context, of.ConstrainedOptions())
    found = hooks.term(a_pass(context))
    assert number(found) == TINY
    assert float(gradients(context, found).abs().max()) < 1e-6
    move(context)
    after, _ = logits(context.model, TASK)
    now = after.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    each = len(targets) // 2
    beta = torch.tensor([0.5, *[2.0] * 4, *[0.1] * (each - 5)]).repeat(2)
    factor = 2 * torch.sigmoid(-beta * (now - first).detach())
    wanted = gradients(context, -(factor * now).mean())
    found = hooks.term(a_pass(context)) - now.mean()
    torch.testing.assert_close(gradients(context, found), wanted, rtol=1e-3, atol=1e-5)


def test_a_conflict_is_a_product_below_nothing():
    one = [torch.tensor([1.0, 2.0]), torch.tensor([[-1.0]])]
    two = [torch.tensor([-2.0, 1.0]), torch.tensor([[3.0]])]
    assert conflict(one, two) == pytest.approx(-3 / 14)
    assert conflict(one, [-each for each in two]) == 0
    assert conflict(one, [0 * each for each in two]) == 0


def task_gradient(context):
    made, targets = logits(context.model, TASK)
    torch.nn.functional.cross_entropy(made, targets).backward()
    return torch.cat([w.grad.flatten() for w in context.trained().values()])


def descend(context, rate):
    task_gradient(context)
    with torch.no_grad():
        for weight in context.trained().values():
            weight -= rate * weight.grad
    context.model.zero_grad()


def alignment_gradient(context, before):
    after, _ = logits(context.model, REFERENCE)
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return gradients(context, (p.exp() * (p - q)).sum(-1).mean())


def after_safegrad(context, rho):
    hooks = safegrad(context, of.SafeGradOptions(rho=rho, batch=2))
    loss = hooks.gradient(0, 10)
    made = torch.cat([w.grad.flatten() for w in context.trained().values()])
    return made, loss, hooks.logged


def test_safegrad_leaves_nothing_of_the_task_against_alignment():
    context = new_scene()
    with torch.no_grad():
        before, _ = logits(context.adapter.model, REFERENCE)
    # A step up the task's loss: going down again brings the model nearer.
    descend(context, -0.002)
    agreeing = task_gradient(context).clone()
    pull = alignment_gradient(context, before)
    assert float(agreeing @ pull) > 0
    made, _, logged = after_safegrad(context, rho=0.0)
    torch.testing.assert_close(made, agreeing)
    assert logged["conflict"] == 0


def test_safegrad_takes_out_what_conflicts_and_adds_the_pull():
    context = new_scene()
    with torch.no_grad():
        before, _ = logits(context.adapter.model, REFERENCE)
    descend(context, 0.002)
    push = task_gradient(context).clone()
    pull = alignment_gradient(context, before)
    assert float(push @ pull) < 0
    made, loss, logged = after_safegrad(context, rho=0.0)
    assert float(made @ pull) == pytest.approx(0, abs=1e-5 * float(push.norm() ** 2))
    torch.testing.assert_close(made, push - (push @ pull) / (pull @ pull) * pull)
    assert number(loss) > 0
    assert logged["conflict"] == 1
    context.model.zero_grad()
    task_gradient(context)
    stronger, _, _ = after_safegrad(context, rho=2.0)
    torch.testing.assert_close(stronger, made + 2 * pull, rtol=1e-4, atol=1e-6)


def test_safegrad_does_nothing_on_an_untouched_model():
    context = new_scene()
    push = task_gradient(context).clone()
    made, loss, logged = after_safegrad(context, rho=1.0)
    torch.testing.assert_close(made, push, rtol=0, atol=1e-6)
    assert number(loss) == TINY
    assert logged["conflict"] == 0


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("on", ["task", "reference"])
def test_ldifs_is_nothing_at_first_and_then_the_distance_of_states(on, lora):
    context = new_scene(lora=lora)
    rows = TASK if on == "task" else REFERENCE
    with torch.no_grad():
        before = hidden(context.adapter.model, rows)
    hooks = ldifs(context, of.AnchorOptions(weight=2.0, on=on, batch=2))
    found = hooks.term(a_pass(context, hooks.reads))
    assert number(found) == TINY
    assert float(gradients(context, found).abs().max()) < 1e-5
    move(context)
    after = hidden(context.model, rows)
    # Of unit vectors the squared distance is two less two cosines.
    expected = (2 - 2 * torch.cosine_similarity(before, after, dim=-1)).mean()
    found = hooks.term(a_pass(context, hooks.reads))
    assert number(found) == pytest.approx(2 * number(expected), rel=1e-4)


def hidden(model, rows):
    """Every real token's states after every block; the last comes before the norm."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = []
    hooks = [
        layer.register_forward_hook(lambda module, given, made: found.append(made[0]))
        for layer in core.model.layers
    ]
    for each in rows:
        model(torch.tensor([each.input_ids]))
    for hook in hooks:
        hook.remove()
    n = len(core.model.layers)
    return torch.cat(
        [torch.stack(found[at : at + n], 1) for at in range(0, len(found), n)]
    )


def test_the_distance_of_features_knows_no_length_and_no_padding():
    one = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    two = torch.tensor([[[30.0, 40.0], [0.0, 2.0]]])
    whole = torch.tensor([[True, True]])
    assert float(distance([one], [two], whole)) == pytest.approx(1.0)
    assert float(distance([one], [two], torch.tensor([[True, False]]))) == TINY
    assert float(distance([one], [-one], whole)) == pytest.approx(4.0)


def test_draws_go_through_all_rows_and_know_no_past():
    draws = seeded_order(range(5), 3)
    seen = [at for number in range(5) for at in draws(number, 2)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5))
    assert seeded_order(range(5), 3)(4, 2) == seen[8:]
    many = seeded_order(range(50), 3)(0, 50)
    assert many != seeded_order(range(50), 4)(0, 50)
    assert many != seeded_order(range(50), 3)(1, 50)
    assert seeded_order(range(1), 0)(7, 3) == [0, 0, 0]
