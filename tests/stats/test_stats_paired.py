import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binom, bootstrap, norm, t

from holdfast.errors import InputError
from holdfast.stats.paired import (
    mcnemar,
    paired_difference,
    paired_rate_difference,
    sign_flip,
    tango,
)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _outcomes(both, gained, lost, neither):
    after = [True] * (both + gained) + [False] * (lost + neither)
    before = [True] * both + [False] * gained + [True] * lost + [False] * neither
    names = [str(i) for i in range(len(after))]
    return torch.tensor(after), torch.tensor(before), names


@pytest.mark.parametrize(("gained", "lost"), [(12, 2), (3, 9), (5, 5), (1, 0)])
def test_mcnemar_is_twice_the_tail_of_a_fair_coin(gained, lost):
    found = mcnemar(*_outcomes(7, gained, lost, 11))
    tail = binom.cdf(min(gained, lost), gained + lost, 0.5)
    assert (found.gained, found.lost) == (gained, lost)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))


def test_rows_that_do_not_change_are_no_evidence():
    few = mcnemar(*_outcomes(2, 6, 1, 2))
    many = mcnemar(*_outcomes(200, 6, 1, 200))
    assert few == many
    assert mcnemar(*_outcomes(5, 0, 0, 5)).p_value == 1


def test_mcnemar_refuses_rows_of_one_request():
    after, before, _ = _outcomes(1, 1, 1, 1)
    with pytest.raises(InputError, match="4 rows of 2 requests"):
        mcnemar(after, before, ["a", "a", "b", "b"])


@pytest.mark.parametrize(("gained", "lost"), [(8, 2), (1, 4), (3, 3)])
def test_flipping_signs_is_mcnemar_with_one_row_a_request(gained, lost):
    after, before, names = _outcomes(4, gained, lost, 6)
    exact = mcnemar(after, before, names).p_value
    found = sign_flip(after.double(), before.double(), names, _generator())
    assert found == pytest.approx(exact, abs=1e-9)


def test_drawn_signs_come_close_to_all_signs():
    after, before, names = _outcomes(4, 19, 8, 6)
    exact = mcnemar(after, before, names).p_value
    found = sign_flip(after.double(), before.double(), names, _generator())
    assert found == pytest.approx(exact, abs=0.01)
    again = sign_flip(after.double(), before.double(), names, _generator())
    assert found == again


def test_rows_of_one_request_are_one_witness():
    """Ten rows that change together are no more than one that does."""
    after, before = torch.ones(10), torch.zeros(10)
    assert sign_flip(after, before, ["one"] * 10, _generator()) == 1
    apart = sign_flip(after, before, [str(i) for i in range(10)], _generator())
    assert apart == pytest.approx(2 / 2**10)


def test_the_paired_bootstrap_is_that_of_scipy_on_independent_rows(resamples):
    resamples(4000)
    after, before = torch.randn(2, 300, generator=_generator(1)).double()
    after = after + 0.3 + before
    names = [str(i) for i in range(300)]
    found = paired_difference(after, before, names, _generator())
    differences = (after - before).numpy()
    expected = bootstrap(
        (differences,), lambda x, axis: x.mean(axis), method="percentile", rng=3
    ).confidence_interval
    assert found.value == pytest.approx(differences.mean())
    assert found.low == pytest.approx(expected.low, abs=0.01)
    assert found.high == pytest.approx(expected.high, abs=0.01)


def test_pairing_is_narrower_where_rows_agree_and_clusters_are_wider():
    before = torch.randn(200, generator=_generator(1)).double() * 5
    after = before + 0.1 * torch.randn(200, generator=_generator(2)).double()
    names = [str(i) for i in range(200)]
    found = paired_difference(after, before, names, _generator())
    assert found.high - found.low < 0.1
    shift = torch.randn(20, generator=_generator(3)).double().repeat_interleave(10)
    names = [str(i // 10) for i in range(200)]
    wide = paired_difference(before + shift, before, names, _generator())
    alone = paired_difference(
        before + shift, before, [str(i) for i in range(200)], _generator()
    )
    assert wide.high - wide.low > 2 * (alone.high - alone.low)


def _constrained(gained, lost, n, difference):
    """Score statistic by numerical maximisation, rather than the closed form."""

    def loss(lost_share):
        shares = [lost_share + difference, lost_share, 1 - 2 * lost_share - difference]
        counts = [gained, lost, n - gained - lost]
        terms = zip(counts, shares, strict=True)
        return -sum(c * float(torch.tensor(max(p, 1e-15)).log()) for c, p in terms if c)

    low, high = max(0, -difference), (1 - difference) / 2
    share = minimize_scalar(
        loss, bounds=(low, high), method="bounded", options={"xatol": 1e-10}
    ).x
    variance = n * (2 * share + difference - difference**2)
    return (gained - lost - n * difference) / variance**0.5


@pytest.mark.parametrize(
    ("gained", "lost", "n"), [(12, 2, 50), (3, 9, 40), (0, 5, 30), (7, 7, 25)]
)
def test_at_both_ends_of_tangos_interval_the_score_is_the_quantile(gained, lost, n):
    low, high = tango(gained, lost, n)
    z = norm.ppf(0.975)
    assert low < (gained - lost) / n < high
    assert _constrained(gained, lost, n, low) == pytest.approx(z, abs=1e-3)
    assert _constrained(gained, lost, n, high) == pytest.approx(-z, abs=1e-3)


def test_tangos_interval_turns_with_the_conditions():
    low, high = tango(12, 2, 50)
    assert tango(2, 12, 50) == pytest.approx((-high, -low), abs=1e-8)


@pytest.mark.parametrize("n", [1, 40, 400])
def test_no_change_at_all_is_not_certainty(n):
    z = norm.ppf(0.975)
    end = z * z / (n + z * z)
    assert tango(0, 0, n) == pytest.approx((-end, end), abs=1e-6)


def test_every_row_that_changes_puts_one_end_at_the_edge():
    low, high = tango(20, 0, 20)
    z = norm.ppf(0.975)
    assert high == 1
    assert low == pytest.approx((20 - z * z) / (20 + z * z), abs=1e-6)
    assert tango(0, 20, 20)[0] == -1


def test_a_rate_difference_with_one_row_a_request_is_tangos():
    found = paired_rate_difference(*_outcomes(10, 12, 2, 26), _generator())
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == tango(12, 2, 50)
    assert found.n == 50


def test_rows_of_a_request_that_never_change_still_have_a_width():
    after, before, _ = _outcomes(40, 0, 0, 40)
    names = [str(i // 4) for i in range(80)]
    found = paired_rate_difference(after, before, names, _generator())
    assert found.value == 0
    assert (found.low, found.high) == pytest.approx(tango(0, 0, 20))
    assert found.high > 0.1


def test_many_changing_requests_are_resampled():
    generator = _generator(5)
    after = torch.rand(400, generator=generator) < 0.3
    before = torch.rand(400, generator=generator) < 0.6
    names = [str(i // 2) for i in range(400)]
    found = paired_rate_difference(after, before, names, _generator())
    plain = paired_difference(after.double(), before.double(), names, _generator())
    assert found == plain
    assert found.high < 0


def test_no_rows_give_no_number():
    none = torch.zeros(0, dtype=torch.bool)
    found = paired_rate_difference(none, none, [], _generator())
    assert found.value is None
    assert found.reason == "there are no rows"


def test_requests_that_all_change_alike_still_have_a_width():
    """Every row of twenty requests turns: resampling shows no spread, Tango does."""
    false = torch.zeros(40, dtype=torch.bool)
    names = [str(row // 2) for row in range(40)]
    found = paired_rate_difference(~false, false, names, _generator())
    assert found.value == found.high == 1
    assert found.low == pytest.approx(tango(20, 0, 20)[0])
    assert found.low < 0.95


def test_outcomes_that_never_change_have_tangos_width_and_numbers_have_none():
    """48 pairs, no change: z²/(n + z²) for a rate; for a number nothing is known."""
    names = [str(i) for i in range(48)]
    outcomes = torch.tensor([True, False] * 24)
    found = paired_difference(outcomes, outcomes, names, _generator())
    z = float(norm.ppf(0.975))
    end = z * z / (48 + z * z)
    assert found.value == 0
    assert (found.low, found.high) == pytest.approx((-end, end), abs=1e-6)
    assert end == pytest.approx(0.0741, abs=1e-4)
    numbers = torch.randn(48, generator=_generator(4)).double()
    for shift in (0.0, 0.5):
        none = paired_difference(numbers + shift, numbers, names, _generator())
        assert none.value is None
        assert "says the same" in none.reason


def test_numbers_whose_requests_change_alike_have_the_width_of_their_rows():
    before = torch.zeros(24).double()
    after = torch.tensor([1.0, 3.0] * 12).double()
    names = [str(i // 2) for i in range(24)]
    found = paired_difference(after, before, names, _generator())
    half = float(t.ppf(0.975, 11)) * (1 / 12) ** 0.5
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
