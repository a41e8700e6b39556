"""Thinking or state, 2 x 2: the algebra, and a case in which nothing interacts."""

import itertools
from collections import Counter

import pytest
import torch

from holdfast.cliff.commitment.causes.cells import condition_of
from holdfast.cliff.commitment.causes.edited import Said
from holdfast.cliff.commitment.causes.swap import CELLS, EFFECTS, effects, rates
from holdfast.cliff.commitment.causes.swap_stage import NOT_JUDGED, _measured
from holdfast.rollout.rows import UNJUDGED, Judged
from holdfast.study.figures import draws_of

DRAWS = draws_of(0, "test")


def scripted(shares, n=1000):
    """Rows whose share with the outcome in each cell is exactly the one asked for."""
    columns = [torch.arange(n) < round(share * n) for share in shares]
    return torch.stack(columns, 1)


def one_each(n):
    return [f"r{row}" for row in range(n)]


@pytest.mark.parametrize(
    "shares", [(0.9, 0.4, 0.7, 0.1), (0.2, 0.2, 0.8, 0.8), (1.0, 0.0, 1.0, 0.0)]
)
def test_effects_are_the_algebra_of_the_four_rates(shares):
    y00, y01, y10, y11 = shares
    outcomes = scripted(shares)
    found = effects(outcomes, one_each(len(outcomes)), DRAWS)
    expected = {
        "thinking": ((y10 - y00) + (y11 - y01)) / 2,
        "edit": ((y01 - y00) + (y11 - y10)) / 2,
        "interaction": (y11 - y10) - (y01 - y00),
        "thinking_alone": y10 - y00,
        "edit_alone": y01 - y00,
        "both": y11 - y00,
    }
    assert {name: each.value for name, each in found.items()} == pytest.approx(expected)
    for each in found.values():
        assert each.low < each.value + 1e-9
        assert each.value < each.high + 1e-9
        assert each.high > each.low
        assert each.n == len(outcomes)
    cells = rates(outcomes, one_each(len(outcomes)), DRAWS)
    assert [each.value for each in cells.values()] == pytest.approx(list(shares))
    assert list(cells) == [f"{thinking}_{edit}" for thinking, edit in CELLS]


def test_what_is_lost_is_counted_in_prompts_however_often_each_was_drawn():
    """Of four prompts, two draws each: one unread, one half unread, two whole."""
    unread = {("a", 0), ("a", 1), ("b", 1)}
    said = []
    for asked, draw, place in itertools.product("abcd", range(2), range(len(CELLS))):
        row = {"asked": asked, "draw": draw, "condition": condition_of("heads", place)}
        is_lost = (asked, draw) in unread and place == 0
        said.append(Said(row, Judged(asked, UNJUDGED if is_lost else "complied")))
    why = Counter({"the thinking under the edit did not close": 3})
    found = _measured(0, "heads", "harmful", "attack_success", said, why)
    assert found["rows"] == 3
    assert found["lost"] == {**why, NOT_JUDGED: 1}
    assert found["effects"]["both"]["n"] == 5


def test_the_whole_is_the_sum_of_its_parts_on_any_rows():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        outcomes = torch.rand((30, 4), generator=generator) < 0.5
        found = effects(outcomes, one_each(30), DRAWS)
        value = {name: found[name].value for name in EFFECTS}
        parts = ("thinking_alone", "edit_alone", "interaction")
        assert value["both"] == pytest.approx(sum(value[part] for part in parts))
        assert value["both"] == pytest.approx(value["thinking"] + value["edit"])


def test_causes_that_add_up_do_not_interact():
    """Half of the rows turn by the thinking and half by the edit, none by both."""
    n = 400
    by_thinking = torch.arange(n) % 2 == 0
    false = torch.zeros(n, dtype=torch.bool)
    columns = [false, ~by_thinking, by_thinking, torch.ones(n, dtype=torch.bool)]
    found = effects(torch.stack(columns, 1), one_each(n), DRAWS)
    assert found["interaction"].value == 0
    assert found["interaction"].low < 0 < found["interaction"].high
    assert found["thinking"].value == found["edit"].value == 0.5


def test_a_change_that_needs_both_is_interaction():
    n = 40
    false = torch.zeros(n, dtype=torch.bool)
    outcomes = torch.stack([false, false, false, ~false], 1)
    found = effects(outcomes, one_each(n), DRAWS)
    assert found["interaction"].value == 1
    assert found["interaction"].low > 0.5
    assert found["thinking"].value == found["edit"].value == 0.5
    assert found["thinking_alone"].value == found["edit_alone"].value == 0
    assert found["edit_alone"].low < 0 < found["edit_alone"].high


def test_rows_of_one_request_are_no_evidence_of_their_own():
    """Copies of every row leave each effect and widen no certainty."""
    generator = torch.Generator().manual_seed(1)
    outcomes = torch.rand((30, 4), generator=generator) < torch.tensor(
        [0.8, 0.3, 0.6, 0.2]
    )
    alone = effects(outcomes, one_each(30), DRAWS)
    copied = effects(outcomes.repeat(4, 1), one_each(30) * 4, DRAWS)
    for name in EFFECTS:
        assert copied[name].value == pytest.approx(alone[name].value)
        widths = [each.high - each.low for each in (alone[name], copied[name])]
        assert widths[1] > 0.7 * widths[0], name


def test_intervals_cover_the_truth():
    """Rows drawn with a known interaction: the interval has it as often as told."""
    truth = torch.tensor([0.3, 0.5, 0.5, 0.9])
    hits = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        outcomes = torch.rand((60, 4), generator=generator) < truth
        found = effects(outcomes, one_each(60), DRAWS)["interaction"]
        hits += found.low <= 0.2 <= found.high
    assert hits >= 88


def test_no_order_of_rows_changes_a_value():
    outcomes = scripted((0.9, 0.4, 0.7, 0.1), 40)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    one = effects(outcomes, one_each(40), DRAWS)
    other = effects(outcomes[shuffled], one_each(40), DRAWS)
    for name, kind in itertools.product(EFFECTS, ("value",)):
        assert getattr(one[name], kind) == pytest.approx(getattr(other[name], kind))
