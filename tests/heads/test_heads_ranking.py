import math

import pytest
import torch

from holdfast.errors import InputError, SettingsError
from holdfast.heads.ranking import (
    Head,
    Readings,
    count_heads,
    drops,
    layer_matched_draws,
    most_positive_heads,
    parse_heads,
    rank_heads,
    top_heads,
)
from holdfast.stats.rates import clustered_mean

LAYERS, HEADS = 3, 4


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _readings(n=6, n_plateau=9, seed=1):
    """Readings of random traces, and the traces: writes and 1 / RMS at each token."""
    generator = _generator(seed)
    writes = torch.randn(
        n, n_plateau + 1, LAYERS, HEADS, generator=generator, dtype=torch.float64
    )
    inverse = torch.rand(n, n_plateau + 1, generator=generator, dtype=torch.float64)
    inverse = inverse + 0.5
    scaled = writes * inverse[..., None, None]
    readings = Readings(
        plateau=scaled[:, :-1].mean(1),
        plateau_unscaled=writes[:, :-1].mean(1),
        plateau_inverse_rms=inverse[:, :-1].mean(1),
        final=scaled[:, -1],
        final_inverse_rms=inverse[:, -1],
        published=writes[:, -1] / 3,
    )
    return readings, writes, inverse


def _names(n=6):
    return [str(i) for i in range(n)]


def test_the_split_is_the_symmetric_one_averaged_over_the_plateau():
    readings, writes, inverse = _readings()
    found = drops(readings)
    before, after = writes[:, :-1], writes[:, -1:]
    one, other = inverse[:, :-1, None, None], inverse[:, -1:, None, None]
    written = ((before - after) * (one + other) / 2).mean(1)
    rms = ((before + after) * (one - other) / 2).mean(1)
    torch.testing.assert_close(found.written, written)
    torch.testing.assert_close(found.rms, rms)
    torch.testing.assert_close(found.written + found.rms, found.total)
    torch.testing.assert_close(found.total, (before * one - after * other).mean(1))


def test_a_constant_rms_leaves_nothing_to_the_rms():
    readings, _, _ = _readings()
    same = torch.full((6,), 0.8, dtype=torch.float64)
    readings = readings._replace(
        plateau=readings.plateau_unscaled * 0.8,
        plateau_inverse_rms=same,
        final_inverse_rms=same,
    )
    found = drops(readings)
    assert found.rms.abs().max() < 1e-12
    assert found.total.abs().min() > 0


def test_constant_writes_leave_all_to_the_rms():
    readings, writes, inverse = _readings()
    writes = writes[:, :1].expand_as(writes)
    scaled = writes * inverse[..., None, None]
    readings = readings._replace(
        plateau=scaled[:, :-1].mean(1),
        plateau_unscaled=writes[:, 0],
        final=scaled[:, -1],
    )
    found = drops(readings)
    assert found.written.abs().max() < 1e-12
    torch.testing.assert_close(found.rms, found.total)


def test_turning_plateau_and_final_token_round_turns_every_sign():
    readings, _, _ = _readings(n_plateau=1)
    turned = readings._replace(
        plateau=readings.final,
        plateau_unscaled=readings.final / readings.final_inverse_rms[:, None, None],
        plateau_inverse_rms=readings.final_inverse_rms,
        final=readings.plateau,
        final_inverse_rms=readings.plateau_inverse_rms,
    )
    for one, other in zip(drops(readings), drops(turned), strict=True):
        torch.testing.assert_close(one, -other)


def _planted(head=(2, 1), n=40, size=5.0):
    readings, _, _ = _readings(n)
    final = readings.final.clone()
    final[:, head[0], head[1]] -= size
    return readings._replace(final=final)


def test_a_head_that_takes_the_logit_down_comes_first():
    ranking = rank_heads(_planted(), _names(40), _generator())
    assert ranking[0].head == Head(2, 1)
    assert ranking[0].contribution.value == pytest.approx(5, abs=0.8)
    assert ranking[0].contribution.low > 4
    assert ranking[1].contribution.low < 1
    assert [row.rank for row in ranking] == list(range(1, LAYERS * HEADS + 1))
    assert len({row.head for row in ranking}) == LAYERS * HEADS


def test_a_head_that_holds_the_logit_up_comes_last_and_is_most_positive():
    ranking = rank_heads(_planted(size=-5.0), _names(40), _generator())
    assert ranking[-1].head == Head(2, 1)
    assert most_positive_heads(ranking, 2)[0] == Head(2, 1)
    assert set(most_positive_heads(ranking, 6)) & set(top_heads(ranking, 6)) == set()


def test_contributions_sum_to_the_drop_of_all_heads():
    readings = _planted()
    ranking = rank_heads(readings, _names(40), _generator())
    expected = (readings.plateau - readings.final).sum((1, 2)).mean()
    total = sum(row.contribution.value for row in ranking)
    assert total == pytest.approx(float(expected))
    for row in ranking:
        assert row.contribution.value == pytest.approx(row.plateau - row.final)


def test_the_interval_is_that_of_a_clustered_mean():
    readings = _planted()
    names = [str(i // 4) for i in range(40)]
    ranking = rank_heads(readings, names, _generator())
    for row in ranking[:3]:
        values = drops(readings).total[:, row.head.layer, row.head.head]
        expected = clustered_mean(values, names, _generator())
        assert row.contribution.value == pytest.approx(expected.value)
        assert row.contribution.low == pytest.approx(expected.low)
        assert row.contribution.high == pytest.approx(expected.high)


def test_repeating_rows_of_a_request_narrows_nothing():
    readings = _planted(n=10)
    twice = Readings(*(part.repeat(5, *[1] * (part.ndim - 1)) for part in readings))
    once = rank_heads(readings, _names(10), _generator())
    again = rank_heads(twice, _names(10) * 5, _generator())
    for one, other in zip(once, again, strict=True):
        assert one.head == other.head
        assert one.contribution.low == pytest.approx(other.contribution.low)


def test_the_papers_ranking_puts_the_most_negative_projection_first():
    readings = _planted()
    published = readings.published.clone()
    published[:, 0, 3] -= 4
    readings = readings._replace(published=published)
    ranking = rank_heads(readings, _names(40), _generator(), by="published")
    assert ranking[0].head == Head(0, 3)
    means = published.mean(0).flatten()
    order = [row.head.layer * HEADS + row.head.head for row in ranking]
    assert order == means.argsort(stable=True).tolist()
    assert ranking[0].contribution.value == pytest.approx(-float(means.min()))
    assert rank_heads(readings, _names(40), _generator())[0].head == Head(2, 1)


def test_equal_heads_stay_in_order():
    readings, _, _ = _readings()
    equal = Readings(*(torch.ones_like(part) for part in readings))
    ranking = rank_heads(equal, _names(), _generator())
    assert [tuple(row.head) for row in ranking] == [
        (layer, head) for layer in range(LAYERS) for head in range(HEADS)
    ]


def test_one_request_gives_an_order_and_no_interval():
    readings = Readings(*(part[:3] for part in _planted()))
    ranking = rank_heads(readings, ["one"] * 3, _generator())
    assert ranking[0].contribution.value is None
    assert "one base request" in ranking[0].contribution.reason
    assert ranking[0].head == Head(2, 1)


def test_no_complied_requests_rank_nothing():
    readings = Readings(*(part[:0] for part in _planted()))
    with pytest.raises(InputError, match="complied harmful requests"):
        rank_heads(readings, [], _generator())


@pytest.mark.parametrize(
    ("fraction", "total", "n"),
    [
        (0.03, 128, 4),
        (0.015, 1024, 16),
        (0.07, 100, 7),
        (0.1, 10, 1),
        (1e-9, 128, 1),
        (1, 128, 128),
        (1 / 3, 3, 1),
    ],
)
def test_a_fraction_is_rounded_up_and_taken_as_written(fraction, total, n):
    assert count_heads(fraction, total) == n


def test_binary_rounding_would_have_selected_one_head_too_many():
    assert math.ceil(0.07 * 100) == 8


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_a_fraction_that_selects_no_head_is_refused(fraction):
    with pytest.raises(SettingsError, match="128 heads above 0") as error:
        count_heads(fraction, 128)
    assert error.value.exit_status == 2


def test_random_heads_match_the_layers_and_leave_out_the_selected():
    selected = [Head(0, 1), Head(2, 0), Head(2, 3), Head(5, 7)]
    draws = layer_matched_draws(selected, 8, 5, _generator())
    assert len(set(draws)) == 5
    for draw in draws:
        assert [head.layer for head in draw] == [0, 2, 2, 5]
        assert len(set(draw)) == 4
        assert not set(draw) & set(selected)
    assert draws == layer_matched_draws(selected, 8, 5, _generator())
    assert draws != layer_matched_draws(selected, 8, 5, _generator(1))


def test_every_other_head_is_drawn_equally_often():
    draws = layer_matched_draws([Head(0, 0)], 4, 3000, _generator())
    for head in (1, 2, 3):
        share = draws.count((Head(0, head),)) / 3000
        assert share == pytest.approx(1 / 3, abs=0.04)


def test_draws_repeat_only_where_there_are_no_more_to_draw():
    draws = layer_matched_draws([Head(1, 0)], 4, 5, _generator())
    assert len(set(draws)) == 3
    assert len(draws) == 5


def test_a_layer_that_is_mostly_selected_has_no_controls():
    selected = [Head(1, head) for head in range(3)]
    with pytest.raises(SettingsError, match="3 in layer 1"):
        layer_matched_draws(selected, 4, 5, _generator())


def test_first_and_last_heads_must_not_overlap():
    ranking = rank_heads(_planted(), _names(40), _generator())
    with pytest.raises(SettingsError, match="at most 6 heads"):
        most_positive_heads(ranking, 7)


def test_heads_are_read_as_layer_and_head():
    assert parse_heads("5:3, 6:11,") == (Head(5, 3), Head(6, 11))
    assert parse_heads("") == ()
    for wrong in ("5.3", "a:1", "1:", "-1:2"):
        with pytest.raises(SettingsError, match="count from 0"):
            parse_heads(wrong)
