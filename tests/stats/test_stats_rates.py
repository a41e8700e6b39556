"""Rates, means and correlations against closed forms and SciPy."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, pearsonr, t

from holdfast.errors import InputError
from holdfast.stats.bootstrap import bootstrap, require_width
from holdfast.stats.rates import (
    calibration_error,
    clustered_mean,
    clustered_rate,
    mean_difference,
    pearson,
    wilson,
)

torch.set_num_threads(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 20), (7, 20), (20, 20), (3, 500)])
def test_wilson_agrees_with_scipy(k, n):
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    found = wilson(k, n)
    assert found.value == k / n
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)


@pytest.mark.parametrize("n", [1, 5, 1000])
def test_a_rate_of_none_or_all_never_has_width_zero(n):
    none, everything = wilson(0, n), wilson(n, n)
    assert none.low == 0
    assert none.high > 1 / (n + 4)
    assert everything.high == 1
    assert everything.low < 1 - 1 / (n + 4)


def test_no_rows_give_a_reason_and_not_a_zero_error():
    empty = torch.zeros(0, dtype=torch.float64)
    for found in (
        wilson(0, 0),
        clustered_rate(empty.bool(), [], generator()),
        clustered_mean(empty, [], generator()),
        pearson(empty, empty, [], generator()),
        calibration_error(empty, empty.bool(), [], generator()).brier,
        mean_difference(empty, [], empty, [], generator()),
    ):
        assert found[:4] == (None, None, None, 0)
        assert found.reason


def test_a_clustered_rate_of_single_rows_is_wilsons():
    successes = torch.tensor([True] * 7 + [False] * 13)
    found = clustered_rate(successes, [str(i) for i in range(20)], generator())
    assert found == wilson(7, 20)


@pytest.mark.parametrize("value", [True, False])
def test_a_unanimous_clustered_rate_is_as_wide_as_its_requests_allow(value):
    successes = torch.full((100,), value)
    found = clustered_rate(successes, [str(i % 10) for i in range(100)], generator())
    by_request = wilson(10 * value, 10)
    by_row = wilson(100 * value, 100)
    assert (found.low, found.high) == (by_request.low, by_request.high)
    assert found.high - found.low > 3 * (by_row.high - by_row.low)
    assert found.n == 100


def half_works(n_requests, n_rows=2):
    """Every request has as many rows that count as rows that do not."""
    successes = torch.tensor([True, False] * (n_requests * n_rows // 2))
    return successes, [str(i // n_rows) for i in range(n_requests * n_rows)]


@pytest.mark.parametrize("n_requests", [2, 20, 200])
def test_requests_that_all_have_one_rate_are_no_certainty(n_requests):
    found = clustered_rate(*half_works(n_requests), generator())
    by_request = wilson(n_requests // 2, n_requests)
    assert found.value == 0.5
    assert (found.low, found.high) == (by_request.low, by_request.high)


def test_one_request_that_differs_does_not_bring_certainty_back():
    successes, clusters = half_works(30)
    successes[1] = True
    found = clustered_rate(successes, clusters, generator())
    by_row = wilson(31, 60)
    # The bootstrap alone is narrower than 60 independent rows would be.
    alone = clustered_mean(successes.double(), clusters, generator())
    assert alone.high - alone.low < 0.5 * (by_row.high - by_row.low)
    assert (found.low, found.high) == (by_row.low, by_row.high)


def test_rows_that_agree_within_a_request_are_wider_than_independent_ones():
    successes = torch.tensor([True, False] * 10).repeat_interleave(4)
    clusters = [str(i // 4) for i in range(80)]
    found = clustered_rate(successes, clusters, generator())
    by_row = wilson(40, 80)
    assert found.low < by_row.low - 0.05
    assert found.high > by_row.high + 0.05


def test_a_mean_that_every_request_shares_has_the_width_of_its_rows():
    successes, clusters = half_works(25)
    found = clustered_mean(3 + successes.double(), clusters, generator())
    half = float(t.ppf(0.975, 24)) * 0.5 / 25**0.5
    assert found.value == 3.5
    assert found.low == pytest.approx(3.5 - half)
    assert found.high == pytest.approx(3.5 + half)


@pytest.mark.parametrize(("bounds", "at"), [((0.0, 1.0), 1.0), ((-1.0, 1.0), 0.0)])
def test_a_constant_has_the_width_that_its_bounds_allow(bounds, at):
    rows, clusters = torch.full((40,), at), [str(i // 2) for i in range(40)]
    found = clustered_mean(rows, clusters, generator(), bounds=bounds)
    share = wilson(20, 20) if at == 1 else wilson(10, 20)
    reach = bounds[1] - bounds[0]
    assert found.value == at
    assert found.low == pytest.approx(bounds[0] + reach * share.low)
    assert found.high == pytest.approx(bounds[0] + reach * share.high)
    unbounded = clustered_mean(rows, clusters, generator())
    assert require_width(unbounded).value is None
    assert "every row says the same" in require_width(unbounded).reason


def test_two_groups_that_never_vary_have_a_reason_and_no_difference():
    names = [str(i) for i in range(30)]
    same, other = torch.full((30,), 0.7), torch.full((30,), 0.2)
    found = mean_difference(same, names, other, names, generator())
    assert found.value is None
    assert found.reason


def test_perfect_calibration_is_no_certainty():
    labels, names = torch.arange(40) % 2 == 0, [str(i) for i in range(40)]
    found = calibration_error(labels.double(), labels, names, generator())
    for figure in found:
        assert figure[:2] == (0, 0)
        assert figure.high == pytest.approx(wilson(0, 40).high)


def test_the_rate_of_a_balanced_design_covers_and_is_never_certain(resamples):
    resamples(200)
    # One wrapper of a request works and one fails, but for chance.
    rng, draws = np.random.default_rng(13), generator(13)
    covered = 0
    for _ in range(200):
        rows = rng.random((15, 2)) < np.array([0.9, 0.1])
        successes = torch.from_numpy(rows).flatten()
        clusters = [str(i // 2) for i in range(30)]
        found = clustered_rate(successes, clusters, draws)
        covered += found.low <= 0.5 <= found.high
        assert found.high - found.low > 0.3
    assert covered / 200 >= 0.95


def test_one_request_has_a_rate_but_no_mean():
    successes = torch.tensor([True, False, True, True])
    rate = clustered_rate(successes, ["a"] * 4, generator())
    assert rate.value == 0.75
    assert rate.high - rate.low > 0.7
    mean = clustered_mean(successes.double(), ["a"] * 4, generator())
    assert mean.value is None
    assert "one base request" in mean.reason


def simulate(rng: np.random.Generator) -> tuple[torch.Tensor, list[str]]:
    shared = np.repeat(rng.normal(size=20), 6)
    values = torch.from_numpy(shared + 0.5 * rng.normal(size=120))
    return values, [str(i // 6) for i in range(120)]


def test_the_cluster_bootstrap_covers_and_one_that_ignores_clusters_does_not(resamples):
    resamples(300)
    rng, draws = np.random.default_rng(1), generator(1)
    clustered = naive = 0
    for _ in range(300):
        values, clusters = simulate(rng)
        rows = [str(i) for i in range(120)]
        found = clustered_mean(values, clusters, draws)
        wrong = clustered_mean(values, rows, draws)
        clustered += found.low <= 0 <= found.high
        naive += wrong.low <= 0 <= wrong.high
    # Nominal 95 %; the standard error of a coverage of 300 is 1.3 points.
    assert 0.91 <= clustered / 300 <= 0.985
    assert naive / 300 < 0.75


def test_the_clustered_rate_covers_on_few_correlated_requests(resamples):
    resamples(300)
    rng, draws = np.random.default_rng(2), generator(2)
    covered = 0
    for _ in range(300):
        rates = rng.beta(0.6, 1.4, size=25)
        successes = torch.from_numpy(rng.random((25, 4)) < rates[:, None]).flatten()
        clusters = [str(i // 4) for i in range(100)]
        found = clustered_rate(successes, clusters, draws)
        covered += found.low <= 0.3 <= found.high
    assert covered / 300 >= 0.91


def cluster_bootstrap(column, clusters, statistic, generator):
    """Any statistic of the rows that a resample holds, one resample at a time."""

    def weighted(weights):
        drawn = [column.repeat_interleave(row.long()) for row in weights]
        return torch.tensor([statistic(rows) for rows in drawn], dtype=torch.float64)

    return bootstrap(weighted, clusters, generator)


def test_the_bootstrap_of_any_statistic_agrees_with_the_fast_mean():
    values, clusters = simulate(np.random.default_rng(3))
    slow = cluster_bootstrap(
        values, clusters, lambda rows: float(rows.mean()), generator(4)
    )
    fast = clustered_mean(values, clusters, generator(4))
    assert slow[:4] == pytest.approx(fast[:4], rel=1e-12)
    median = cluster_bootstrap(
        values, clusters, lambda rows: float(rows.median()), generator(4)
    )
    assert median.low < float(values.median()) < median.high


def test_the_same_generator_gives_the_same_interval_and_another_does_not():
    values, clusters = simulate(np.random.default_rng(5))
    first = clustered_mean(values, clusters, generator(6))
    assert first == clustered_mean(values, clusters, generator(6))
    assert first != clustered_mean(values, clusters, generator(7))


def test_a_difference_between_paired_groups_is_narrower_than_between_strangers():
    rng = np.random.default_rng(8)
    base = torch.from_numpy(rng.normal(size=60))
    more = base + 0.5 + 0.1 * torch.from_numpy(rng.normal(size=60))
    names = [f"a{i}" for i in range(60)]
    strangers = [f"b{i}" for i in range(60)]
    paired = mean_difference(more, names, base, names, generator())
    unpaired = mean_difference(more, names, base, strangers, generator())
    assert paired.value == pytest.approx(float((more - base).mean()))
    assert paired.low > 0.4
    assert unpaired.low < 0.3
    assert unpaired.n == 120


def test_correlation_agrees_with_scipy():
    rng = np.random.default_rng(9)
    x = rng.normal(size=200)
    y = 0.6 * x + rng.normal(size=200)
    names = [str(i) for i in range(200)]
    found = pearson(torch.from_numpy(x), torch.from_numpy(y), names, generator())
    assert found.value == pytest.approx(pearsonr(x, y).statistic, abs=1e-12)
    expected = pearsonr(x, y).confidence_interval()
    assert found.low == pytest.approx(expected.low, abs=0.04)
    assert found.high == pytest.approx(expected.high, abs=0.04)


def test_correlation_with_noise_covers_zero_as_often_as_it_says(resamples):
    resamples(300)
    rng, draws = np.random.default_rng(11), generator(11)
    names = [str(i) for i in range(60)]
    covered = 0
    for _ in range(200):
        x, noise = torch.from_numpy(rng.normal(size=(2, 60)))
        found = pearson(x, noise, names, draws)
        covered += found.low <= 0 <= found.high
    assert 0.9 <= covered / 200 <= 0.99


def test_correlation_with_a_constant_is_undefined():
    x = torch.arange(30).double()
    found = pearson(x, torch.ones(30), [str(i) for i in range(30)], generator())
    assert found.value is None
    assert found.n == 30


def test_calibration_is_good_for_true_probabilities_and_bad_for_overconfident_ones():
    rng = np.random.default_rng(10)
    p = torch.from_numpy(rng.random(4000))
    y = torch.from_numpy(rng.random(4000)) < p
    names = [str(i) for i in range(4000)]
    good = calibration_error(p, y, names, generator())
    sure = (p > 0.5).double()
    bad = calibration_error(sure, y, names, generator())
    assert good.expected_error.value < 0.03
    assert good.brier.value == pytest.approx(1 / 6, abs=0.01)
    assert bad.expected_error.low > 0.2
    assert bad.brier.value == pytest.approx(float((sure - y.double()).square().mean()))


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(InputError, match="3 entries, one per row; found 2"):
        clustered_mean(torch.zeros(3), ["a", "b"], generator())
