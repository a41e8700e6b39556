"""Where more is drawn: inside a jump, and once more at its ends."""

import random

import pytest

from holdfast.cliff.commitment.accounts import CutReading, account
from holdfast.cliff.commitment.curve import AGAIN, ROUNDS, asked_next
from holdfast.cliff.commitment.cuts import cuts_of
from holdfast.cliff.commitment.draws import CutRow
from made_rows import rollout

N, N_TOKENS = 8, 110
EVERYTHING = {("harmful/1/None", str(n)) for n in range(N_TOKENS + 1)}


def followed(chance, generator, *, again=None):
    """Draw a row whose chance of complying is known, as `decide` does."""
    again = set() if again is None else again
    row = rollout("harmful", 1, "complied", thinking=N_TOKENS)
    hits, drawn, cuts = {}, {}, {}
    asked = CutRow(row, tuple(cuts_of(row)), range(N))
    for _ in range(ROUNDS + 1):
        for cut in asked.cuts:
            known = drawn.setdefault(cut.name, [])
            assert not set(known) & set(asked.draws)
            known += asked.draws
            came = sum(generator.random() < chance(cut.share) for _ in asked.draws)
            hits[cut.name] = hits.get(cut.name, 0) + came
            cuts[cut.name] = cut
        readings = [
            CutReading(
                cut.share, hits[name] / len(drawn[name]), len(drawn[name]),
                0.0, cut.n_thinking, cut.is_whole,
            )
            for name, cut in sorted(
                cuts.items(), key=lambda each: (each[1].is_whole, each[1].n_thinking)
            )
        ]  # fmt: skip
        asked = asked_next(row, readings, again, N)
        if asked is None:
            break
    return account(readings).name, {name: len(each) for name, each in drawn.items()}


def share(name, chance, n=300, **options):
    generator = random.Random(1)
    found = [followed(chance, generator, **options)[0] for _ in range(n)]
    return found.count(name) / n


@pytest.mark.parametrize(
    "chance",
    [lambda at: at, lambda at: max(0.0, (at - 0.3) / 0.7)],
    ids=["evenly", "evenly, from a third on"],
)
def test_a_row_that_drifts_is_not_taken_for_one_that_jumped(chance):
    assert share("drifted", chance) >= 0.97
    # Without a second look one in ten is.
    assert share("drifted", chance, again=set(EVERYTHING)) < 0.95


@pytest.mark.parametrize("low", [0.0, 0.1])
def test_a_second_look_takes_no_jump_for_a_drift(low):
    def jumps(at):
        return low if at < 0.62 else 1 - low

    found = share("undecided", jumps)
    assert found >= 0.95
    assert found >= share("undecided", jumps, again=set(EVERYTHING)) - 0.01


def test_only_the_two_ends_of_a_jump_are_drawn_again():
    _, drawn = followed(lambda at: float(at > 0.62), random.Random(2))
    assert sorted(drawn.values())[-2:] == [(1 + AGAIN) * N] * 2
    assert set(sorted(drawn.values())[:-2]) == {N}


def test_greedy_draws_are_not_counted_once_more():
    row = rollout("harmful", 1, "complied", thinking=N_TOKENS)
    shares = {n: float(n > 68) for n in (0, 6, 11, 22, 38, 55, 66, 68, 71, 88, 110)}
    cuts = [CutReading(n / 110, share, 1, 0.0, n) for n, share in shares.items()]
    cuts.append(CutReading(1.0, 1.0, 1, None, N_TOKENS, True))
    assert asked_next(row, cuts, set(), 1).draws == range(1, 1 + AGAIN)
    assert asked_next(row, cuts, None, 1) is None


def test_a_row_that_was_decided_waits_for_nothing():
    for chance in (lambda _: 1.0, lambda at: at):
        name, drawn = followed(chance, random.Random(4))
        assert name in ("decided_early", "drifted")
        assert set(drawn.values()) == {N}
