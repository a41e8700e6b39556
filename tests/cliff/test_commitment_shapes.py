"""`holdfast decide`, all of it, on the shapes of SmolLM2 and of a hybrid.

Random weights know no outcome: what is shown is that every part runs, on planted rows,
and that no part claims to have found anything.
"""

import json
import shutil

import pytest

from holdfast.cli.app import run
from holdfast.report.schema import validate
from holdfast.study import Study
from shapes import elsewhere

ROWS = ["--complied-rows", "3", "--refused-rows", "6", "--benign-rows", "6"]
CAUSES = [
    "--swap", "all", "--swap-prompts", "4", "--use", "--use-prompts", "20",
    "--random-directions", "2", "--edited-tokens", "8", "--edited-draws", "1",
]  # fmt: skip


@pytest.fixture(scope="module", params=["smollm2", "qwen3_5_text"])
def ranked(request, tmp_path_factory):
    """A study with planted answers, a probe, and ranked heads."""
    folder = tmp_path_factory.mktemp(request.param)
    study, given = folder / "study", elsewhere(folder, request.param)
    assert run(["rollout", *given, "--max-thinking", "16", "-o", str(study)]) == 0
    assert run(["probe", str(study)]) == 0
    few = ["--selection-prompts", "12", "--checked-heads", "2"]
    assert run(["heads", str(study), *few]) == 0
    return study


@pytest.fixture
def study(ranked, tmp_path):
    return shutil.copytree(ranked, tmp_path / "study")


def block(study, name):
    return json.loads((study / f"decide_{name}.json").read_text())


def test_every_part_that_draws_runs_and_finds_nothing(study):
    flags = [*ROWS, *CAUSES, "--redraw-thinking", "--draw-tokens", "8"]
    assert run(["decide", str(study), *flags]) == 0
    curve = block(study, "curve")
    assert curve["rows"] == {"harmful_complied": 3, "harmful_refused": 6, "benign": 6}
    assert curve["redrawn"]
    assert curve["account"]["fell_at_template"]["value"] is None
    assert curve["account"]["fell_at_template"]["reason"] == curve["unread"] != ""
    assert "an unknown number fell" in curve["evidence"][0]
    assert curve["account"]["drifted"]["value"] == 0
    drawn = Study.open(study).read_table("decide_draws.parquet").to_pylist()
    # Nine cuts that are closed, and eight from which the thinking goes on.
    assert len(drawn) >= 15 * 8 * (9 + 8)
    swap = block(study, "swap")
    assert swap["left_out"] == {}
    heads, *others = (kind["harmful"] for kind in swap["kinds"])
    # What a random model thinks under an edit has no end.
    assert heads["lost"] == {"the thinking under the edit did not close": 4}
    assert heads["effects"]["thinking"]["value"] is None
    for found in others:
        assert found["rows"] > 0
        assert found["rows"] + sum(found["lost"].values()) == 4
    use = block(study, "use")
    assert use["verdict"] != "used"
    counted = {**use["answers"], **use["lost"]}
    assert sum(counted.values()) == 2 * 20
    assert run(["report", str(study)]) == 0
    report = json.loads((study / "report.json").read_text())
    validate(report)
    assert set(report["decide"]) == {"curve", "first_token", "swap", "use"}


def test_first_words_are_read_and_show_nothing(study):
    assert run(["decide", str(study), *ROWS, "--cheap"]) == 0
    curve = block(study, "curve")
    assert curve["cheap"] is True
    assert curve["account"]["fell_at_template"]["value"] is None
    assert curve["account"]["fell_at_template"]["reason"] == curve["unread"] != ""
    assert "an unknown number fell" in curve["evidence"][0]
    rows = Study.open(study).read_table("decide_curve.parquet").to_pylist()
    for row in rows:
        assert len(row["same"]) >= 9
        assert all(0 <= share <= 1 for share in row["same"])
