"""AUROC against scikit-learn, and what strata take out of it."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from holdfast.stats.auroc import auroc, auroc_interval

torch.set_num_threads(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_agrees_with_scikit_learn(ties):
    rng = np.random.default_rng(0)
    labels = rng.random(300) < 0.3
    scores = rng.normal(size=300) + labels
    scores = np.round(scores) if ties else scores
    found = auroc(torch.from_numpy(scores), torch.from_numpy(labels))
    assert found == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auroc_of_one_class_is_no_number():
    scores, labels = torch.rand(5, generator=generator()), torch.ones(5).bool()
    assert auroc(scores, labels) != auroc(scores, labels)
    found = auroc_interval(scores, labels, list("abcde"), generator())
    assert found.value is None
    assert "both classes" in found.reason


def test_scores_of_random_labels_have_an_interval_that_covers_one_half():
    rng = np.random.default_rng(1)
    scores, labels = torch.from_numpy(rng.random(200)), torch.arange(200) % 2 == 0
    found = auroc_interval(scores, labels, [str(i) for i in range(200)], generator())
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.25


def test_perfect_separation_is_no_certainty():
    scores = torch.cat([torch.zeros(15), torch.ones(15)])
    labels = scores.bool()
    found = auroc_interval(scores, labels, [str(i) for i in range(30)], generator())
    assert (found.value, found.high) == (1, 1)
    assert 0.75 < found.low < 0.95
    other = auroc_interval(-scores, labels, [str(i) for i in range(30)], generator())
    assert (other.value, other.low) == (0, 0)
    assert other.high == pytest.approx(1 - found.low, abs=1e-6)


def test_the_auroc_interval_covers_with_clusters_and_not_without(resamples):
    resamples(200)
    # The score is shared by a request's rows, and so is the label.
    rng, draws = np.random.default_rng(2), generator(2)
    covered = naive = 0
    truth = 0.7602  # Phi(1 / sqrt 2), the AUROC of unit normals one apart.
    for _ in range(200):
        labels = np.repeat(np.arange(40) % 2 == 0, 5)
        scores = np.repeat(rng.normal(size=40), 5) + labels
        columns = torch.from_numpy(scores), torch.from_numpy(labels)
        clusters = [str(i // 5) for i in range(200)]
        found = auroc_interval(*columns, clusters, draws)
        rows = [str(i) for i in range(200)]
        wrong = auroc_interval(*columns, rows, draws)
        covered += found.low <= truth <= found.high
        naive += wrong.low <= truth <= wrong.high
    assert 0.9 <= covered / 200 <= 0.995
    assert naive / 200 < 0.75


def wrappers(rng: np.random.Generator):
    """Rows of two wrappers, one of which mostly works."""
    wrapper = np.arange(400) % 2
    labels = rng.random(400) < np.where(wrapper == 1, 0.9, 0.1)
    clusters = [str(i // 4) for i in range(400)]
    return wrapper, labels, [str(w) for w in wrapper], clusters


def test_a_score_that_only_knows_the_wrapper_is_found_out_by_strata():
    rng = np.random.default_rng(3)
    wrapper, labels, strata, clusters = wrappers(rng)
    scores = torch.from_numpy(wrapper.astype(float))
    outcome = torch.from_numpy(labels)
    plain = auroc_interval(scores, outcome, clusters, generator())
    within = auroc_interval(scores, outcome, clusters, generator(), strata)
    assert plain.low > 0.8
    assert within.value == 0.5
    noisy = scores + 0.1 * torch.from_numpy(rng.normal(size=400))
    within = auroc_interval(noisy, outcome, clusters, generator(), strata)
    assert within.low < 0.5 < within.high


def test_a_score_that_knows_the_outcome_survives_strata():
    rng = np.random.default_rng(4)
    _, labels, strata, clusters = wrappers(rng)
    scores = torch.from_numpy(2.0 * labels + rng.normal(size=400))
    outcome = torch.from_numpy(labels)
    found = auroc_interval(scores, outcome, clusters, generator(), strata)
    # Pairs pooled over strata, by the definition.
    wins = pairs = 0.0
    for name in ("0", "1"):
        here = np.array(strata) == name
        p, n = scores[here & labels], scores[here & ~labels]
        wins += float((p[:, None] > n[None, :]).sum())
        pairs += len(p) * len(n)
    assert found.value == pytest.approx(wins / pairs, abs=1e-12)
    assert found.low > 0.8


def test_strata_of_one_class_each_say_nothing():
    labels = torch.arange(40) < 20
    strata = ["works" if label else "fails" for label in labels]
    clusters = [str(i) for i in range(40)]
    found = auroc_interval(labels.double(), labels, clusters, generator(), strata)
    assert found.value is None
    assert "no stratum" in found.reason


def test_two_requests_in_a_class_are_too_few_for_an_interval():
    labels = torch.arange(60) < 2
    scores = torch.rand(60, generator=generator())
    found = auroc_interval(scores, labels, [str(i) for i in range(60)], generator())
    assert found.value is None
    assert "too few base requests" in found.reason
