"""Means of many columns: the same as one by one, and honest where nothing varies."""

import pytest
import torch
from scipy.stats import norm, t

from holdfast.heads.checks import excess_over_controls
from holdfast.stats.bootstrap import bootstrap_means
from holdfast.stats.rates import clustered_mean

Z = float(norm.ppf(0.975))


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_each_column_is_what_it_is_by_itself():
    values = torch.randn(30, 4, generator=_generator(1)).double()
    values[:, 2] = torch.tensor([1.0, 3.0] * 15)
    names = [str(i // 2) for i in range(30)]
    for bounds in (None, (-9.0, 9.0)):
        found = bootstrap_means(values, names, _generator(), bounds=bounds)
        for column, each in zip(values.T, found, strict=True):
            alone = clustered_mean(column, names, _generator(), bounds=bounds)
            assert each == pytest.approx(alone)


def test_requests_of_one_mean_have_the_width_of_their_rows():
    """Student's interval over rows, with as many draws as there are requests."""
    values = torch.tensor([[1.0], [3.0]] * 12)
    [found] = bootstrap_means(values, [str(i // 2) for i in range(24)], _generator())
    half = float(t.ppf(0.975, 11)) * (1 / 12) ** 0.5
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))


@pytest.mark.parametrize("n", [10, 48])
def test_a_constant_with_bounds_has_wilsons_width(n):
    """No difference of 0 and 1 was seen: the bound is that of an even coin's range."""
    names = [str(i) for i in range(n)]
    columns = torch.zeros(n, 2)
    columns[:, 1] = 1
    still, all_of_them = bootstrap_means(
        columns, names, _generator(), bounds=(-1.0, 1.0)
    )
    half = Z / (1 + Z * Z / n) * (0.25 / n + Z * Z / (4 * n * n)) ** 0.5
    assert (still.low, still.high) == pytest.approx((-2 * half, 2 * half))
    assert all_of_them.high == 1
    assert all_of_them.low == pytest.approx(2 / (1 + Z * Z / n) - 1)


def test_a_head_that_writes_nothing_contributes_nothing_and_proves_nothing():
    names = [str(i) for i in range(20)]
    [found] = bootstrap_means(torch.zeros(20, 1), names, _generator())
    assert (found.value, found.low, found.high) == (0, 0, 0)
    alike = torch.full((20,), 0.25)
    beyond = excess_over_controls(alike, torch.zeros(20, 1), names, _generator())
    assert beyond.value is None
    assert "says the same" in beyond.reason
    apart = alike + 0.01 * torch.randn(20, generator=_generator(2))
    assert excess_over_controls(apart, torch.zeros(20, 1), names, _generator()).low > 0


def test_no_rows_and_one_request_give_no_interval():
    assert bootstrap_means(torch.zeros(0, 2), [], _generator())[1].value is None
    [found] = bootstrap_means(torch.zeros(3, 1), ["a"] * 3, _generator())
    assert "one base request" in found.reason
