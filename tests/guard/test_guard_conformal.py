"""Thresholds: the promised rate over many draws, and nothing promised beyond it."""

import math

import pytest
import torch
from scipy.stats import beta

from holdfast.errors import InputError, TooFewExamplesError
from holdfast.guard.conformal import (
    PathScale,
    conformal_threshold,
    first_flagged,
    fit_path_scale,
    running_maximum,
)


def names(n):
    return [str(row) for row in range(n)]


@pytest.mark.parametrize(
    ("n", "level"), [(99, 0.01), (100, 0.01), (1000, 0.01), (19, 0.05), (200, 0.05)]
)
def test_the_threshold_is_the_corrected_order_statistic(n, level):
    scores = torch.randperm(n, generator=torch.Generator().manual_seed(n)).double()
    found = conformal_threshold(scores, names(n), level)
    rank = math.ceil(round((n + 1) * (1 - level), 9))
    assert found.value == rank - 1
    low, high = beta(n + 1 - rank, rank).ppf([0.025, 0.975])
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert (found.n, found.n_requests) == (n, n)


def test_exchangeable_rows_are_flagged_at_the_stated_rate_over_many_draws():
    draws = torch.Generator().manual_seed(0)
    n, level, flagged, inside = 199, 0.05, 0, 0
    for _ in range(400):
        # The rate of uniform scores above a threshold is one minus the threshold.
        scores = torch.rand(n, generator=draws, dtype=torch.float64)
        found = conformal_threshold(scores, names(n), level)
        rate = 1 - found.value
        flagged += rate
        inside += found.low <= rate <= found.high
    # 190 of 200 ranks are below it: the mean is exactly the level, its error 0.0008.
    assert flagged / 400 == pytest.approx(level, abs=0.003)
    assert inside / 400 == pytest.approx(0.95, abs=0.035)


def test_rows_of_another_kind_are_flagged_more_often():
    draws = torch.Generator().manual_seed(1)
    scores = torch.randn(999, generator=draws)
    found = conformal_threshold(scores, names(999), 0.05)
    shifted = torch.randn(2000, generator=draws) + 1
    assert (shifted > found.value).double().mean() > 0.2


def test_requests_of_many_rows_do_not_make_the_threshold():
    # One request has half of all rows, and they all score high.
    scores = torch.cat([torch.arange(99.0), torch.full((99,), 1000.0)])
    clusters = [*names(99), *["the same"] * 99]
    assert conformal_threshold(scores, clusters, 0.05).value < 99
    assert conformal_threshold(scores, names(198), 0.05).value == 1000


def test_a_clustered_world_keeps_its_rate():
    # Rows of a request share most of their score; a new request is what is promised.
    draws = torch.Generator().manual_seed(2)
    total = 0.0
    for _ in range(200):
        size = torch.randint(1, 6, (100,), generator=draws)
        request = torch.randn(100, generator=draws).repeat_interleave(size)
        scores = request + 0.1 * torch.randn(int(size.sum()), generator=draws)
        clusters = [
            name
            for name, k in zip(names(100), size.tolist(), strict=True)
            for _ in range(k)
        ]
        found = conformal_threshold(scores, clusters, 0.1)
        # One row of a new request is normal with this deviation.
        rate = 0.5 * math.erfc(found.value / math.sqrt(2 * 1.01))
        total += rate
        assert found.n_requests == 100
    assert 0.07 < total / 200 < 0.105


def test_too_few_requests_for_the_rate_are_refused_with_the_count():
    with pytest.raises(TooFewExamplesError, match=r"at least 99 benign.*found 98"):
        conformal_threshold(torch.rand(98), names(98), 0.01)
    with pytest.raises(TooFewExamplesError, match="found 3"):
        conformal_threshold(torch.rand(300), ["a", "b", "c"] * 100, 0.01)


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(InputError, match="finite scores"):
        conformal_threshold(torch.tensor([1.0, float("nan")] * 50), names(100), 0.05)


def test_a_response_may_be_looked_at_after_every_step():
    draws = torch.Generator().manual_seed(3)

    def walks(n):
        return torch.randn(n, 16, generator=draws).cumsum(1)

    train, level = walks(500), 0.05
    scale = fit_path_scale(train)
    whole, naive = 0.0, 0.0
    for _ in range(20):
        calibration, test = walks(399), walks(2000)
        held = running_maximum(calibration, scale)[:, -1]
        threshold = conformal_threshold(held, names(399), level)
        path = running_maximum(test, scale)
        whole += float((first_flagged(path, threshold) < 16).double().mean())
        # A threshold for each step by itself is passed by many more rows.
        each = torch.stack(
            [
                test[:, step]
                > conformal_threshold(calibration[:, step], names(399), level).value
                for step in range(16)
            ]
        )
        naive += float(each.any(0).double().mean())
    assert whole / 20 == pytest.approx(level, abs=0.01)
    assert naive / 20 > 2 * level


def test_the_first_flagged_step_is_the_first_above_and_stays_flagged():
    scale = PathScale(torch.zeros(4).double(), torch.ones(4).double())
    path = running_maximum(torch.tensor([[0.0, 3.0, 1.0, 1.0], [0.0] * 4]), scale)
    assert path.tolist() == [[0, 3, 3, 3], [0, 0, 0, 0]]
    threshold = conformal_threshold(torch.full((99,), 2.0), names(99), 0.01)
    assert first_flagged(path, threshold).tolist() == [1, 4]


def test_a_step_at_which_all_rows_are_alike_does_not_decide():
    draws = torch.Generator().manual_seed(4)
    train = torch.randn(300, 2, generator=draws)
    train[:, 0] = 1e-6 * train[:, 0]
    scale = fit_path_scale(train)
    assert scale.reach[0] == pytest.approx(float(scale.reach[1]) / 10)
    flat = fit_path_scale(torch.zeros(10, 2))
    assert flat.reach.tolist() == [1, 1]
