"""Aligned curves: no padding, and the count at every offset."""

import pytest
import torch

from holdfast.cliff.cliff import Trace, aligned_mean

torch.set_num_threads(1)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def one(length: int, level: float, name: str) -> Trace:
    """A trace with 3 prompt tokens at 0, a flat thinking, and 2 tokens of template."""
    scores = torch.cat([torch.zeros(3), torch.full((length,), level), torch.zeros(2)])
    return Trace(scores, 3, 3 + length, name)


def test_a_flat_group_of_different_lengths_stays_flat():
    traces = [one(length, 0.8, str(length)) for length in (5, 10, 20, 40)]
    curve = aligned_mean(traces, generator(), (-40, 4))
    thinking = [point for point in curve if point.offset < 0]
    assert all(point.mean == pytest.approx(0.8) for point in thinking)
    assert [point.n for point in thinking[::10]] == [1, 1, 2, 2 + 1][:4]
    assert [point.n for point in curve if point.offset >= 0] == [4, 4, 0, 0]
    assert curve[40].mean == 0


def test_offsets_that_no_row_has_are_null_and_single_requests_have_no_band():
    curve = aligned_mean([one(5, 0.8, "a"), one(3, 0.4, "a")], generator(), (-6, 1))
    assert curve[0] == (-6, None, None, None, 0)
    assert curve[1][1:4] == (pytest.approx(0.8), None, None)
    assert curve[3].mean == pytest.approx(0.6)
    assert curve[3].low is None
    assert curve[3].n == 2


def test_the_band_holds_the_mean_and_shrinks_with_more_requests():
    def band(n: int) -> float:
        traces = [one(4, 0.3 + 0.4 * (i % 2), str(i)) for i in range(n)]
        point = aligned_mean(traces, generator(), (-1, 0))[0]
        assert point.low < point.mean < point.high
        return point.high - point.low

    assert band(80) < 0.6 * band(20)
