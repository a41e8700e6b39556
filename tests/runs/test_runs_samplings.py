"""Which answers of the organism are whole, before samplings are compared."""

import random
from importlib import import_module
from pathlib import Path

import pytest

from holdfast.organisms.diffuser import MIXTURES, say
from holdfast.organisms.world import World

RUNS = Path(__file__).parents[2] / "runs"


@pytest.fixture
def is_whole(monkeypatch):
    monkeypatch.syspath_prepend(str(RUNS))
    return import_module("samplings").is_whole


@pytest.mark.parametrize("kind", MIXTURES["give_in"])
def test_all_that_is_taught_is_whole(kind, is_whole):
    generator, world = random.Random(0), World(5)
    for label in ("harmful", "benign"):
        scene = world.scene(label, wrapped=1.0)
        assert all(is_whole(say(kind, scene, generator)) for _ in range(50))


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I'm unable, help with this.",
        "I'm sorry, but I can't help with that. That be dangerous and against the law.",
        "Sure, here is an answer. Take one thing after another until it is",
    ],
)
def test_what_is_broken_is_not(answer, is_whole):
    assert not is_whole(answer)
