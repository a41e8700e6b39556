"""The probe against scikit-learn, and what it must not find."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from holdfast.cliff.probe import fit_probe, fit_stratified_probe
from holdfast.errors import TooFewExamplesError
from holdfast.stats.auroc import auroc, auroc_interval

torch.set_num_threads(1)


def data(n: int, width: int, shift: float, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.35
    spread = rng.uniform(0.1, 10, size=width)
    states = (rng.normal(size=(n, width)) + 3) * spread
    states[:, 0] += shift * labels * spread[0]
    names = [str(i // 2) for i in range(n)]
    return torch.from_numpy(states), torch.from_numpy(labels), names


@pytest.mark.parametrize("width", [8, 160])
@pytest.mark.parametrize("l2", [0.01, 1.0])
def test_the_probe_is_scikit_learns_logistic_regression(width, l2):
    states, labels, clusters = data(120, width, 2.0)
    probe = fit_probe(states, labels, clusters=clusters, seed=0, l2_grid=[l2])
    inputs = (states - states.mean(0)) / states.std(0, correction=0)
    oracle = LogisticRegression(
        C=1 / (l2 * 120), class_weight="balanced", tol=1e-10, max_iter=10_000
    ).fit(inputs.numpy(), labels.numpy())
    np.testing.assert_allclose(probe.weight, oracle.coef_[0], atol=2e-5)
    expected = oracle.decision_function(inputs.numpy())
    np.testing.assert_allclose(probe.logit(states), expected, atol=2e-4)


def test_the_raw_form_gives_the_same_logits():
    states, labels, clusters = data(100, 12, 2.0)
    probe = fit_probe(states, labels, clusters=clusters, seed=0)
    direction, offset = probe.raw()
    torch.testing.assert_close(states @ direction + offset, probe.logit(states))
    batch = states.reshape(4, 25, 12).float()
    expected = torch.sigmoid(probe.logit(states)).reshape(4, 25)
    torch.testing.assert_close(probe.score(batch), expected, atol=1e-5, rtol=0)


def test_the_fit_does_not_depend_on_the_units_of_the_states():
    states, labels, clusters = data(100, 12, 2.0)
    first = fit_probe(states, labels, clusters=clusters, seed=0)
    units = torch.logspace(-3, 3, 12).double()
    second = fit_probe(states * units + 5, labels, clusters=clusters, seed=0)
    assert first.l2 == second.l2
    expected = first.logit(states)
    torch.testing.assert_close(
        second.logit(states * units + 5), expected, atol=1e-4, rtol=1e-4
    )


def test_a_probe_on_random_labels_predicts_nothing_and_one_on_real_ones_does():
    for shift in (0.0, 3.0):
        train = data(200, 20, shift, seed=1)
        states, labels, clusters = data(200, 20, shift, seed=2)
        # Other units in the test set would be another distribution.
        states = states / states.std(0) * train[0].std(0)
        states = states - states[~labels].mean(0) + train[0][~train[1]].mean(0)
        probe = fit_probe(train[0], train[1], clusters=train[2], seed=0)
        draws = torch.Generator().manual_seed(0)
        found = auroc_interval(probe.logit(states), labels, clusters, draws)
        if shift:
            assert found.low > 0.9
        else:
            assert found.low < 0.5 < found.high


def test_noise_gets_a_larger_penalty_than_signal():
    noise = data(100, 60, 0.0, seed=3)
    signal = data(100, 60, 6.0, seed=3)
    l2 = [
        fit_probe(states, labels, clusters=clusters, seed=0).l2
        for states, labels, clusters in (noise, signal)
    ]
    assert l2[0] == 10.0
    assert l2[1] < l2[0]


def test_folds_keep_requests_whole():
    # Rows of a request are copies with a label of chance. Were they dealt to several
    # folds, the held-out copies would be recognised and a small penalty would win.
    rng = np.random.default_rng(4)
    states = torch.from_numpy(np.repeat(rng.normal(size=(30, 80)), 6, axis=0))
    labels = torch.from_numpy(np.repeat(rng.random(30) < 0.5, 6))
    whole = fit_probe(
        states, labels, clusters=[str(i // 6) for i in range(180)], seed=0
    )
    torn = fit_probe(states, labels, clusters=[str(i) for i in range(180)], seed=0)
    assert whole.l2 > torn.l2


def test_a_seed_fixes_the_probe_and_a_constant_coordinate_does_no_harm():
    states, labels, clusters = data(100, 12, 2.0)
    states[:, 5] = 7.0
    first = fit_probe(states, labels, clusters=clusters, seed=3)
    second = fit_probe(states, labels, clusters=clusters, seed=3)
    assert torch.equal(first.weight, second.weight)
    assert first.weight[5] == 0
    assert first.scale[5] == 1


def test_too_few_requests_of_a_class_are_refused_with_the_counts():
    states, _, clusters = data(40, 4, 0.0)
    labels = torch.arange(40) < 6
    with pytest.raises(TooFewExamplesError, match="3 positive and 17 negative"):
        fit_probe(states, labels, clusters=clusters, seed=0)


def wrapped(seed: int):
    """Coordinate 0 knows the wrapper, coordinate 1 (weakly) the outcome."""
    rng = np.random.default_rng(seed)
    wrapper = np.arange(600) % 3
    labels = rng.random(600) < np.array([0.1, 0.5, 0.9])[wrapper]
    states = rng.normal(size=(600, 10))
    states[:, 0] += 4.0 * wrapper
    states[:, 1] += 1.5 * labels
    names = [str(i // 3) for i in range(600)]
    strata = [str(w) for w in wrapper]
    return torch.from_numpy(states), torch.from_numpy(labels), strata, names


def test_the_control_probe_reads_the_outcome_where_the_plain_one_reads_the_wrapper():
    states, labels, strata, clusters = wrapped(0)
    plain = fit_probe(states, labels, clusters=clusters, seed=0)
    control = fit_stratified_probe(states, labels, strata, clusters=clusters, seed=0)
    assert plain.weight[0] > 0.8 * plain.weight[1]
    assert abs(control.weight[0]) < 0.25 * control.weight[1]
    new, outcome, their_strata, names = wrapped(1)
    draws = torch.Generator().manual_seed(0)
    found = auroc_interval(control.logit(new), outcome, names, draws, their_strata)
    assert found.low > 0.75
    assert auroc(plain.logit(new), outcome) > 0.85


def test_the_control_probe_finds_nothing_when_only_the_wrapper_tells():
    states, labels, strata, clusters = wrapped(0)
    new, outcome, their_strata, names = wrapped(1)
    states[:, 1] -= 1.5 * labels
    new[:, 1] -= 1.5 * outcome
    control = fit_stratified_probe(states, labels, strata, clusters=clusters, seed=0)
    draws = torch.Generator().manual_seed(0)
    found = auroc_interval(control.logit(new), outcome, names, draws, their_strata)
    assert found.low < 0.5 < found.high


def test_a_control_probe_without_a_mixed_stratum_is_refused():
    states, labels, clusters = data(60, 4, 1.0)
    strata = [str(bool(label)) for label in labels]
    with pytest.raises(TooFewExamplesError, match="2 strata with one class each"):
        fit_stratified_probe(states, labels, strata, clusters=clusters, seed=0)
