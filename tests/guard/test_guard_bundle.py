"""From a study to a bundle, by the command line, and back from its files."""

import json
import re
import shutil

import pytest

from holdfast.cli.app import run
from holdfast.errors import TooFewExamplesError
from holdfast.guard.monitor.bundle import read_bundle
from holdfast.guard.monitor.calibrate import threshold_of
from holdfast.guard.monitor.fit import live_rows
from holdfast.guard.monitor.monitor import Monitor
from holdfast.guard.monitor.rules import ANY
from holdfast.models.loading.causal import load
from holdfast.rollout.rows import from_table
from holdfast.study import Study

FEW = ("--rates", "0.2", "--min-calibration", "5", "--window", "4", "--support", "3")


@pytest.fixture(scope="module")
def bundled(audited, tmp_path_factory):
    """A bundle of the thinker's study, with an edit to steer with."""
    folder = tmp_path_factory.mktemp("bundles")
    heads = folder / "heads.json"
    heads.write_text(json.dumps({"heads": [[0, 1]], "factor": 0}))
    place = folder / "bundle"
    words = ["guard", "bundle", str(audited), "-o", str(place), "--edit", str(heads)]
    assert run([*words, *FEW]) == 0
    return place


def test_a_bundle_says_what_it_belongs_to_and_on_what_it_was_set(bundled, audited):
    facts = json.loads((bundled / "bundle.json").read_text())
    model = Study.open(audited).manifest["model"]
    assert facts["model"]["weights_sha256"] == model["weights_sha256"]
    assert facts["serving"]["engine"] == "holdfast"
    assert facts["calibration"]["scripts"] == ["LATIN"]
    assert set(facts["calibration"]["requests"]) <= {"benign", "benign_wrapped"}
    assert facts["acts_on"] in facts["thresholds"]
    assert {"cliff", "refusal_end", "answer_mean", ANY} <= set(facts["thresholds"])
    for by in facts["thresholds"].values():
        for each in by:
            assert each["level"] == 0.2
            assert 0 <= each["low"] < each["high"] <= 1


def test_no_row_is_for_two_things(audited):
    rows = live_rows(from_table(Study.open(audited).read_table("rollouts.parquet")))
    parts = [{row.request_id for row in part} for part in rows]
    fit, choice, calibration, test = parts
    assert all(parts)
    assert not calibration & (fit | choice | test)
    assert not choice & (fit | test)
    assert not fit & test
    assert all(row.label == "benign" for row in rows.calibration)


def test_the_benign_rows_it_was_calibrated_on_are_flagged_no_more_than_promised(
    bundled, audited, thinker
):
    monitor = Monitor(load(str(thinker)), read_bundle(bundled), rate=0.2)
    rows = live_rows(from_table(Study.open(audited).read_table("rollouts.parquet")))
    pairs = [
        (row.token_ids[: row.spans.prompt[1]], row.token_ids[row.spans.prompt[1] : -1])
        for row in rows.calibration
    ]
    last = [path[-1] for path in monitor.score_texts(pairs)]
    assert all(each.abstains is None for each in last)
    for name in monitor.limits:
        for role in ("benign", "benign_wrapped"):
            own = [
                name in each.fired
                for row, each in zip(rows.calibration, last, strict=True)
                if row.role == role
            ]
            assert sum(own) <= 0.2 * (len(own) + 1), (name, role)


def test_too_few_benign_requests_are_refused_with_their_counts(audited, tmp_path):
    words = ["guard", "bundle", str(audited), "-o", str(tmp_path / "b")]
    assert run(words) == TooFewExamplesError.exit_status
    assert not (tmp_path / "b").exists()
    wrong = [*words, *FEW, "--acts-on", "nobody"]
    assert run(wrong) == 2
    assert run([*words, *FEW, "--support", "9"]) == 2


def test_the_threshold_is_the_highest_that_a_kind_of_request_needs(audited):
    rows = live_rows(from_table(Study.open(audited).read_table("rollouts.parquet")))
    benign = rows.calibration
    column = [float(row.role == "benign_wrapped") for row in benign]
    assert threshold_of(column, benign, 0.2).value == 1.0
    # A row that nothing was read of is below all others.
    missing = [None if value == 0 else value for value in column]
    assert threshold_of(missing, benign, 0.2).value == 1.0
    assert threshold_of([None] * len(benign), benign, 0.2).value == -1.0


def test_a_bundle_is_tried_live_on_rows_that_it_has_not_seen(bundled, audited, capsys):
    capsys.readouterr()
    policies = [
        word
        for p in ("stop", "refuse", "steer", "redraw")
        for word in ("--policies", p)
    ]
    words = ["guard", "live", str(audited), "--guard", str(bundled), "--rate", "0.2"]
    assert run([*words, *policies, "--limit", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["policies"]) == {"stop", "refuse", "steer", "redraw"}
    for name, each in found["policies"].items():
        assert each["unfired_rows"]["other_tokens"] == 0, name
        assert each["unfired_rows"]["n"] > 0
        success = each["attack_success"]["all wrappers"]
        assert success["before"]["n"] == success["after"]["n"] == 8
    # Whoever stops lets nothing more out than was let out before.
    for pair in found["policies"]["stop"]["attack_success"].values():
        if pair["before"]["value"] is not None:
            assert pair["after"]["value"] <= pair["before"]["value"]
    detectors = {each["detector"] for each in found["detectors"]}
    assert {"cliff", ANY} <= detectors
    assert any("fewer than 1000" in note for note in found["notes"])
    # The second time nothing is drawn, and the same is said.
    assert run([*words, *policies, "--limit", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert run([*words, *policies, "--limit", "8"]) == 0
    told = capsys.readouterr().out
    assert "Attack success" in told
    # Each figure stands whole on a line of 80 columns.
    assert "benign, wrapped" in told
    assert re.search(r"│ +benign +│ \d\.\d{3} \(\d\.\d{3} to \d\.\d{3}; n = ", told)


def test_a_bundle_of_another_study_is_not_tried(bundled, audited, tmp_path, capsys):
    other = tmp_path / "bundle"
    shutil.copytree(bundled, other)
    facts = json.loads((other / "bundle.json").read_text())
    facts["study"]["rollouts_sha256"] = "0" * 64
    (other / "bundle.json").write_text(json.dumps(facts))
    assert run(["guard", "live", str(audited), "--guard", str(other)]) == 2
    assert "of other answers" in " ".join(capsys.readouterr().err.split())
