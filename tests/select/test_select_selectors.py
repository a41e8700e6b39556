import random

import numpy as np
import pytest

from holdfast.errors import SettingsError
from holdfast.select.selectors import (
    BestOfStream,
    distinct,
    holm,
    quotas,
    uniform_score,
)


def stream(rows, n, cuts):
    found = BestOfStream(n)
    for part in cuts(rows):
        score, tie, row = zip(*part, strict=True)
        found.update(
            np.array(score),
            np.array(tie),
            np.array(row),
        )
    return found.best()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 7, 900, 5000])
def test_a_stream_gives_what_sorting_everything_gives(seed, size):
    chance = random.Random(seed)
    rows = [
        (
            float("nan") if chance.random() < 0.1 else float(chance.randint(0, 30)),
            chance.randint(0, 200),
            row,
        )
        for row in range(5000)
    ]
    n = chance.choice([1, 40, 700, 5000])
    scored = [row for row in rows if row[0] == row[0]]
    oracle = sorted(scored, key=lambda row: (-row[0], row[1], row[2]))
    found = stream(
        rows, n, lambda all_: [all_[i : i + size] for i in range(0, len(all_), size)]
    )
    assert found.rows.tolist() == [row[2] for row in oracle[:n]]
    assert found.scores.tolist() == [row[0] for row in oracle[:n]]
    assert found.n_scored == len(scored)
    left = [row for row in oracle[n:] if oracle[n - 1][0] == row[0]]
    assert found.n_tied == len(left)


def test_no_row_is_held_beyond_what_may_be_chosen():
    found = BestOfStream(10)
    for start in range(0, 100_000, 1000):
        rows = np.arange(start, start + 1000)
        found.update(rows.astype(float), rows, rows)
        assert len(found._rows) <= 2 * 10 + 1024 + 1000
    assert found.best().rows.tolist() == list(range(99_999, 99_989, -1))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_near_copies_are_those_that_all_pairs_show(threshold):
    chance = random.Random(3)
    items = [
        frozenset(chance.sample(range(14), chance.randint(1, 9))) for _ in range(300)
    ]
    kept = []
    for place, item in enumerate(items):
        near = [
            k for k in kept if len(item & items[k]) / len(item | items[k]) >= threshold
        ]
        if not near:
            kept.append(place)
    found = distinct(items, len(items), threshold)
    assert list(found.kept) == kept
    assert len(found.kept) + len(found.passed) == len(items)
    for place, twin in found.passed:
        assert twin < place
        assert len(items[place] & items[twin]) / len(items[place] | items[twin]) >= (
            threshold
        )


def test_different_items_are_all_kept_and_no_more_than_asked_for():
    items = [frozenset({i, i + 1000}) for i in range(20)]
    assert distinct(items, 20, 0.8).passed == ()
    assert distinct(items, 5, 0.8).kept == (0, 1, 2, 3, 4)
    with pytest.raises(SettingsError, match="similarity"):
        distinct(items, 5, 0.0)


def test_quotas_are_proportional_or_equal_and_sum_to_the_budget():
    counts = {"a": 700, "b": 200, "c": 99, "d": 1}
    assert quotas(counts, 10, "proportional") == {"a": 7, "b": 2, "c": 1, "d": 0}
    assert quotas(counts, 40, "equal") == {"a": 13, "b": 13, "c": 13, "d": 1}
    for budget in range(1, 1001, 37):
        for rule in ("equal", "proportional"):
            given = quotas(counts, budget, rule)
            assert sum(given.values()) == budget
            assert all(given[name] <= counts[name] for name in counts)
    assert quotas(counts, 5000, "equal") == counts


def test_holm_is_the_textbook_example_and_never_below_the_plain_value():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.5, 0.6]) == pytest.approx((1.0, 1.0))
    assert holm([]) == ()
    # A single test needs no correction, and four equal ones are Bonferroni's.
    assert holm([0.04]) == (0.04,)
    assert holm([0.02] * 4) == pytest.approx((0.08,) * 4)


def test_random_scores_are_the_hash_itself():
    found = [uniform_score(value) for value in (0, 2**63, 2**64 - 2**11)]
    assert found == pytest.approx([0.0, 0.5, 1.0], abs=1e-12)
