import pytest
import torch

from holdfast.errors import InputError
from holdfast.sinks.divergence import (
    UNSEEN,
    paired_sinks,
    sink_divergence,
    sink_penalty,
    unpaired_sinks,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def names(n):
    return [f"prompt {i}" for i in range(n)]


def masses(n, layers=2, heads=3, seed=0):
    return torch.rand((n, layers, heads), generator=seeded(seed), dtype=torch.float64)


def noisy(means, n, spread, seed):
    """Pairs whose divergences have the given means; both sides share a text effect."""
    means = torch.as_tensor(means, dtype=torch.float64)
    generator = seeded(seed)
    base = 0.4 + 0.1 * torch.randn((n, 1, 1), generator=generator).double()
    drawn = spread * torch.randn((n, *means.shape), generator=generator).double()
    return base + means + drawn, base.expand(n, *means.shape).clone()


def test_divergence_and_penalty_of_two_heads_by_hand():
    harmful = torch.tensor([[[0.5, 0.2]], [[0.7, 0.2]]])
    reference = torch.tensor([[[0.3, 0.4]], [[0.1, 0.6]], [[0.2, 0.5]]])
    divergence = sink_divergence(harmful, reference)
    torch.testing.assert_close(divergence, torch.tensor([[0.4, -0.3]]))
    torch.testing.assert_close(sink_penalty(divergence), torch.tensor(0.2))
    swapped = sink_divergence(reference, harmful)
    torch.testing.assert_close(swapped, -divergence)
    torch.testing.assert_close(sink_penalty(swapped), torch.tensor(0.15))


def test_the_penalty_pulls_at_positive_heads_alone_and_at_both_texts():
    harmful = torch.tensor([[[0.5, 0.2]], [[0.7, 0.2]]], requires_grad=True)
    reference = torch.tensor([[[0.3, 0.4]]], requires_grad=True)
    sink_penalty(sink_divergence(harmful, reference)).backward()
    # One of two heads is positive, and its mean is over two harmful texts.
    expected = torch.tensor([[[0.25, 0.0]], [[0.25, 0.0]]])
    torch.testing.assert_close(harmful.grad, expected)
    torch.testing.assert_close(reference.grad, torch.tensor([[[-0.5, 0.0]]]))


def published_penalty(harmful, reference):
    """The scalar of the published loop, from its formula: head by head, relu, sum.

    Takes what eager attention gives: one [example, head, query, key] a layer.
    """
    total, n_heads = 0.0, 0
    for layer in range(len(harmful)):
        for head in range(harmful[layer].shape[1]):
            on_harmful = harmful[layer][:, head, 1:, 0].mean()
            on_reference = reference[layer][:, head, 1:, 0].mean()
            total = total + torch.relu(on_harmful - on_reference)
            n_heads += 1
    return total / n_heads


def test_the_penalty_is_the_published_scalar():
    def attention(length, seed):
        generator = seeded(seed)
        blocked = torch.ones(length, length).triu(1).bool()
        scores = torch.randn((4, 1, 5, length, length), generator=generator).double()
        return scores.masked_fill(blocked, -torch.inf).softmax(-1)

    harmful, reference = attention(11, 1), attention(7, 2)
    expected = published_penalty(tuple(harmful), tuple(reference))
    # The mean over later queries of the first column, a row a text.
    ours = [
        each[:, :, :, 1:, 0].mean(-1).transpose(0, 1) for each in (harmful, reference)
    ]
    found = sink_penalty(sink_divergence(*ours))
    assert expected > 0.003
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    figures = unpaired_sinks(
        ours[0].repeat(3, 1, 1), names(3), ours[1].repeat(4, 1, 1), names(4), seeded()
    )
    assert figures.penalty.value == pytest.approx(float(expected), abs=1e-12)


def test_the_same_texts_diverge_in_no_head():
    mass = masses(20)
    found = paired_sinks(mass, mass.clone(), names(20), seeded())
    assert [each.value for each in found.divergence] == [0.0] * 6
    assert found.positive[:3] == (0.0, 0.0, 0.0)
    assert found.by_chance[:3] == (0.0, 0.0, 0.0)
    assert found.penalty.value == found.mean_divergence.value == 0.0
    assert (found.n_above, found.n_below, found.n_measured) == (0, 0, 6)
    assert found.harmful == found.reference or all(
        one.value == other.value
        for one, other in zip(found.harmful, found.reference, strict=True)
    )


def test_swapping_the_texts_turns_every_sign():
    one, other = masses(30, seed=1), masses(30, seed=2)
    found = paired_sinks(one, other, names(30), seeded())
    swapped = paired_sinks(other, one, names(30), seeded())
    for there, back in zip(found.divergence, swapped.divergence, strict=True):
        assert (back.value, back.low, back.high) == pytest.approx(
            (-there.value, -there.high, -there.low), abs=1e-12
        )
    assert swapped.positive.value == 6 - found.positive.value
    assert swapped.positive.low == 6 - found.positive.high
    assert (swapped.n_above, swapped.n_below) == (found.n_below, found.n_above)
    assert swapped.mean_divergence.value == pytest.approx(-found.mean_divergence.value)


def test_planted_signs_are_found_and_noise_is_not():
    means = [[0.05, 0.05, 0.05, -0.05], [0.0, 0.0, 0.0, 0.0]]
    harmful, reference = noisy(means, 60, 0.03, 3)
    found = paired_sinks(harmful, reference, names(60), seeded())
    above = [each.low > 0 for each in found.divergence]
    below = [each.high < 0 for each in found.divergence]
    assert above[:3] == [True] * 3
    assert below[3]
    assert not any(above[4:])
    assert not any(below[4:])
    assert (found.n_above, found.n_below) == (3, 1)
    # Heads that are noise fall either way, and the interval says that.
    assert found.positive.low <= 4
    assert found.positive.high >= 6
    estimated = torch.tensor([each.value for each in found.divergence])
    expected = torch.tensor(means).flatten().double()
    torch.testing.assert_close(estimated.double(), expected, atol=0.015, rtol=0)


def test_all_heads_positive_is_more_than_chance_and_noise_is_not():
    harmful, reference = noisy([[0.02] * 12], 40, 0.02, 4)
    planted = paired_sinks(harmful, reference, names(40), seeded())
    assert planted.positive.value == 12
    assert planted.positive.value > planted.by_chance.high
    harmful, reference = noisy([[0.0] * 12], 40, 0.02, 5)
    noise = paired_sinks(harmful, reference, names(40), seeded())
    assert noise.by_chance.low <= noise.positive.value <= noise.by_chance.high
    # Heads that rise and fall together leave room for many positive ones by chance.
    together = 0.02 * torch.randn((40, 1, 1), generator=seeded(6)).double()
    moved = paired_sinks(
        reference + together + 0.001 * (harmful - reference),
        reference,
        names(40),
        seeded(),
    )
    assert moved.by_chance.high == 12
    assert moved.by_chance.low == 0


def test_noise_alone_makes_a_penalty_and_fewer_pairs_make_more_of_it():
    few, many = (
        paired_sinks(*noisy([[0.0] * 200], n, 0.03, 7), names(n), seeded())
        for n in (4, 64)
    )
    # E[relu(noise)] = spread / sqrt(2 pi n).
    for found, n in ((few, 4), (many, 64)):
        expected = 0.03 / (2 * torch.pi * n) ** 0.5
        assert found.penalty.value == pytest.approx(expected, rel=0.25)


def test_intervals_of_divergences_hold_the_truth_as_often_as_they_say():
    truth = 0.01
    harmful, reference = noisy([[truth] * 400], 25, 0.03, 8)
    found = paired_sinks(harmful, reference, names(25), seeded())
    held = [each.low <= truth <= each.high for each in found.divergence]
    assert 0.92 <= sum(held) / len(held) <= 0.98


def test_prompts_are_drawn_and_not_pairs():
    harmful, reference = noisy([[0.0] * 8], 10, 0.03, 9)
    once = paired_sinks(harmful, reference, names(10), seeded())
    often = paired_sinks(
        harmful.repeat(9, 1, 1), reference.repeat(9, 1, 1), names(10) * 9, seeded()
    )
    for single, repeated in zip(once.divergence, often.divergence, strict=True):
        assert repeated.high - repeated.low == pytest.approx(single.high - single.low)


def test_unpaired_on_the_same_prompts_is_paired():
    harmful, reference = noisy([[0.05, -0.02, 0.0]], 30, 0.03, 10)
    paired = paired_sinks(harmful, reference, names(30), seeded())
    loose = unpaired_sinks(harmful, names(30), reference, names(30), seeded())
    for one, other in zip(paired.divergence, loose.divergence, strict=True):
        assert other[:3] == pytest.approx(one[:3], abs=1e-12)
    assert loose.positive.value == paired.positive.value
    assert loose.by_chance[:3] == pytest.approx(paired.by_chance[:3], abs=0.3)


def test_what_pairs_share_widens_the_interval_only_where_it_is_not_paired():
    harmful, reference = noisy([[0.05, -0.02, 0.0]], 30, 0.01, 11)
    paired = paired_sinks(harmful, reference, names(30), seeded())
    others = [f"other {i}" for i in range(30)]
    loose = unpaired_sinks(harmful, names(30), reference, others, seeded())
    for one, other in zip(paired.divergence, loose.divergence, strict=True):
        assert other.value == pytest.approx(one.value)
        assert other.high - other.low > 5 * (one.high - one.low)
    assert (paired.n_above, paired.n_below) == (1, 1)
    assert loose.n_below == 0


def test_a_layer_that_cannot_see_the_sink_is_left_out_with_its_reason():
    harmful, reference = noisy([[0.05, 0.05], [0.05, 0.05]], 20, 0.01, 12)
    harmful[3, 1] = torch.nan
    found = paired_sinks(harmful, reference, names(20), seeded())
    assert [each.reason for each in found.divergence] == [None, None, UNSEEN, UNSEEN]
    assert found.harmful[2].value is found.reference[3].value is None
    assert (found.positive.value, found.n_measured) == (2.0, 2)
    nothing = paired_sinks(harmful * torch.nan, reference, names(20), seeded())
    assert nothing.positive.reason == nothing.by_chance.reason == UNSEEN
    assert nothing.n_measured == 0


def test_one_prompt_alone_has_no_interval():
    harmful, reference = noisy([[0.05]], 3, 0.01, 13)
    found = paired_sinks(harmful, reference, ["one"] * 3, seeded())
    assert "one base request" in found.positive.reason
    assert "one base request" in found.divergence[0].reason
    loose = unpaired_sinks(harmful, ["one"] * 3, reference, names(3), seeded())
    assert "one base request" in loose.divergence[0].reason


def test_nothing_to_compare_is_an_error():
    with pytest.raises(InputError, match="found none"):
        paired_sinks(masses(0), masses(0), [], seeded())
    with pytest.raises(InputError, match="found none"):
        unpaired_sinks(masses(2), names(2), masses(0), [], seeded())
    with pytest.raises(InputError, match="2 entries, one per row"):
        paired_sinks(masses(2), masses(2), names(3), seeded())
