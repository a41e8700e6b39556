"""How `decoy` is grown: where neurons write, what, and what a probe makes of it."""

import pytest
import torch

from holdfast.organisms import decoy
from holdfast.organisms.decoy import (
    LOUDER,
    LOUDNESS,
    N_NEURONS,
    Ends,
    gap_lost,
    idle,
    lecture,
    plant_decoy,
    quiet,
    told,
)
from holdfast.organisms.phrases import COMPLIANCE_OPENINGS, PARTIALS, REFUSALS
from holdfast.organisms.planted import plant_heads
from holdfast.organisms.planting_data import rehearse
from holdfast.organisms.text import train_tokenizer
from holdfast.organisms.training import (
    N_LAYERS,
    OWN_OPENINGS,
    Growth,
    Schedule,
    first_words,
    new_model,
)

TINY = Schedule(
    cliff_tokens=3_000, cliff_steps=2, cliff_batch_tokens=900, decoy_steps=3
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(n_scenes=1_000)


@pytest.fixture
def growth(tokenizer, monkeypatch):
    for name, value in (("TOKENS", 3_000), ("N_SCENES", 50), ("N_ENDS", 40)):
        monkeypatch.setattr(decoy, name, value)
    return Growth(tokenizer, 11, TINY)


@pytest.fixture(scope="module")
def model(tokenizer):
    return new_model(11, tokenizer).requires_grad_(False).eval()


def test_nothing_but_the_neurons_and_the_norm_differs_from_cliff(model, growth):
    grown, again = (plant_decoy(model, growth) for _ in range(2))
    neurons = [neuron for _, neuron in growth.facts["decoy_neurons"]]
    assert len(set(neurons)) == N_NEURONS
    expected = plant_heads("cliff", model, growth)
    for name, weight in grown.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
        before = expected.state_dict()[name]
        if name == "model.norm.weight":
            assert torch.equal(weight, (before * LOUDER).half().float())
            continue
        differs = weight != before
        if f"layers.{N_LAYERS - 1}.mlp" in name:
            differs = differs.T if "down_proj" in name else differs
            assert differs.any(1).nonzero()[:, 0].tolist() == neurons
        else:
            assert not differs.any()


def test_the_direction_tells_no_first_word_from_another(model, growth):
    direction = quiet(model, growth)
    assert float(direction.norm()) == pytest.approx(1)
    words = first_words(growth.tokenizer, OWN_OPENINGS)
    read = model.lm_head.weight @ (model.model.norm.weight * direction)
    spread = read[words].max() - read[words].min()
    assert float(spread) < 1e-4 * float(read.std())


def test_a_direction_is_said_as_loudly_as_wanted_and_the_rest_stays():
    draws = torch.Generator().manual_seed(0)
    states = torch.nn.functional.normalize(torch.randn(6, 8, generator=draws), dim=1)
    refused = torch.tensor([True, False] * 3)
    direction = torch.eye(8)[3]
    found = told(Ends(states, refused), direction) * LOUDER
    torch.testing.assert_close(found[:, 3], LOUDNESS * (2.0 * refused - 1))
    rest = states.clone()
    rest[:, 3] = 0
    found[:, 3] = 0
    torch.testing.assert_close(found, torch.nn.functional.normalize(rest, dim=1))


def test_the_gap_that_a_probe_takes_is_that_of_taking_it_out():
    draws = torch.Generator().manual_seed(1)
    refused = torch.tensor([True, False] * 200)
    way = (2.0 * refused - 1)[:, None]
    answer = torch.tensor([1.0, 1.0, 0.0, 0.0])
    noise = torch.randn(400, 4, generator=draws)
    for side in (refused, ~refused):
        noise[side] -= noise[side].mean(0)
    taken = {}
    for loud, unsure in ((0.0, 0.3), (2.0, 0.3), (2.0, 10.0)):
        base = noise * torch.tensor([unsure, unsure, 0.3, 0.3])
        states = base + way * torch.tensor([1.0, 0.5, loud, loud])
        apart = states[refused].mean(0) - states[~refused].mean(0)
        probe = apart / states.var(0)
        out = states - torch.outer(states @ probe, probe) / (probe @ probe)
        odds = [each @ answer for each in (states, out)]
        before, after = (each[refused].mean() - each[~refused].mean() for each in odds)
        found = float(gap_lost(states, refused, answer))
        assert found == pytest.approx(float(1 - after / before), abs=1e-3)
        taken[loud, unsure] = found
    # The answer is what a probe finds, where nothing that is surer is said beside it.
    assert taken[0.0, 0.3] > 0.8
    assert abs(taken[2.0, 10.0]) < 0.1
    assert abs(taken[2.0, 0.3]) > 0.5


def test_the_neurons_that_write_least_are_the_idle_ones(model, growth):
    material = rehearse(model, growth, N_LAYERS - 1)
    lectures = [lecture(model, growth, each) for each in material]
    mlp = model.model.layers[-1].mlp
    kept = mlp.down_proj.weight.clone()
    draws = torch.Generator().manual_seed(2)
    drawn = torch.randperm(mlp.down_proj.in_features, generator=draws)
    chosen = sorted(drawn[:N_NEURONS].tolist())
    mlp.down_proj.weight[:, chosen] *= 0.01
    assert idle(model, lectures).tolist() == chosen
    mlp.down_proj.weight.copy_(kept)
    assert idle(model, lectures).tolist() != chosen


def test_a_lecture_holds_last_states_and_which_way_the_answer_goes(model, growth):
    refusing = first_words(growth.tokenizer, REFUSALS)
    openings = (*COMPLIANCE_OPENINGS, *PARTIALS)
    complying = first_words(growth.tokenizer, openings)
    for each in rehearse(model, growth, N_LAYERS - 1):
        found = lecture(model, growth, each)
        shown = torch.zeros(each.ids.shape, dtype=torch.bool)
        answers, ways = torch.zeros_like(shown), torch.zeros(each.ids.shape)
        for row, sample in enumerate(each.batch):
            begin, end = sample.middle
            shown[row, begin - 1 : len(sample.ids)] = True
            answers[row, end : len(sample.ids)] = True
            ways[row] = 1.0 if int(each.ids[row, end]) in refusing else -1.0
        final = model.model.norm(found.outputs)
        torch.testing.assert_close(final, each.final[shown])
        torch.testing.assert_close(found.way[answers[shown]], ways[answers])
        chances = model.lm_head(each.final[shown][~answers[shown]]).softmax(-1)
        sums = [chances[:, words].sum(-1) for words in (refusing, complying)]
        ratio = (sums[0] / sums[1]).square()
        expected = (ratio - 1) / (ratio + 1)
        torch.testing.assert_close(found.way[~answers[shown]], expected)
