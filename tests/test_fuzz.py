"""Some damaged files of every kind; `runs/fuzz.py` tries thousands of them."""

import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "runs"))

import fuzz
import fuzz_surfaces

CASES = 14


@pytest.fixture(scope="module")
def opened(thinker, tmp_path_factory):
    world = fuzz_surfaces.World.write(tmp_path_factory.mktemp("fuzz"), thinker)
    with fuzz_surfaces.surfaces(world) as found:
        yield found


@pytest.mark.parametrize(
    "name", ["config", "index", "adapter", "imports", "pools", "judge"]
)
def test_damaged_files_are_read_or_refused_in_one_line(name, opened):
    campaign = fuzz.Campaign(name, opened[name])
    campaign.run(CASES, 7, shrinks=0)
    assert campaign.faults == {}
    assert campaign.ends.total() == CASES
    assert set(campaign.ends) <= set(fuzz_surfaces.KINDS.values())


class Broken:
    """A surface that fails from some size on, in two ways."""

    def cases(self):
        return st.integers(0, 1000)

    def run(self, case, folder):
        if case >= 700:
            figure = {"value": 0.5, "n": 3, "unjudged": 3}
            fuzz_surfaces.check_rates({"x": figure}, lambda _: True)
        if case >= 200:
            raise fuzz_surfaces.Fault("other", "what was said")
        return fuzz_surfaces.Ended(0, "")


def test_every_failure_is_shrunk_and_the_other_cases_are_counted():
    campaign = fuzz.Campaign("broken", Broken())
    campaign.run(100, 0)
    assert campaign.faults["other"] == ("200", "what was said")
    assert campaign.faults["a rate without a judged row"][0] == "700"
    assert set(campaign.ends) == {"accepted", *campaign.faults}
    assert campaign.ends.total() == 100


FIGURE = {"value": 0.0, "n": 4}


@pytest.mark.parametrize(
    ("block", "is_judged", "is_right"),
    [
        ({"a": [FIGURE]}, True, True),
        ({"a": [FIGURE]}, False, False),
        ({"a": FIGURE | {"unjudged": 4}}, True, False),
        ({"a": FIGURE | {"unjudged": 3}}, True, True),
        ({"a": FIGURE | {"value": None}}, False, True),
        ({"unparsed": FIGURE | {"value": 1.0}}, False, True),
    ],
)
def test_a_rate_needs_a_judged_row(block, is_judged, is_right):
    if is_right:
        fuzz_surfaces.check_rates(block, lambda _: is_judged)
        return
    with pytest.raises(fuzz_surfaces.Fault, match="'value': 0"):
        fuzz_surfaces.check_rates(block, lambda _: is_judged)


def test_an_exception_of_a_command_is_a_fault_at_its_place(monkeypatch):
    def fails(*_):
        raise KeyError("x")

    monkeypatch.setattr(fuzz_surfaces, "run", fails)
    with pytest.raises(fuzz_surfaces.Fault) as caught:
        fuzz_surfaces.command("doctor")
    assert caught.value.key == "KeyError in ?"
    monkeypatch.setattr(fuzz_surfaces, "run", lambda _: 130)
    with pytest.raises(fuzz_surfaces.Fault):
        fuzz_surfaces.command("doctor")
    monkeypatch.setattr(fuzz_surfaces, "run", lambda _: sys.stderr.write("a\nb") and 2)
    with pytest.raises(fuzz_surfaces.Fault):
        fuzz_surfaces.command("doctor")
