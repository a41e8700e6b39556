"""Detectors against independent oracles, and what each must not find."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

from holdfast.dynamics.trajectories import recovery_features
from holdfast.errors import InputError, TooFewExamplesError
from holdfast.guard.autoencoder import fit_autoencoder, layers, reconstruct
from holdfast.guard.detector import SeriesReading
from holdfast.guard.detectors import CANDIDATES, fit_detectors, restore
from holdfast.guard.gaussian import (
    fit_features,
    fit_mahalanobis,
    fit_residual,
    ledoit_wolf,
)
from holdfast.stats.auroc import auroc

T = 12


def benign(n: int, seed: int, steps: int = T):
    """Smooth trajectories near 1, with one random wave each."""
    draws = torch.Generator().manual_seed(seed)
    grid = torch.linspace(0, 3, steps)
    size = 0.1 * torch.rand(n, 1, generator=draws)
    phase = torch.randn(n, 1, generator=draws)
    noise = 0.01 * torch.randn(n, steps, generator=draws)
    return 0.85 + size * torch.sin(grid + phase) + noise


def wavering(n: int, seed: int, steps: int = T):
    """The same, with a dip in the middle that comes back."""
    rows = benign(n, seed, steps)
    rows[:, steps // 3 : steps // 2] -= 0.4
    return rows


def names(n):
    return [str(row) for row in range(n)]


@pytest.mark.parametrize("n", [15, 400])
def test_the_shrunk_covariance_is_scikit_learns(n):
    rows = benign(n, 0).double()
    rows = rows - rows.mean(0)
    oracle = LedoitWolf(assume_centered=True).fit(rows.numpy())
    found = ledoit_wolf(rows)
    np.testing.assert_allclose(found.matrix, oracle.covariance_, rtol=1e-9)
    assert found.shrinkage == pytest.approx(oracle.shrinkage_)


def test_mahalanobis_is_the_quadratic_form_also_in_the_first_steps():
    train, rows = benign(60, 1), wavering(5, 2).double()
    found = fit_mahalanobis(train, "compliance")
    centred = train.double() - train.double().mean(0)
    covariance = torch.from_numpy(
        LedoitWolf(assume_centered=True).fit(centred.numpy()).covariance_
    )
    for steps in (1, 5, T):
        away = (rows - train.double().mean(0))[:, :steps]
        inverse = torch.linalg.inv(covariance[:steps, :steps])
        expected = torch.einsum("es,st,et->e", away, inverse, away)
        torch.testing.assert_close(found.at(rows, steps), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps", [4, 7, T])
def test_the_residual_is_that_of_scikit_learns_components(steps):
    train, rows = benign(80, 3), wavering(6, 4)
    found = fit_residual(train, "compliance", n_components=4)
    kept = 4 * steps // T
    oracle = PCA(n_components=kept).fit(train[:, :steps].double().numpy())
    given = oracle.inverse_transform(oracle.transform(rows[:, :steps].numpy()))
    expected = ((rows[:, :steps].double().numpy() - given) ** 2).sum(1)
    np.testing.assert_allclose(found.at(rows, steps), expected, rtol=1e-6)


def test_feature_distance_knows_the_features_of_each_prefix():
    train, rows = benign(70, 5), wavering(4, 6)
    found = fit_features(train, "compliance")
    for steps in (1, 6, T):
        columns = recovery_features(train[:, :steps]).columns().numpy()
        deviation = np.maximum(columns.std(0), 0.05)
        scaled = (columns - columns.mean(0)) / deviation
        oracle = LedoitWolf(assume_centered=True).fit(scaled)
        matrix = oracle.covariance_ + np.eye(5) * max(
            0.0, 1e-6 - float((scaled**2).mean())
        )
        away = recovery_features(rows[:, :steps]).columns().numpy()
        away = (away - columns.mean(0)) / deviation
        expected = np.einsum("es,st,et->e", away, np.linalg.inv(matrix), away)
        np.testing.assert_allclose(found.at(rows, steps), expected, rtol=1e-6)


def test_the_autoencoder_has_the_published_layers():
    sizes = layers(32, (32, 8, 32))
    assert [tuple(each) for each in sizes] == [(32, 32), (32, 8), (8, 32), (32, 32)]
    found = fit_autoencoder(benign(120, 7, 32), "compliance", seed=0, epochs=1)
    assert len(found.parameters) == 2664


def test_the_autoencoder_is_the_same_network_written_out():
    found = fit_autoencoder(benign(60, 8), "compliance", seed=3, epochs=5)
    network = torch.nn.Sequential(
        torch.nn.Linear(T, 32),
        torch.nn.ReLU(),
        torch.nn.Linear(32, 8),
        torch.nn.ReLU(),
        torch.nn.Linear(8, 32),
        torch.nn.ReLU(),
        torch.nn.Linear(32, T),
    )
    torch.nn.utils.vector_to_parameters(found.parameters, network.parameters())
    rows = wavering(9, 9)
    with torch.no_grad():
        given = network(rows)
    torch.testing.assert_close(reconstruct(rows, found.parameters, (32, 8, 32)), given)
    expected = (given - rows).square().sum(1).double()
    torch.testing.assert_close(found.score(rows), expected, rtol=1e-4, atol=1e-7)


def test_training_depends_on_the_seed_alone_and_lowers_the_error():
    train, other = benign(150, 10), benign(100, 11)
    torch.manual_seed(1)
    first = fit_autoencoder(train, "compliance", seed=0, epochs=150)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    second = fit_autoencoder(train, "compliance", seed=0, epochs=150)
    assert torch.equal(first.parameters, second.parameters)
    torch.manual_seed(1)
    fit_autoencoder(train, "compliance", seed=4, epochs=2)
    # Neither read nor moved.
    assert torch.equal(torch.random.get_rng_state(), state)
    different = fit_autoencoder(train, "compliance", seed=1, epochs=150)
    assert not torch.equal(first.parameters, different.parameters)
    untrained = fit_autoencoder(train, "compliance", seed=0, epochs=1)
    assert first.score(other).mean() < 0.1 * untrained.score(other).mean()


def test_masks_help_where_the_end_is_not_there_yet():
    train, test, other = benign(200, 12), benign(200, 13), wavering(200, 14)
    masked = fit_autoencoder(train, "compliance", seed=0, masked=True, epochs=600)
    labels = torch.cat([torch.ones(200), torch.zeros(200)]).bool()
    both = torch.cat([other, test])
    half = T // 2
    assert auroc(masked.at(both, half), labels) > 0.95
    # Before the dip there is nothing to find.
    before = auroc(masked.at(both, T // 3), labels)
    assert 0.35 < before < 0.65


@pytest.fixture(scope="module")
def fitted():
    rows = benign(150, 20)
    train = {
        "compliance": rows,
        "compliance_logit": torch.logit(rows.clamp(0.01, 0.99)),
        "probe": 1 - rows,
        "logit_difference": rows[:, :1].expand(-1, T),
        "perplexity": rows[:, 1:2].expand(-1, T),
        "text": torch.ones(150, T),
    }
    return fit_detectors(train, names(150), seed=0, epochs=600)


def test_every_candidate_is_fitted_and_the_whole_score_is_the_last_prefix(fitted):
    assert list(fitted) == list(CANDIDATES)
    rows = wavering(7, 21)
    for detector in fitted.values():
        prefixes = detector.prefixes(rows)
        assert prefixes.shape == (7, T)
        torch.testing.assert_close(prefixes[:, -1], detector.score(rows))
        # What comes later has no part in the score of a prefix.
        later = rows.clone()
        later[:, 5:] = 0.1
        torch.testing.assert_close(detector.prefixes(later)[:, :5], prefixes[:, :5])


def test_detectors_tell_wavering_from_benign_and_benign_from_nothing(fitted):
    labels = torch.cat([torch.ones(300), torch.zeros(300)]).bool()
    real = torch.cat([wavering(300, 22), benign(300, 23)])
    nothing = torch.cat([benign(300, 24), benign(300, 25)])
    for name in ("autoencoder", "residual", "mahalanobis", "features", "dip"):
        assert auroc(fitted[name].score(real), labels) > 0.95
        assert 0.4 < auroc(fitted[name].score(nothing), labels) < 0.6
    # Nothing in the text gives it away, and that baseline must not pretend so.
    assert auroc(fitted["text"].score(torch.ones(600, T)), labels) == 0.5


def test_readings_are_what_they_say():
    rows = torch.tensor([[0.9, 0.2, 0.6]])
    expected = {"mean": 1.7 / 3, "last": 0.6, "dip": 0.8, "rebound": 0.4}
    for reading, value in expected.items():
        found = SeriesReading("compliance", 3, reading).score(rows)
        assert float(found) == pytest.approx(value)


def test_a_file_gives_the_same_detector_back(fitted):
    rows = wavering(5, 26)
    for detector in fitted.values():
        parts = detector.parts()
        tensors = {k: v for k, v in parts.items() if isinstance(v, torch.Tensor)}
        facts = {k: v for k, v in parts.items() if k not in tensors}
        tensors = load(save({k: v.contiguous() for k, v in tensors.items()}))
        again = restore(json.loads(json.dumps(facts)) | tensors)
        assert type(again) is type(detector)
        torch.testing.assert_close(again.prefixes(rows), detector.prefixes(rows))


def test_a_file_of_another_kind_or_with_parts_missing_is_refused(fitted):
    with pytest.raises(InputError, match="found 'oracle'"):
        restore({"kind": "oracle"})
    parts = fitted["mahalanobis"].parts()
    del parts["factor"]
    with pytest.raises(InputError, match="factor"):
        restore(parts)


def test_a_saturated_signal_is_no_reason_to_fail():
    flat = {"compliance": torch.ones(120, T)}
    made = fit_detectors(flat, names(120), seed=0, epochs=400)
    assert "probe_mean" not in made
    rows = torch.ones(2, T)
    rows[1, 3] = 0.5
    for name in ("autoencoder", "residual", "mahalanobis", "features", "dip"):
        score = made[name].score(rows)
        assert bool(torch.isfinite(score).all())
        assert score[1] > score[0]


def test_other_numbers_of_steps_and_bad_series_are_refused(fitted):
    with pytest.raises(InputError, match=f"{T} steps, as the detector"):
        fitted["residual"].score(benign(3, 0, T + 1))
    with pytest.raises(InputError, match="1 to 12 steps"):
        fitted["residual"].at(benign(3, 0), 0)
    with pytest.raises(TooFewExamplesError, match=r"at least 100.*found 50"):
        fit_detectors({"compliance": benign(100, 0)}, names(50) * 2, seed=0)
    broken = benign(100, 0)
    broken[3, 3] = float("inf")
    with pytest.raises(InputError, match="finite"):
        fit_detectors({"compliance": broken}, names(100), seed=0)
    with pytest.raises(InputError, match="a channel among"):
        fit_detectors({}, [], seed=0, min_requests=0)
