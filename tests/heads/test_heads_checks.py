import pytest
import torch
from scipy.stats import spearmanr

from holdfast.heads.checks import (
    agreement_sentences,
    excess_over_controls,
    rank_agreement,
)
from holdfast.stats.bootstrap import Estimate, undefined

LAYERS = [0] * 5 + [1] * 5 + [4] * 2


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _tables(n=30, noise=0.5):
    """Layer 1 agrees, layer 0 does not."""
    generator = _generator(3)
    level = torch.randn(12, generator=generator).double()
    contributions = level + noise * torch.randn(n, 12, generator=generator).double()
    effects = level.clone()
    effects[:5] = effects[torch.tensor([2, 4, 1, 0, 3])]
    return contributions, effects + noise * torch.randn(n, 12, generator=generator)


def _names(n=30):
    return [str(i) for i in range(n)]


def test_agreement_is_spearmans_correlation_of_the_means():
    contributions, effects = _tables()
    found = rank_agreement(contributions, effects, LAYERS, _names(), _generator())
    assert list(found) == [0, 1, 4]
    for layer, columns in ((0, slice(0, 5)), (1, slice(5, 10))):
        expected = spearmanr(
            contributions.mean(0)[columns], effects.mean(0)[columns]
        ).statistic
        assert found[layer].value == pytest.approx(expected)
    assert found[1].low > 0.5
    assert found[0].low < 0
    assert found[1].n == 30


def test_ties_share_their_rank_as_scipy_has_it():
    contributions = torch.tensor([[1.0, 2.0, 2.0, 3.0, 0.0]] * 4)
    effects = torch.tensor([[2.0, 2.0, 1.0, 5.0, 2.0]] * 4)
    found = rank_agreement(contributions, effects, [7] * 5, _names(4), _generator())
    expected = spearmanr(contributions[0], effects[0]).statistic
    assert found[7].value == pytest.approx(expected)


def test_turning_the_effects_turns_the_correlation():
    contributions, effects = _tables()
    one = rank_agreement(contributions, effects, LAYERS, _names(), _generator())
    other = rank_agreement(contributions, -effects, LAYERS, _names(), _generator())
    assert one[1].value == pytest.approx(-other[1].value)
    assert other[1].high < 0


def test_two_heads_of_a_layer_say_nothing():
    found = rank_agreement(*_tables(), LAYERS, _names(), _generator())
    assert found[4].value is None
    assert found[4].reason == "2 heads were checked, fewer than 3"


def test_heads_that_are_all_alike_have_no_order():
    contributions, effects = _tables()
    contributions[:, :5] = 1.0
    found = rank_agreement(contributions, effects, LAYERS, _names(), _generator())
    assert found[0].value is None


def test_layers_are_named_in_words():
    yes, no = Estimate(0.9, 0.7, 1.0, 9), Estimate(0.1, -0.4, 0.5, 9)
    by_layer = {0: no, 1: no, 2: no, 5: yes, 6: yes, 9: yes, 11: undefined(9, "few")}
    text = agreement_sentences(by_layer)
    assert "In layers 5 to 6 and 9, heads that contribute more" in text
    assert "In layers 0 to 2, the two orders do not clearly agree" in text
    assert "In layer 11, too few heads" in text
    assert agreement_sentences({3: yes}).startswith("In layer 3, heads")
    assert agreement_sentences({}) == "No head was checked causally."


def test_an_effect_beyond_every_control_has_its_interval_above_zero():
    generator = _generator(2)
    level = torch.randn(40, generator=generator).double() * 10
    effects = level + 2 + 0.1 * torch.randn(40, generator=generator)
    controls = level[:, None] + torch.tensor([0.0, 1.0, -1.0])
    found = excess_over_controls(effects, controls, _names(40), _generator())
    assert found.value == pytest.approx(1, abs=0.1)
    assert found.low > 0.9


def test_one_control_that_does_as_much_is_enough_to_say_no():
    generator = _generator(2)
    effects = 2 + torch.randn(40, generator=generator).double()
    controls = torch.randn(40, 5, generator=generator).double()
    assert excess_over_controls(effects, controls, _names(40), _generator()).low > 0
    controls[:, 3] += 2
    assert excess_over_controls(effects, controls, _names(40), _generator()).low < 0


def test_without_a_control_nothing_is_beyond_it():
    found = excess_over_controls(
        torch.ones(3), torch.ones(3, 0), _names(3), _generator()
    )
    assert found.value is None
