"""The signal against its closed form, and what must not change it."""

import math

import pytest
import torch

from holdfast.dynamics.anchors import Anchors
from holdfast.dynamics.signal import (
    anchor_signal,
    outlier_dimensions,
    pool_steps,
    positions_of,
    steps_at_fractions,
)
from holdfast.errors import InputError


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def anchors(steps=4, width=16, seed=1):
    return Anchors(*draws(2, steps, width, seed=seed).unbind(), 20, 20)


def resample(values, steps):
    return torch.stack([row[at] for row, at in zip(values, steps, strict=True)])


def at_distances(to_compliant: float, to_refused: float):
    """Unit vectors in three dimensions with exactly these cosine distances."""
    compliant = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    refused = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    state = torch.tensor([1 - to_compliant, 1 - to_refused, 0.0], dtype=torch.float64)
    state[2] = (1 - state.square().sum()).sqrt()
    pair = Anchors(compliant[None].float(), refused[None].float(), 20, 20)
    return pair, state[None, None]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(1.0, 0.5), (1.05, 0.62), (1.1, 0.72), (1.25, 0.90), (1.5, 0.983), (2.0, 0.999)],
)
def test_the_signal_is_the_closed_form_of_the_distance_ratio(ratio, expected):
    pair, state = at_distances(0.45, 0.45 * ratio)
    found = float(anchor_signal(pair).compliance(state))
    assert found == pytest.approx(ratio**10 / (1 + ratio**10), abs=1e-5)
    assert found == pytest.approx(expected, abs=0.006)


def test_the_logit_is_the_formula_written_out():
    pair, states = anchors(), draws(5, 4, 16, seed=2)

    def distance(side):
        return 1 - torch.cosine_similarity(states.double(), side.double(), dim=-1)

    refused, compliant = distance(pair.refused), distance(pair.compliant)
    expected = ((refused + 1e-8).log() - (compliant + 1e-8).log()) / 0.1
    found = anchor_signal(pair).logit(states)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_an_anchor_held_against_itself_saturates():
    pair = anchors()
    held = anchor_signal(pair)
    itself = held.logit(torch.stack([pair.compliant, pair.refused]))
    apart = 1 - torch.cosine_similarity(pair.compliant, pair.refused, dim=-1)
    expected = (apart.log() - math.log(1e-8)) / 0.1
    torch.testing.assert_close(itself[0], expected, atol=0.01, rtol=1e-4)
    torch.testing.assert_close(itself[1], -expected, atol=0.01, rtol=1e-4)
    assert bool((itself[0] > 100).all())
    assert torch.equal(held.compliance(pair.compliant[None])[0], torch.ones(4))


@pytest.mark.parametrize("mode", ["paper", "repo", "robust"])
def test_swapping_the_anchors_gives_one_minus_the_signal(mode):
    pair, states = anchors(), draws(6, 4, 16, seed=3)
    swapped = Anchors(pair.refused, pair.compliant, 20, 20)
    found = anchor_signal(swapped, mode).compliance(states)
    torch.testing.assert_close(found, 1 - anchor_signal(pair, mode).compliance(states))


def test_the_scale_of_a_state_does_not_matter_but_its_direction_does():
    pair, states = anchors(), draws(6, 4, 16, seed=4)
    held = anchor_signal(pair)
    scale = torch.logspace(-4, 4, 6)[:, None, None]
    torch.testing.assert_close(held.logit(states * scale), held.logit(states))
    assert not torch.allclose(held.logit(-states), held.logit(states), atol=0.1)


def test_low_precision_is_left_before_distances_are_taken():
    pair = anchors(width=64)
    states = (pair.compliant + 0.02 * draws(50, 4, 64, seed=5)).bfloat16()
    found = anchor_signal(pair).logit(states)
    assert found.dtype == torch.float32
    exact = anchor_signal(pair).logit(states.double())
    torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=1e-4)


def test_a_state_midway_reads_a_half_in_the_robust_mode():
    pair = anchors()
    middle = ((pair.compliant + pair.refused) / 2)[None]
    found = anchor_signal(pair, "robust").compliance(middle)
    torch.testing.assert_close(found, torch.full((1, 4), 0.5), atol=0.02, rtol=0)


def test_a_large_shared_dimension_hides_the_signal_except_in_the_robust_mode():
    pair = anchors(width=64)
    hidden = Anchors(*(side.clone() for side in pair[:2]), 20, 20)
    for side, size in zip(hidden[:2], (400.0, 200.0), strict=True):
        side[:, 7] = size
    states = (pair.compliant + 0.5 * draws(200, 4, 64, seed=6)).clone()
    torch.testing.assert_close(
        outlier_dimensions(hidden), torch.arange(64) == 7, atol=0, rtol=0
    )
    assert not bool(outlier_dimensions(pair).any())
    # A massive activation that is there in some texts and absent from these.
    states[..., 7] = draws(200, 4, seed=7)
    paper = anchor_signal(hidden).compliance(states)
    robust = anchor_signal(hidden, "robust").compliance(states)
    assert float(paper.mean()) < 0.6
    assert float(robust.mean()) > 0.95
    # Whatever the masked dimension does, it is not looked at.
    states[..., 7] = 300.0
    torch.testing.assert_close(
        anchor_signal(hidden, "robust").compliance(states), robust
    )


def test_one_step_at_a_time_gives_the_same_numbers():
    pair, states = anchors(), draws(3, 4, 16, seed=8)
    for mode in ("paper", "robust"):
        held = anchor_signal(pair, mode)
        steps = [held.logit_at(step, states[:, step]) for step in range(4)]
        torch.testing.assert_close(torch.stack(steps, 1), held.logit(states))
    with pytest.raises(InputError, match="from 0 to 3"):
        held.logit_at(4, states[:, 0])


def test_the_number_of_rows_changes_nothing():
    held, states = anchor_signal(anchors()), draws(9, 4, 16, seed=9)
    parts = torch.cat([held.logit(part) for part in torch.split(states, 2)])
    assert torch.equal(held.logit(states), parts)
    assert held.logit(states[:0]).shape == (0, 4)


def test_another_number_of_steps_is_refused_and_not_cut():
    with pytest.raises(InputError, match=r"4 steps.*found 3 steps"):
        anchor_signal(anchors()).logit(draws(2, 3, 16))


def test_pooling_is_the_mean_so_far():
    rows = draws(5, 3)
    found = pool_steps(rows, 4, "producing")
    expected = torch.stack([rows[: step + 1].mean(0) for step in range(4)])
    torch.testing.assert_close(found, expected)


def test_what_was_read_does_not_hold_the_state_before_the_text():
    rows = draws(5, 3)
    found = pool_steps(rows, 4, "committed")
    expected = [rows[0], *(rows[1 : step + 1].mean(0) for step in range(1, 4))]
    torch.testing.assert_close(found, torch.stack(expected))
    # Text of one token: nothing was ever read.
    torch.testing.assert_close(pool_steps(rows[:1], 2), rows[:1].expand(2, 3))


def test_after_the_end_the_mean_stays_or_the_last_state_counts_again():
    rows = draws(2, 3)
    held = pool_steps(rows, 4, "producing")
    torch.testing.assert_close(held[1:], rows.mean(0).expand(3, 3))
    repeated = pool_steps(rows, 4, "producing", repeat_last=True)
    torch.testing.assert_close(repeated[3], (rows[0] + 3 * rows[1]) / 4)
    torch.testing.assert_close(repeated[:2], held[:2])


def test_pooling_refuses_no_text_and_masks():
    with pytest.raises(InputError, match="found no token"):
        pool_steps(draws(0, 3), 4)
    with pytest.raises(InputError, match="still masked"):
        pool_steps(draws(2, 3), 4, "all_response")


def test_modes_differ_in_their_positions():
    assert positions_of("repo", "autoregressive") == "producing"
    assert positions_of("repo", "diffusion") == "all_response"
    for mode in ("paper", "robust"):
        for kind in ("autoregressive", "diffusion"):
            assert positions_of(mode, kind) == "committed"


@pytest.mark.parametrize("n", [4, 30, 32])
def test_an_even_sampler_is_left_as_it_is(n):
    shares = torch.cumsum(torch.full((2, n), 1 / n), 1)
    steps = steps_at_fractions(shares, n)
    assert torch.equal(steps, torch.arange(n).expand(2, n))


def test_an_uneven_sampler_is_read_when_it_has_settled_as_much():
    shares = torch.tensor([[0.1, 0.6, 0.6, 1.0], [0.25, 0.5, 0.75, 1.0]])
    steps = steps_at_fractions(shares, 4)
    assert steps.tolist() == [[1, 1, 3, 3], [0, 1, 2, 3]]
    values = draws(2, 4, 3)
    found = resample(values, steps)
    torch.testing.assert_close(found[0], values[0, [1, 1, 3, 3]])
    torch.testing.assert_close(resample(values[..., 0], steps), found[..., 0])


def test_a_sampler_of_twice_the_steps_gives_the_same_curve_over_the_share():
    # The signal is a function of the share alone: only the share can show that.
    def curve(n):
        shares = (torch.arange(n) + 1.0)[None] / n
        return shares, 1 / (1 + shares)

    slow_shares, slow = curve(32)
    fast_shares, fast = curve(16)
    common = resample(slow, steps_at_fractions(slow_shares, 16))
    torch.testing.assert_close(
        common, resample(fast, steps_at_fractions(fast_shares, 16))
    )
    assert not torch.allclose(slow[:, :16], fast)


@pytest.mark.parametrize("shares", [[0.5, 0.4, 1.0], [0.2, 0.5, 0.9]])
def test_shares_that_fall_or_do_not_end_at_one_are_refused(shares):
    with pytest.raises(InputError, match="never fall and end at 1"):
        steps_at_fractions(torch.tensor([shares]), 3)
