"""Agreement between raters, against an independent implementation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from holdfast.errors import InputError
from holdfast.stats.agreement import confusion, kappa

LABELS = ("complied", "partial", "refused")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def own(n):
    return [str(row) for row in range(n)]


def noisy(n, share, seed=0):
    """Two raters who agree on `share` of the rows and else rate at random."""
    source = generator(seed)
    first = torch.randint(3, (n,), generator=source)
    other = torch.randint(3, (n,), generator=source)
    agree = torch.rand(n, generator=source) < share
    second = torch.where(agree, first, other)
    return [[LABELS[i] for i in rows.tolist()] for rows in (first, second)]


pairs = st.lists(
    st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=2, max_size=40
)


@given(pairs)
@settings(max_examples=60, deadline=None)
def test_kappa_is_that_of_sklearn(rows):
    first, second = [a for a, _ in rows], [b for _, b in rows]
    found = kappa(first, second, own(len(rows)), generator())
    if len({*first, *second}) == 1:
        assert found.value is None
    elif found.value is not None:
        assert found.value == pytest.approx(cohen_kappa_score(first, second))


@given(pairs)
@settings(max_examples=40, deadline=None)
def test_the_table_is_that_of_sklearn(rows):
    first, second = [a for a, _ in rows], [b for _, b in rows]
    expected = confusion_matrix(first, second, labels=LABELS)
    assert confusion(first, second, LABELS).tolist() == expected.tolist()


def test_three_way_kappa_sees_what_two_way_kappa_does_not():
    first, second = ["a", "b", "c", "c"] * 10, ["b", "a", "c", "c"] * 10
    two = [["c" if x == "c" else "rest" for x in rows] for rows in (first, second)]
    assert kappa(*two, own(40), generator()).value == pytest.approx(1)
    # Agreement 1/2, by chance 1/16 + 1/16 + 1/4 = 3/8: (1/2 - 3/8) / (5/8).
    assert kappa(first, second, own(40), generator()).value == pytest.approx(0.2)


def test_raters_at_random_agree_no_better_than_chance():
    found = kappa(*noisy(600, 0.0), own(600), generator())
    assert found.low < 0 < found.high
    assert abs(found.value) < 0.1


def test_the_interval_holds_the_truth_about_as_often_as_it_says(resamples):
    resamples(300)
    # By construction kappa is the share of rows on which the second rater copies.
    held = 0
    for seed in range(60):
        found = kappa(*noisy(150, 0.6, seed), own(150), generator())
        held += found.low <= 0.6 <= found.high
    assert held >= 51


def test_rows_of_one_request_do_not_count_as_many():
    first, second = noisy(60, 0.6)
    alone = kappa(first, second, own(60), generator())
    copies = kappa(first * 4, second * 4, own(60) * 4, generator())
    assert copies.value == pytest.approx(alone.value)
    assert copies.high - copies.low == pytest.approx(alone.high - alone.low, abs=0.02)
    blind = kappa(first * 4, second * 4, own(240), generator())
    assert blind.high - blind.low < 0.7 * (alone.high - alone.low)


def test_the_same_generator_gives_the_same_interval():
    raters = noisy(80, 0.5)
    one = kappa(*raters, own(80), generator(3))
    assert one == kappa(*raters, own(80), generator(3))
    assert one != kappa(*raters, own(80), generator(4))


def test_one_label_for_everything_is_no_perfect_agreement():
    found = kappa(["refused"] * 9, ["refused"] * 9, own(9), generator())
    assert found.value is None
    assert "not defined" in found.reason


def test_no_rows_give_a_reason():
    assert kappa([], [], [], generator()).reason == "there are no rows"


def test_raters_of_different_rows_are_refused():
    with pytest.raises(InputError, match="2 entries"):
        kappa(["a", "b"], ["a"], own(2), generator())


def test_an_unknown_label_is_named():
    with pytest.raises(InputError, match="degenerate"):
        confusion(["refused"], ["degenerate"], LABELS)
