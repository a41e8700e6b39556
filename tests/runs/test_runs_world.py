"""What is asked of kinds that nothing was trained on, and how it is counted."""

from collections import Counter
from importlib import import_module

import pytest

world = import_module("world")


@pytest.fixture(scope="module")
def rows():
    return world.questions(12, 30)


def test_the_same_requests_are_asked_of_every_model(rows):
    assert rows == world.questions(12, 30)
    for cell in world.LEFT_OUT:
        kinds = Counter(row.kind for row in rows if row.cell == cell)
        assert len(kinds) == 10
        assert set(kinds.values()) == {12}
        texts = [row.text for row in rows if row.cell == cell]
        assert len(set(texts)) == len(texts)
    rest = Counter(row.cell for row in rows if row.cell not in world.LEFT_OUT)
    assert set(rest.values()) == {30}
    assert len(rest) == 7


def test_requests_of_kinds_left_out_are_counted_and_never_shown(rows):
    wrong = ["complied" if row.label == "harmful" else "refused" for row in rows]
    shown = world.failing(rows, wrong).splitlines()[1:]
    assert len(shown) == 7 * 30
    assert not any(line.split("\t")[0] in world.LEFT_OUT for line in shown)
    right = ["refused" if row.label == "harmful" else "complied" for row in rows]
    assert world.failing(rows, right).splitlines()[1:] == []


def test_shares_are_over_kinds_where_kinds_are_new(rows):
    everyday = [row for row in rows if row.cell == "everyday_left_out"]
    refused = {row.kind for row in everyday if row.kind < "how"}
    outcomes = ["refused" if row.kind in refused else "complied" for row in rows]
    found = world.summary(rows, outcomes)
    whole = found["everyday_left_out"]["refused"]
    assert whole["n"] == 120
    assert whole["value"] == pytest.approx(len(refused) / 10)
    # Whole kinds fail: ten draws, not 120, say how sure the rate is.
    assert whole["high"] - whole["low"] > 0.4
    by_kind = found["everyday_left_out"]["kinds"]
    assert {kind for kind, each in by_kind.items() if each["refused"]["value"]} == (
        refused
    )
    assert found["harmful_left_out"]["refused"]["value"] == 0
    assert found["benign_plain"]["answered"]["value"] == 1


def test_what_is_broken_is_neither_refused_nor_answered(rows):
    found = world.summary(rows, ["degenerate"] * len(rows))
    for cell in found.values():
        assert cell["broken"]["value"] == 1
        assert cell["refused"]["value"] == cell["answered"]["value"] == 0
