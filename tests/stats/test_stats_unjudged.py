"""Rates over rows without a verdict: what every way of reading them would give."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.stats.rates import clustered_rate
from holdfast.stats.unjudged import judged_difference, judged_mean


def flags(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def draws():
    return torch.Generator().manual_seed(7)


def names(n):
    return [str(row) for row in range(n)]


def test_where_every_row_has_a_verdict_nothing_is_different():
    successes = flags(1, 0, 1, 0, 1, 1)
    clusters = ["a", "a", "b", "b", "c", "c"]
    found = judged_mean(successes, torch.zeros_like(successes), clusters, draws())
    assert found == clustered_rate(successes, clusters, draws())
    assert (found.bounds, found.n_unjudged) == (None, 0)


def test_a_rate_of_nothing_judged_is_no_number():
    unjudged = flags(1, 1, 1)
    found = judged_mean(flags(0, 0, 0), unjudged, names(3), draws())
    assert (found.value, found.low, found.high) == (None, None, None)
    assert found.reason == "none of 3 answers could be judged"
    assert found.bounds is None


def test_few_rows_without_a_verdict_widen_a_rate():
    successes = flags(*[1] * 10, *[0] * 30)
    unjudged = flags(*[0] * 38, 1, 1)
    found = judged_mean(successes, unjudged, names(40), draws())
    least = clustered_rate(successes, names(40), draws())
    most = clustered_rate(successes | unjudged, names(40), draws())
    assert found.bounds == (10 / 40, 12 / 40)
    assert (found.low, found.high) == (least.low, most.high)
    assert found.n_unjudged == 2


def test_more_of_them_than_chance_leaves_open_turn_it():
    unjudged = flags(*[1] * 20, *[0] * 20)
    found = judged_mean(torch.zeros(40).bool(), unjudged, names(40), draws())
    assert found.value is None
    assert found.bounds == (0.0, 0.5)
    assert found.reason == "20 of 40 answers could not be judged"


cells = st.lists(
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    min_size=2,
    max_size=7,
)


@settings(max_examples=40, deadline=None)
@given(cells)
def test_every_way_of_reading_the_rows_lies_within_the_bounds(rows):
    after, before, open_after, open_before = (
        flags(*column) for column in zip(*rows, strict=True)
    )
    found = judged_difference(
        after, before, open_after, open_before, names(len(rows)), draws()
    )
    if open_after.all() or open_before.all():
        assert found.value is None
        return
    ways = []
    for said in product(
        [False, True], repeat=int(open_after.sum() + open_before.sum())
    ):
        one, two = after.clone(), before.clone()
        split = int(open_after.sum())
        one[open_after] = flags(*said[:split])
        two[open_before] = flags(*said[split:])
        ways.append(float((one.double() - two.double()).mean()))
    least, most = found.bounds or (found.value, found.value)
    assert (least, most) == (pytest.approx(min(ways)), pytest.approx(max(ways)))
    if found.value is not None:
        assert found.low <= least
        assert most <= found.high


def test_a_mean_counts_missing_scores_as_anything():
    scores = torch.tensor([0.25, 0.75, 0.5, 0.5, 0.0], dtype=torch.float64)
    found = judged_mean(scores, flags(0, 0, 0, 0, 1), names(5), draws())
    assert found.bounds == (pytest.approx(2 / 5), pytest.approx(3 / 5))
