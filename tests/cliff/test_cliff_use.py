"""Is a direction used? Closed forms of the controls, and the rules both ways."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from holdfast.cliff.commitment.causes.directions import Fitted, Probes, projected_out
from holdfast.cliff.commitment.causes.places import described
from holdfast.cliff.commitment.causes.use import (
    Removal,
    UseThresholds,
    beyond,
    changed,
    gap_lost,
    matched_directions,
    random_directions,
    use_verdict,
    variance_along,
    within_covariance,
)
from holdfast.cliff.commitment.causes.words import mask, mask_as_many, telling_tokens
from holdfast.stats.bootstrap import Estimate, undefined
from holdfast.study.figures import draws_of

WIDTH = 24


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def covariance(seed=0, width=WIDTH):
    """A covariance whose variances span four orders of magnitude."""
    basis = torch.linalg.qr(
        torch.randn((width, width), generator=seeded(seed), dtype=torch.float64)
    )[0]
    values = torch.logspace(-2, 2, width, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T


def direction(seed=1, width=WIDTH):
    return torch.randn(width, generator=seeded(seed), dtype=torch.float64) * 3


def test_random_directions_have_the_norm_and_no_side():
    along = direction()
    drawn = random_directions(along, 2000, seeded())
    assert drawn.norm(dim=1) == pytest.approx(torch.full((2000,), float(along.norm())))
    cosines = drawn @ along / along.norm() ** 2
    assert float(cosines.mean()) == pytest.approx(0, abs=0.02)
    assert float(cosines.square().mean()) == pytest.approx(1 / WIDTH, rel=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_matched_directions_have_norm_and_variance_and_are_orthogonal(seed):
    own, along = covariance(seed), direction(seed + 10)
    drawn = matched_directions(along, own, 8, seeded(seed))
    assert drawn.norm(dim=1) == pytest.approx(torch.full((8,), float(along.norm())))
    for each in drawn:
        assert variance_along(each, own) == pytest.approx(
            variance_along(along, own), rel=1e-6
        )
        assert float(each @ along) == pytest.approx(0, abs=1e-8)
    assert torch.linalg.matrix_rank(drawn) == 8


def test_what_is_projected_out_takes_as_much_variance():
    """By the states themselves: the variance they lose is the same, to rounding."""
    own, along = covariance(), direction()
    states = torch.randn((4000, WIDTH), generator=seeded(), dtype=torch.float64)
    states = states @ torch.linalg.cholesky(own).T
    empirical = torch.cov(states.T)

    def lost(vector):
        unit = vector / vector.norm()
        left = states - (states @ unit)[:, None] * unit
        return float(states.var(0).sum() - left.var(0).sum())

    for each in matched_directions(along, empirical, 4, seeded()):
        assert lost(each) == pytest.approx(lost(along), rel=1e-6)


def test_a_variance_out_of_reach_is_met_as_nearly_as_can_be():
    """The direction of the largest variance leaves none as large; the next is near."""
    own = torch.diag(torch.tensor([9.0, 4.0, 1.0, 0.0], dtype=torch.float64))
    along = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    [drawn] = matched_directions(along, own, 1, seeded())
    assert variance_along(drawn, own) == pytest.approx(4.0, rel=1e-3)


def test_answers_that_all_begin_alike_have_a_control_that_moves_nothing():
    """No direction of norm 1, no cosine, and no state that is not a number."""
    draws = torch.Generator().manual_seed(3)
    labels = torch.arange(12) < 6
    states = torch.randn(12, 4, generator=draws) + labels[:, None]
    fitted = Fitted(labels, {"final_norm": states})
    nothing, probe = torch.zeros(4).double(), torch.ones(4).double()
    edit = projected_out(nothing, ["final_norm"], fitted)
    amount = edit.gain * (states @ edit.units[0]) + edit.shifts[0]
    assert torch.equal(states + amount[:, None] * edit.units[0], states)
    cosines = described(fitted, Probes(probe, nothing), {})["cosines"]
    assert cosines["answer"] is cosines["mean_difference_answer"] is None
    assert -1 <= cosines["mean_difference"] <= 1


def test_variance_within_outcomes_leaves_out_what_the_outcome_makes():
    generator = seeded()
    labels = torch.arange(200) % 2 == 0
    noise = torch.randn((200, 3), generator=generator, dtype=torch.float64)
    apart = noise + torch.where(labels, 50.0, -50.0)[:, None] * torch.eye(3)[0]
    own = within_covariance(apart, labels)
    assert torch.allclose(own, within_covariance(noise, labels), atol=1e-9)
    assert torch.cov(apart.T)[0, 0] > 1000


def estimates(value, half=0.02):
    return Estimate(value, value - half, value + half, 100)


def removal(answers, gap, *, beyond_answers=None, beyond_gap=None):
    parts = (
        answers,
        answers if beyond_answers is None else beyond_answers,
        gap,
        gap if beyond_gap is None else beyond_gap,
    )
    return Removal(
        *(
            undefined(0, "not there") if each is None else estimates(each)
            for each in parts
        )
    )


GOOD, BLIND = removal(0.5, 1.0), removal(0.1, 0.2)


@pytest.mark.parametrize(
    ("places", "control", "word"),
    [
        ([removal(0.4, 0.9)], GOOD, "used"),
        ([removal(0.0, 0.4)], GOOD, "used"),  # The margin falls, few answers turn.
        ([removal(0.0, 0.0), removal(0.3, 0.0)], GOOD, "used"),  # In one place.
        ([removal(0.4, 0.9)], BLIND, "used"),  # What is seen needs no control.
        ([removal(0.01, 0.01)], GOOD, "not used"),
        ([removal(0.01, 0.01)], BLIND, "not shown"),
        ([removal(0.01, 0.01), removal(0.1, 0.1)], GOOD, "not shown"),
        # As much as by a random direction: it changes something, and proves nothing.
        ([removal(0.4, 0.9, beyond_answers=0.0, beyond_gap=0.0)], GOOD, "not shown"),
        ([removal(0.01, -0.5)], GOOD, "not used"),  # The gap has grown.
        ([removal(0.01, None)], removal(0.5, None), "not used"),
        ([removal(0.4, None)], GOOD, "used"),
    ],
)
def test_the_rules(places, control, word):
    named = {f"at place {n}": each for n, each in enumerate(places)}
    found = use_verdict(named, control, 40)
    assert found.word == word
    assert all("%" in sentence for sentence in found.evidence)
    assert use_verdict(named, control, 19).word == "not shown"


LIMITS = {
    "used_answers": 1,
    "used_gap": 1,
    "unused_answers": 0,
    "unused_gap": 0,
    "control_answers": 1,
    "control_gap": 2,
    "min_requests": 1000,
}


def test_every_threshold_is_at_work():
    for field in fields(UseThresholds):
        moved = UseThresholds(**{field.name: type(field.default)(LIMITS[field.name])})
        strict = {
            "used_answers": [removal(0.4, 0.0)],
            "used_gap": [removal(0.0, 0.4)],
            "min_requests": [removal(0.4, 0.9)],
        }
        places = strict.get(field.name, [removal(0.0, 0.0)])
        named = {f"{n}": each for n, each in enumerate(places)}
        before = use_verdict(named, GOOD, 100).word
        assert use_verdict(named, GOOD, 100, moved).word != before, field.name


def margins(n=40, used=1.0, noise=0.0):
    """Log-odds of refusing, and what is left of them without a direction."""
    refused = torch.arange(n) % 2 == 0
    drawn = torch.randn(n, generator=seeded(), dtype=torch.float64) * noise
    before = torch.where(refused, 4.0, -4.0) + drawn
    return before, before * (1 - used), refused, [f"r{row}" for row in range(n)]


@pytest.mark.parametrize("used", [0.0, 0.25, 1.0, 1.5])
def test_the_gap_lost_is_a_share_of_the_gap(used):
    before, after, refused, clusters = margins(used=used, noise=0.5)
    found = gap_lost(before, after, refused, clusters, seeded())
    assert found.value == pytest.approx(used)
    shifted = gap_lost(before + 7, after - 3, refused, clusters, seeded())
    assert shifted.value == pytest.approx(used)
    flat = gap_lost(before * 0, after, refused, clusters, seeded())
    assert flat.value is None
    assert "does not tell" in flat.reason


def test_a_control_that_loses_as_much_leaves_nothing_beyond_it():
    before, after, refused, clusters = margins(used=0.5, noise=0.5)
    found = gap_lost(before, after, refused, clusters, seeded(), beside=after)
    assert found.value == pytest.approx(0)
    half = gap_lost(before, after, refused, clusters, seeded(), beside=before * 0.75)
    assert half.value == pytest.approx(0.25)


def test_answers_change_beyond_the_closest_control():
    n = 60
    clusters = [f"r{row}" for row in range(n)]
    edited = torch.arange(n) < 30
    few, many = torch.arange(n) < 6, torch.arange(n) < 24
    found = beyond(edited, [few, many], clusters, draws_of(0, "beyond"))
    assert found.value == pytest.approx(0.1)
    before = torch.zeros(n, dtype=torch.bool)
    assert changed(before, edited, clusters, seeded()).value == pytest.approx(0.5)


def test_telling_tokens_are_those_of_refusals_the_strongest_first():
    """7 stands in every refusal and no other row, 8 in most, 9 in all rows alike."""
    refusals = [[9, 7, 8, 20 + row] for row in range(18)] + [[9, 7], [9, 7]]
    others = [[9, 5, 40 + row] for row in range(18)] + [[9, 8], [9, 5]]
    labels = torch.tensor([True] * 20 + [False] * 20)
    assert telling_tokens(refusals + others, labels, 20) == (7, 8)
    assert telling_tokens(refusals + others, labels, 1) == (7,)
    assert telling_tokens(refusals + others, ~labels, 20) == (5,)
    same = telling_tokens([[9], [9]] * 10, torch.tensor([True, False] * 10), 20)
    assert same == ()


def test_masked_tokens_are_neutral_ones_of_the_same_row():
    tokens = [7, 1, 2, 7, 3, 8]
    made = mask(tokens, {7, 8}, seeded())
    assert [made[place] for place in (1, 2, 4)] == [1, 2, 3]
    assert set(made) <= {1, 2, 3}
    assert mask([7, 8], {7, 8}, seeded()) is None
    assert mask(tokens, set(), seeded()) == tuple(tokens)
    for seed in range(20):
        other = mask_as_many(tokens, {7, 8}, seeded(seed))
        assert sum(a != b for a, b in zip(tokens, other, strict=True)) <= 3
        assert set(other) <= set(tokens)


def test_the_page_has_the_thresholds_of_the_rules():
    page = (Path(__file__).parents[2] / "docs" / "verdict.md").read_text()
    section = page.split("## Is the probe what the model uses?")[1].split("\n## ")[0]
    for field in fields(UseThresholds):
        value = f"{field.default:g}"
        assert re.search(rf"\b{re.escape(value)}\b", section), field.name
