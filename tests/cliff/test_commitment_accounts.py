"""Accounts of rows whose curves are known, each with a case beside it that is none."""

import pytest

from holdfast.cliff.commitment.accounts import (
    AccountThresholds,
    CutReading,
    account,
    commitment,
    is_resolved,
    jump_of,
)

SHARES = (0.0, 0.05, 0.10, 0.20, 0.35, 0.50, 0.80, 1.0)
N = 100


def row(sames, leanings=None, *, n=8, shares=SHARES):
    """Cuts with these shares of the final outcome; the whole row is like the last."""
    leanings = leanings or [None] * len(sames)
    cuts = [
        CutReading(at, same, n, leaning, round(N * at))
        for at, same, leaning in zip(shares, sames, leanings, strict=True)
    ]
    return [*cuts, CutReading(1.0, sames[-1], n, None, N, True)]


EARLY = [1.0] * 8
FALLEN = [0.0] * 8
REFUSES, COMPLIES = [1.0] * 8, [0.0] * 8


def test_an_outcome_that_no_cut_changes_was_decided_early():
    found = account(row(EARLY, COMPLIES))
    assert (found.name, found.commitment) == ("decided_early", 0.0)
    found = account(row([0, 0, 0, 1, 1, 1, 1, 1], COMPLIES))
    assert (found.name, found.commitment) == ("decided_early", 0.2)


def test_one_that_is_decided_behind_a_fifth_was_not():
    found = account(row([0, 0, 0, 0, 1, 1, 1, 1], COMPLIES))
    assert (found.name, found.commitment) == ("undecided", 0.35)
    assert "jump between cuts" in found.reason
    assert "20%" in found.reason
    assert "35%" in found.reason


def test_a_refusal_held_to_the_end_template_fell_there():
    cuts = [*row(FALLEN, REFUSES)[:-1], CutReading(1.0, 1.0, 8, None, N, True)]
    # Draws at the last cut are those of the whole row but for the template's tokens.
    cuts[-2] = cuts[-2]._replace(same=1.0)
    assert account(cuts).name == "fell_at_template"
    # However early closing would have shown it: the thinking still held to a refusal.
    assert account(row(EARLY, REFUSES)).name == "fell_at_template"


@pytest.mark.parametrize("broken", range(5, 8))
def test_a_refusal_that_went_inside_the_thinking_did_not_fall_at_its_end(broken):
    leanings = [*REFUSES[:broken], *COMPLIES[broken:]]
    assert account(row(EARLY, leanings)).name == "decided_early"


def test_a_leaning_that_was_not_read_shows_no_fall():
    found = account(row([0, 0, 0, 0, 0, 0, 1, 1]), unread="no control was drawn")
    assert found.name == "undecided"
    assert found.reason.endswith("; no control was drawn")
    assert account(row(EARLY)).name == "decided_early"


def test_a_slope_drifted():
    found = account(row([0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.95, 1.0], n=20))
    assert found.name == "drifted"
    assert found.commitment == 0.8


def test_a_slope_with_one_steep_window_did_not_drift():
    shares = (0.0, 0.20, 0.35, 0.40, 0.45, 0.50, 0.80, 1.0)
    cuts = row([0, 0.1, 0.1, 0.1, 0.9, 1, 1, 1], n=20, shares=shares)
    jump = jump_of(cuts)
    assert (jump.start, jump.end) == (0.40, 0.45)
    assert is_resolved(jump)
    found = account(cuts)
    assert found.name == "undecided"
    assert "one jump inside the thinking, between 40% and 45%" in found.reason


def test_steps_within_one_window_are_added_up():
    shares = (0.0, 0.35, 0.40, 0.42, 0.44, 0.50, 0.80, 1.0)
    steps = [0, 0.1, 0.2, 0.5, 0.8, 0.9, 1, 1]
    assert account(row(steps, n=20, shares=shares)).name == "undecided"
    wide = AccountThresholds(window=0.01)
    assert account(row(steps, n=20, shares=shares), wide).name == "drifted"


def test_draws_that_stay_mixed_decide_nothing():
    found = account(row([0.5] * 8))
    assert (found.name, found.commitment) == ("undecided", None)
    assert "4 of 8 draws" in found.reason
    # Mixed for long, and without a change that could be a slope.
    found = account(row([0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 1, 1], n=20))
    assert found.name == "undecided"
    assert "change by 0.40" in found.reason


def test_one_draw_that_differs_is_no_change_of_mind_and_three_are():
    one = [1, 1, 1, 7 / 8, 1, 1, 1, 1]
    assert commitment(row(one)) == 0.0
    three = [1, 1, 1, 4 / 8, 1, 1, 1, 1]
    assert commitment(row(three)) == 0.35


def test_draws_that_nobody_could_judge_decide_nothing():
    cuts = row(EARLY)
    found = account([*cuts[:-1], cuts[-1]._replace(n=0, same=0.0)])
    assert found == ("undecided", "no draw at the end could be judged", None)


@pytest.mark.parametrize(
    ("sames", "leanings", "shares"),
    [
        ([1.0] * 8, COMPLIES, SHARES),
        ([0.6] * 6 + [1, 1], COMPLIES, SHARES),
        ([0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.95, 1.0], COMPLIES, SHARES),
        ([0.2, 0.2, 0.2, 0.2, 0.2, 0.9, 1, 1], COMPLIES, SHARES),
        ([1.0] * 8, REFUSES, SHARES),
    ],
    ids=["early", "mixed", "drift", "jump", "fell"],
)
@pytest.mark.parametrize("place", range(7))
def test_a_cut_that_nobody_could_judge_is_as_good_as_none(
    sames, leanings, shares, place
):
    """Neither its share nor its place counts; what was read before it does."""
    cuts = row(sames, leanings, n=20, shares=shares)
    blind = [*cuts]
    blind[place] = cuts[place]._replace(n=0, same=float("nan"))
    without = [*cuts[:place], *cuts[place + 1 :]]
    assert account(blind) == account(without)
    assert commitment(blind) == commitment(without)
    assert jump_of(blind) == jump_of(without)


def test_rows_of_which_the_end_alone_was_judged_are_not_said_to_have_jumped():
    cuts = [cut._replace(n=0, same=float("nan")) for cut in row(EARLY, COMPLIES)[:-1]]
    found = account([*cuts, CutReading(1.0, 1.0, 8, None, N, True)])
    assert found.name == "undecided"
    assert "change by 0.00" in found.reason


def test_a_probability_needs_no_interval():
    assert commitment(row([0.95] * 8, n=None)) == 0.0
    assert commitment(row([0.95, 0.95, 0.89, *[0.95] * 5], n=None)) == 0.2
    assert account(row([0.5] * 8, n=None)).reason.endswith("at the end")


def test_neighbouring_tokens_are_one_window_however_short_the_thinking():
    cuts = [
        CutReading(at, same, 20, None, round(10 * at))
        for at, same in ((0.0, 0.0), (0.4, 0.0), (0.5, 1.0), (1.0, 1.0))
    ]
    cuts.append(CutReading(1.0, 1.0, 20, None, 10, True))
    jump = jump_of(cuts)
    assert jump.n_tokens == 1
    assert is_resolved(jump)


@pytest.mark.parametrize("n", [8, 20, None])
def test_the_rules_are_total(n):
    import itertools

    for sames in itertools.product((0.0, 0.5, 1.0), repeat=4):
        for leaning in (None, 0.0, 1.0):
            cuts = row(sames, [leaning] * 4, n=n, shares=(0.0, 0.2, 0.5, 1.0))
            found = account(cuts)
            assert found.reason
            assert (found.commitment is None) <= (found.name == "undecided")
