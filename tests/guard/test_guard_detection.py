"""Detection on test rows: who is flagged, and intervals that know chance."""

import pytest
import torch

from holdfast.errors import TooFewExamplesError
from holdfast.guard.detection import calibrate, detect
from holdfast.guard.detector import SeriesReading
from holdfast.stats.auroc import auroc, auroc_difference
from holdfast.stats.groups import group_names


def draws(name):
    return torch.Generator().manual_seed(len(name))


def names(n):
    return [str(row) for row in range(n)]


def uniform(n, seed, steps=4):
    return torch.rand(n, steps, generator=torch.Generator().manual_seed(seed))


def test_groups_tell_requests_and_outcomes_apart():
    harmful = torch.tensor([False, False, True, True])
    refused = torch.tensor([False, True, False, True])
    assert group_names(harmful, refused) == [
        "benign_complied",
        "benign_refused",
        "attack_complied",
        "attack_refused",
    ]


def fitted(n=999):
    detector = SeriesReading("compliance", 4, "last")
    return calibrate(detector, uniform(200, 0), uniform(n, 1), names(n))


def test_refusals_flagged_are_counted_apart_from_compliances_flagged():
    # Scores above the threshold exactly where the answer is a refusal.
    harmful = torch.arange(200) % 2 == 0
    refused = torch.arange(200) % 4 < 2
    scores = refused.double() * 2
    found = detect(
        scores, fitted().thresholds, group_names(harmful, refused), names(200), draws
    )
    flagged = {group: each.value for group, each in found.flagged[0.01].items()}
    assert flagged == {
        "benign_complied": 0,
        "benign_refused": 1,
        "attack_complied": 0,
        "attack_refused": 1,
    }
    # It has found refusals, and no attack that succeeded.
    assert found.auroc.value < 0.5
    assert found.false_positives[0.01].value == 0.5


def test_a_score_that_knows_nothing_has_an_auroc_around_one_half():
    harmful = torch.arange(600) % 2 == 0
    refused = torch.zeros(600, dtype=torch.bool)
    calibrated = fitted()
    scores = calibrated.detector.score(uniform(600, 2))
    found = detect(
        scores, calibrated.thresholds, group_names(harmful, refused), names(600), draws
    )
    assert found.auroc.low < 0.5 < found.auroc.high
    for level in (0.01, 0.05):
        for group in ("benign_complied", "attack_complied"):
            rate = found.flagged[level][group]
            assert rate.low <= level <= rate.high
        assert found.false_positives[level].n == 300
    assert found.flagged[0.01]["attack_refused"].value is None


def test_without_attacks_there_is_no_auroc_and_the_false_positives_stay():
    rows = torch.zeros(50, dtype=torch.bool)
    found = detect(
        torch.rand(50), fitted().thresholds, group_names(rows, rows), names(50), draws
    )
    assert found.auroc.value is None
    assert "0 complied attacks and 50 benign rows" in found.auroc.reason
    assert found.false_positives[0.05].n == 50


def test_calibration_needs_its_rows():
    with pytest.raises(TooFewExamplesError, match="found 98"):
        fitted(98)


def test_the_path_threshold_bounds_looks_after_every_step():
    calibrated = fitted()
    from holdfast.guard.conformal import first_flagged, running_maximum

    prefixes = calibrated.detector.prefixes(uniform(4000, 5))
    path = running_maximum(prefixes, calibrated.scale)
    flagged = first_flagged(path, calibrated.path_thresholds[0.05]) < 4
    assert float(flagged.double().mean()) == pytest.approx(0.05, abs=0.02)


def test_a_difference_of_areas_is_that_of_both_and_pairs_them():
    seeded = torch.Generator().manual_seed(3)
    labels = torch.arange(400) % 2 == 0
    good = labels.double() + torch.randn(400, generator=seeded)
    better = good + 0.3 * labels.double()
    found = auroc_difference(better, good, labels, names(400), seeded)
    assert found.value == pytest.approx(auroc(better, labels) - auroc(good, labels))
    # The two rise and fall together, so the difference is clear where neither is.
    assert found.low > 0
    noise = torch.randn(400, generator=seeded)
    against = auroc_difference(good + 0.1 * noise, good, labels, names(400), seeded)
    assert against.low < 0 < against.high
    same = auroc_difference(good, 2 * good, labels, names(400), seeded)
    assert same.value is None
