"""Anchors: whose mean they are, what is counted, and when there are none."""

import pytest
import torch

from holdfast.dynamics.anchors import (
    cosine_distance,
    fit_anchors,
    separation,
    topic_length_strata,
)
from holdfast.errors import EvidenceError, InputError, TooFewExamplesError

HARMFUL = torch.tensor([False] * 4 + [True] * 4)
REFUSED = torch.tensor([False, False, False, True, True, True, True, False])


def states(seed: int = 0, n: int = 8, steps: int = 3, width: int = 5):
    return torch.randn(n, steps, width, generator=torch.Generator().manual_seed(seed))


def names(n: int = 8):
    return [str(row) for row in range(n)]


def test_anchors_are_the_means_of_complied_harmless_and_refused_harmful_rows():
    rows = states()
    found = fit_anchors(rows, HARMFUL, REFUSED, clusters=names(), min_count=3)
    torch.testing.assert_close(found.compliant, rows[:3].mean(0))
    torch.testing.assert_close(found.refused, rows[4:7].mean(0))
    assert (found.n_compliant, found.n_refused) == (3, 3)


def test_without_the_filter_outcomes_are_not_looked_at():
    rows = states()
    found = fit_anchors(
        rows, HARMFUL, REFUSED, clusters=names(), filtered=False, min_count=4
    )
    torch.testing.assert_close(found.compliant, rows[:4].mean(0))
    torch.testing.assert_close(found.refused, rows[4:].mean(0))


def test_too_few_refusals_are_refused_with_the_counts():
    with pytest.raises(TooFewExamplesError, match="3 complied with and 3 refused"):
        fit_anchors(states(), HARMFUL, REFUSED, clusters=names(), min_count=4)
    nobody = torch.zeros(8, dtype=torch.bool)
    with pytest.raises(TooFewExamplesError, match=r"0 refused.*do not filter"):
        fit_anchors(states(), HARMFUL, nobody, clusters=names(), min_count=1)


def test_rows_are_counted_by_request():
    # Three refusals of one request are one refusal.
    clusters = ["a", "b", "c", "d", "e", "e", "e", "f"]
    with pytest.raises(TooFewExamplesError, match="3 complied with and 1 refused"):
        fit_anchors(states(), HARMFUL, REFUSED, clusters=clusters, min_count=2)


def test_anchors_that_coincide_at_one_step_are_refused():
    rows = states()
    rows[:, 1] = 1.0
    with pytest.raises(EvidenceError, match="at step 2"):
        fit_anchors(rows, HARMFUL, REFUSED, clusters=names(), min_count=3)


def test_a_state_that_is_not_finite_is_refused():
    rows = states()
    rows[2, 0, 0] = float("nan")
    with pytest.raises(InputError, match="finite"):
        fit_anchors(rows, HARMFUL, REFUSED, clusters=names(), min_count=3)


def confounded(n: int = 400):
    """Harmful requests are mostly of topic b; the second axis is the topic alone."""
    draws = torch.Generator().manual_seed(3)
    harmful = torch.arange(n) % 2 == 0
    topic = torch.rand(n, generator=draws) < torch.where(harmful, 0.9, 0.1)
    rows = torch.stack([harmful.float(), 2 * topic.float(), torch.ones(n)], 1)
    return rows[:, None, :], harmful, ["b" if each else "a" for each in topic.tolist()]


def test_matched_anchors_do_not_tell_topics_apart_and_others_do():
    rows, harmful, topics = confounded()
    strata = topic_length_strata(topics, [7] * len(topics))
    clusters = names(len(topics))
    plain = fit_anchors(rows, harmful, harmful, clusters=clusters)
    matched = fit_anchors(rows, harmful, harmful, clusters=clusters, strata=strata)
    difference = (plain.refused - plain.compliant)[0]
    assert difference[1] > 1.2
    torch.testing.assert_close(
        (matched.refused - matched.compliant)[0], torch.tensor([1.0, 0.0, 0.0])
    )


def test_strata_with_one_side_alone_are_left_out_and_can_leave_nothing():
    rows = states()
    strata = ["a", "a", "a", "a", "a", "a", "b", "b"]
    found = fit_anchors(
        rows, HARMFUL, REFUSED, clusters=names(), strata=strata, min_count=2
    )
    torch.testing.assert_close(found.refused, rows[4:6].mean(0))
    assert found.n_refused == 2
    apart = ["a"] * 4 + ["b"] * 4
    with pytest.raises(TooFewExamplesError, match="0 complied with and 0 refused"):
        fit_anchors(rows, HARMFUL, REFUSED, clusters=names(), strata=apart)


def test_strata_are_topics_and_quarters_of_length():
    found = topic_length_strata(["a"] * 8, list(range(8)))
    assert found == ["a/0", "a/0", "a/1", "a/1", "a/2", "a/2", "a/3", "a/3"]
    assert topic_length_strata(["a", None], [5, 5]) == ["a/0", "None/0"]
    assert topic_length_strata([], []) == []


def test_the_distance_is_one_minus_the_cosine_and_exact_where_it_is_small():
    first, second = torch.randn(2, 20, 6, dtype=torch.float64).unbind()
    expected = 1 - torch.cosine_similarity(first, second, dim=-1)
    torch.testing.assert_close(cosine_distance(first, second), expected)
    # 1 - cos in float32 would be 0 here; the true distance is angle squared / 2.
    near = torch.tensor([1.0, 1e-4])
    found = float(cosine_distance(torch.tensor([1.0, 0.0]), near))
    assert found == pytest.approx(5e-9, rel=1e-3)


def test_separation_of_opposite_anchors_is_two():
    rows = torch.cat([torch.ones(20, 1, 4), -torch.ones(20, 1, 4)])
    harmful = torch.arange(40) >= 20
    found = fit_anchors(rows, harmful, harmful, clusters=names(40))
    torch.testing.assert_close(separation(found), torch.tensor([2.0]).double())
