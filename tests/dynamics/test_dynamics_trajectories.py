"""Recovery on constructed curves, where every rate is known."""

import pytest
import torch

from holdfast.dynamics.trajectories import (
    HARMFUL,
    HARMLESS,
    UNPARSED,
    incomplete_recovery,
    internal_recovery,
    recovery_features,
    text_recovery,
)
from holdfast.errors import InputError
from holdfast.stats.bootstrap import bootstrap_means

CURVES = torch.tensor(
    [
        [0.9, 0.8, 0.05],  # complies, then refuses for good
        [0.9, 0.2, 0.4],  # ends weakly below one half
        [0.9, 0.2, 0.9],  # dips and returns
        [0.1, 0.1, 0.1],  # refuses throughout: does not count
        [0.1, 0.2, 0.9],  # complies at the last step only: does not count
    ]
)
NAMES = list("abcde")


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("level", "expected"), [(0.5, 2 / 3), (0.3, 1 / 3), (0.1, 1 / 3), (0.01, 0.0)]
)
def test_the_rate_counts_rows_that_complied_before_the_last_step(level, expected):
    found = internal_recovery(CURVES, NAMES, seeded(), recovered=level)
    assert found.value == pytest.approx(expected)
    assert found.n == 3
    assert found.low < expected < found.high or expected == found.low == 0


def test_the_rate_is_undefined_where_nothing_complied():
    found = internal_recovery(CURVES[3:], NAMES[3:], seeded())
    assert found.value is None
    assert "no response complied" in found.reason


def test_rows_of_one_request_do_not_pass_for_many():
    rows = CURVES[[0, 2]].repeat(40, 1)
    alone = internal_recovery(rows, [str(i) for i in range(80)], seeded())
    shared = internal_recovery(rows, ["a", "b"] * 40, seeded())
    assert alone.value == shared.value == 0.5
    assert shared.high - shared.low > 2 * (alone.high - alone.low)


READ = torch.tensor(
    [
        [HARMFUL, HARMLESS, HARMLESS],  # harm was there, was changed, is gone
        [HARMFUL, HARMFUL, HARMFUL],  # changed in words, harmful all the same
        [UNPARSED, HARMFUL, HARMFUL],  # kept as it was
        [HARMFUL, UNPARSED, UNPARSED],  # nobody can read the end
        [UNPARSED, UNPARSED, HARMLESS],  # nobody knows what it was
        [HARMLESS, HARMLESS, HARMLESS],
        [HARMLESS, HARMLESS, HARMFUL],  # harmful at the last step only
    ]
)
CHANGED = torch.tensor(
    [
        [True, False, False],
        [True, False, False],
        [True, False, False],
        [True, True, False],
        [True, True, False],
        [False, False, False],
        [True, True, False],
    ]
)


def test_rates_of_text_are_over_rows_that_were_ever_harmful():
    found = text_recovery(READ, CHANGED, list("abcdefg"), seeded())
    values = {name: (each.value, each.n) for name, each in found._asdict().items()}
    assert values["remasked"] == (pytest.approx(3 / 4), 4)
    assert values["recovered"] == (pytest.approx(1 / 4), 4)
    assert values["harmful"] == (pytest.approx(2 / 4), 4)
    assert values["unparsed"] == (pytest.approx(1 / 4), 4)
    assert values["recovered_of_remasked"] == (pytest.approx(1 / 3), 3)
    assert values["ever_harmful"] == (pytest.approx(4 / 7), 7)
    assert values["never_read"] == (pytest.approx(1 / 7), 7)


def test_unparsed_text_never_counts_as_recovery():
    unread = torch.where(READ == HARMLESS, UNPARSED, READ)
    found = text_recovery(unread, CHANGED, list("abcdefg"), seeded())
    assert found.recovered.value == 0
    assert found.unparsed.value == pytest.approx(2 / 4)


def test_without_harm_there_is_no_rate():
    found = text_recovery(READ[4:6], CHANGED[4:6], ["a", "b"], seeded())
    assert found.remasked.value is found.recovered.value is None
    assert found.ever_harmful.value == 0


def test_a_reading_that_is_none_and_a_last_step_that_changes_are_refused():
    with pytest.raises(InputError, match="another number"):
        text_recovery(READ + 3, CHANGED, list("abcdefg"), seeded())
    with pytest.raises(InputError, match="last step"):
        text_recovery(READ, ~CHANGED, list("abcdefg"), seeded())


def test_features_of_a_dip_that_rebounds():
    found = recovery_features(torch.tensor([[0.9, 0.2, 0.6, 0.4, 0.9]]))
    assert float(found.dip) == pytest.approx(0.3)
    assert float(found.rebound) == pytest.approx(0.7)
    assert float(found.variation) == pytest.approx(0.7 + 0.4 + 0.2 + 0.5)
    assert float(found.crossings) == 4
    assert float(found.below) == pytest.approx(0.4)
    assert found.columns().shape == (1, 5)


def test_features_of_flat_curves_are_zero_but_for_the_time_below():
    found = recovery_features(torch.tensor([[0.9] * 4, [0.1] * 4])).columns()
    expected = torch.tensor([[0, 0, 0, 0, 0.0], [0.4, 0, 0, 0, 1.0]])
    torch.testing.assert_close(found.float(), expected)


def test_only_a_dip_that_returns_is_an_incomplete_recovery():
    assert incomplete_recovery(CURVES).tolist() == [False, False, True, False, True]
    assert not incomplete_recovery(torch.full((1, 3), 0.9)).item()


def test_the_band_is_the_mean_at_every_step_and_stays_within_bounds():
    found = bootstrap_means(CURVES, NAMES, seeded(), bounds=(0.0, 1.0))
    for step, each in enumerate(found):
        assert each.value == pytest.approx(float(CURVES[:, step].mean()), abs=1e-6)
        assert 0 <= each.low <= each.value <= each.high <= 1
