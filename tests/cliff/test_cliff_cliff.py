"""Plateaus and cliffs on traces whose truth is known."""

import numpy as np
import pytest
import torch

from holdfast.cliff.cliff import excess, final_gap, row_cliff, summarise
from holdfast.errors import InputError
from holdfast.stats.bootstrap import Estimate

torch.set_num_threads(1)

UNIT_GAP = Estimate(4.0, 3.0, 5.0, 100)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trace(plateau: float, final: float, n: int = 40, noise: float = 0.0, seed: int = 0):
    """Logits: 5 of prompt at 9, `n` of thinking, 3 of end template."""
    rng = np.random.default_rng(seed)
    thinking = plateau + noise * rng.normal(size=n)
    parts = [np.full(5, 9.0), thinking, [plateau, final, final]]
    return torch.from_numpy(np.concatenate(parts))


def rows(plateau: float, final: float, n_rows: int = 30, seed: int = 0, n: int = 40):
    rng = np.random.default_rng(seed)
    return [
        row_cliff(
            trace(plateau + 0.3 * a, final + 0.3 * b, n=n), slice(5, 5 + n), 5 + n + 2
        )
        for a, b in rng.normal(size=(n_rows, 2))
    ]


def names(n: int = 30, prefix: str = "r") -> list[str]:
    return [f"{prefix}{i}" for i in range(n)]


def test_plateau_and_cliff_are_the_closed_form():
    found = row_cliff(trace(2.0, -1.0), slice(5, 45), 47)
    high, low = 1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(1.0))
    assert found.plateau == pytest.approx(high)
    assert found.final == pytest.approx(low)
    assert found.cliff == pytest.approx(high - low)
    assert (found.plateau_logit, found.final_logit) == (2.0, -1.0)
    assert (found.n_thinking, found.reason) == (40, None)


def test_a_flat_trace_has_no_cliff():
    found = row_cliff(trace(1.3, 1.3), slice(5, 45), 47)
    assert found.cliff == pytest.approx(0)


def test_the_maximum_of_a_noisy_flat_trace_makes_a_cliff_that_the_median_does_not():
    noisy = trace(0.0, 0.0, n=200, noise=1.0)
    median = row_cliff(noisy, slice(5, 205), 207)
    maximum = row_cliff(noisy, slice(5, 205), 207, rule="maximum")
    assert abs(median.cliff) < 0.05
    assert maximum.cliff > 0.35
    assert maximum.plateau == median.plateau_max


def test_the_median_is_numpys_and_the_last_twentieth_is_left_out():
    logits = trace(0.0, 0.0, n=61, noise=1.0)
    logits[5 + 57 : 5 + 61] = 50.0  # ceil(0.05 · 61) = 4 tokens.
    found = row_cliff(logits, slice(5, 66), 68)
    kept = 1 / (1 + np.exp(-logits[5:62].numpy()))
    assert found.plateau == pytest.approx(np.median(kept), abs=1e-12)
    assert found.plateau_max == pytest.approx(kept.max(), abs=1e-12)


def test_short_thinking_has_a_final_score_and_no_plateau():
    found = row_cliff(trace(2.0, -1.0, n=19), slice(5, 24), 26)
    assert found.plateau is None
    assert found.cliff is None
    assert found.final_logit == -1.0
    assert found.reason == "19 tokens of thinking, fewer than 20"
    empty = row_cliff(trace(2.0, -1.0, n=0), slice(5, 5), 7, min_tokens=0)
    assert empty.plateau is None


@pytest.mark.parametrize(("thinking", "final"), [(slice(5, 60), 47), (slice(5, 9), 48)])
def test_positions_outside_the_trace_are_refused(thinking, final):
    with pytest.raises(InputError, match="within 48 positions"):
        row_cliff(trace(2.0, -1.0), thinking, final)


def test_the_gap_is_the_distance_between_refused_and_benign():
    refused, benign = rows(2.0, 2.0, seed=1), rows(-2.0, -2.0, seed=2)
    gap = final_gap(refused, names(), benign, names(prefix="b"), generator())
    assert gap.value == pytest.approx(4, abs=0.2)
    assert gap.low > 3.5


def test_the_scaled_cliff_does_not_change_with_the_size_of_the_probe():
    def scaled(factor: float):
        groups = [
            rows(factor * plateau, factor * final, seed=seed)
            for seed, (plateau, final) in enumerate([(2, -1), (2, 2), (-2, -2)])
        ]
        # The spread of `rows` is fixed, so the factor is put on the rows themselves.
        groups = [
            [
                row._replace(
                    plateau_logit=factor * unit.plateau_logit,
                    final_logit=factor * unit.final_logit,
                )
                for row, unit in zip(group, units, strict=True)
            ]
            for group, units in zip(groups, unit_groups, strict=True)
        ]
        gap = final_gap(groups[1], names(), groups[2], names(prefix="b"), generator())
        found = summarise(groups[0], names(prefix="c"), gap, generator())
        over = excess(
            groups[0],
            names(prefix="c"),
            groups[1],
            names(),
            generator(),
            gap=gap,
        )
        return found, over

    unit_groups = [
        rows(plateau, final, seed=seed)
        for seed, (plateau, final) in enumerate([(2, -1), (2, 2), (-2, -2)])
    ]
    (one, one_excess), (five, five_excess) = scaled(1.0), scaled(5.0)
    assert one.scaled_cliff.value == pytest.approx(0.75, abs=0.05)
    assert five.scaled_cliff[:3] == pytest.approx(one.scaled_cliff[:3], rel=1e-9)
    assert five_excess[:3] == pytest.approx(one_excess[:3], rel=1e-9)
    # The cliff on the score is not so lucky.
    assert five.cliff.value > one.cliff.value + 0.05


def test_groups_without_a_fall_have_a_scaled_cliff_that_covers_zero():
    covered = 0
    for seed in range(60):
        flat = rows(1.0, 1.0, seed=seed)
        found = summarise(flat, names(), UNIT_GAP, generator(seed))
        covered += found.scaled_cliff.low <= 0 <= found.scaled_cliff.high
        difference = found.plateau.value - found.final.value
        assert found.cliff.value == pytest.approx(difference)
    assert covered >= 53


def test_short_rows_are_left_out_and_counted():
    mixed = rows(2.0, -1.0, 12) + rows(2.0, -1.0, 8, n=10)
    clusters = [str(i // 2) for i in range(20)]
    found = summarise(mixed, clusters, UNIT_GAP, generator())
    assert found.short_thinking_excluded == 8
    assert found.n_requests == 6
    assert found.final.n == found.plateau.n == 12
    nothing = summarise(mixed[12:], clusters[12:], UNIT_GAP, generator())
    assert nothing.plateau.value is None
    assert nothing.plateau.reason == "all 8 rows thought for too few tokens"


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        (Estimate(0.5, -0.2, 1.2, 40), "not clearly above 0"),
        (Estimate(None, None, None, 0, "there are no rows"), "there are no rows"),
    ],
)
def test_without_a_clear_gap_nothing_is_scaled(gap, words):
    group = rows(2.0, -1.0)
    found = summarise(group, names(), gap, generator())
    assert found.scaled_cliff.value is None
    assert words in found.scaled_cliff.reason
    assert found.cliff.value is not None
    over = excess(group, names(), group, names(), generator(), gap=gap)
    assert over.value is None


def test_the_excess_over_a_control_that_falls_as_well_is_nothing():
    complied = rows(2.0, -1.0, seed=1)
    falls_too, stays = rows(2.0, -1.0, seed=2), rows(2.0, 2.0, seed=3)
    other = names(prefix="o")
    none = excess(complied, names(), falls_too, other, generator(), gap=UNIT_GAP)
    real = excess(complied, names(), stays, other, generator(), gap=UNIT_GAP)
    assert none.low < 0 < none.high
    assert real.low > 0.6
    plateau = excess(
        complied, names(), rows(-2.0, -2.0), other, generator(), quantity="plateau"
    )
    assert plateau.low > 0.7


def test_the_excess_over_an_empty_control_is_unknown():
    found = excess(rows(2.0, -1.0), names(), [], [], generator(), gap=UNIT_GAP)
    assert found.value is None
    assert "control has no rows" in found.reason
