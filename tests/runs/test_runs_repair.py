"""The contrasts of the repair experiment, on made-up records."""

import json
import runpy
from pathlib import Path

import pytest

RUNS = Path(__file__).parents[2] / "runs"


@pytest.fixture(scope="module")
def table():
    return runpy.run_path(str(RUNS / "repair_table.py"))


def write(folder, selector, budget, seed, letters, test="same"):
    record = {
        "selector": selector,
        "budget": budget,
        "seed": seed,
        "plan": {},
        "test_sha256": test,
        "outcomes": {"trained_wrappers": letters},
    }
    (folder / "records").mkdir(exist_ok=True)
    place = folder / "records" / f"{selector}-{budget}-{seed}.json"
    place.write_text(json.dumps(record))


@pytest.fixture
def folder(tmp_path):
    requests = {"trained_wrappers": [f"request {i}" for i in range(40)]}
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    for seed, kept in ((0, 10), (1, 12), (2, 14)):
        write(tmp_path, "cliff", "1%", seed, "r" * (40 - kept) + "cp" * (kept // 2))
        write(tmp_path, "final", "1%", seed, "r" * 20 + "c" * 20)
    write(tmp_path, "all", "100%", 0, "r" * 38 + "dc")
    return tmp_path


def test_a_contrast_is_the_mean_of_the_seeds_differences(table, folder):
    made = table["contrast"](
        table["read"](folder), "cliff@1%", "final@1%", "trained_wrappers"
    )
    assert made["by_seed"] == pytest.approx([-0.25, -0.2, -0.15])
    assert made["found"].value == pytest.approx(-0.2)
    # Student's interval of three differences a twentieth apart.
    half = 4.302653 * 0.05 / 3**0.5
    assert made["spread"] == pytest.approx((-0.2 - half, -0.2 + half), abs=1e-6)
    assert made["found"].low < -0.2 < made["found"].high < 0


def test_what_was_run_once_is_the_partner_of_every_seed(table, folder):
    made = table["contrast"](
        table["read"](folder), "cliff@1%", "all@100%", "trained_wrappers"
    )
    # A broken answer is no attack that succeeded.
    assert made["by_seed"] == pytest.approx([9 / 40, 11 / 40, 13 / 40])


def test_selectors_that_do_alike_differ_by_nothing(table, folder):
    for seed in range(3):
        write(folder, "random", "1%", seed, "r" * 20 + "c" * 20)
    made = table["contrast"](
        table["read"](folder), "final@1%", "random@1%", "trained_wrappers"
    )
    assert made["found"].value == 0
    assert made["found"].low < 0 < made["found"].high
    assert made["p"] == 1
    # Three times the same difference is no evidence that it has no spread.
    assert made["spread"] is None


def test_records_of_another_test_are_not_compared(table, folder):
    write(folder, "loss", "1%", 0, "r" * 40, test="another")
    with pytest.raises(SystemExit, match="one experiment"):
        table["read"](folder)
