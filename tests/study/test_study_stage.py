"""A stage opened as a context: up to date, interrupted, failed, ended."""

import json

import pyarrow as pa
import pytest

from holdfast.errors import TooFewExamplesError
from holdfast.report.progress import Silent
from holdfast.study import Study, file_sha256
from holdfast.study.batches import Batches
from holdfast.study.files import atomic_write_bytes, fingerprint


class Told(Silent):
    def __init__(self):
        self.said = []

    def say(self, message):
        self.said.append(message)


def _study(tmp_path):
    study = Study.create(tmp_path)
    study.write_json("in.json", {"rows": 3})
    return study


def _open(study, settings, progress=None):
    return study.stage(
        "trace",
        settings,
        ["in.json"],
        progress=progress or Told(),
        done="The traces are there.",
        parts=["trace_*"],
    )


def _run(study, settings, work, progress=None):
    with _open(study, settings, progress) as stage:
        if stage.is_done:
            return stage.read_json("out.json")
        table = Batches(stage, 1).run("abc", work, name=str, length=len, label="")
        stage.write_table("out.parquet", table)
        stage.facts["rows"] = table.num_rows
        return stage.write_json("out.json", {"n": table.num_rows})


def _rows(batch):
    return pa.table({"row_id": batch})


def test_a_stage_that_ends_well_is_recorded_and_not_run_again(tmp_path):
    study, progress = _study(tmp_path), Told()
    assert _run(study, {"limit": 1}, _rows, progress) == {"n": 3}
    inputs = {"in.json": file_sha256(study.path("in.json"))}
    record = json.loads(study.path("study.json").read_text())["stages"]["trace"]
    assert list(record) == [
        *("state", "fingerprint", "settings", "inputs", "started"),
        *("outputs", "finished", "rows"),
    ]
    assert record["fingerprint"] == fingerprint(
        {"stage": "trace", "settings": {"limit": 1}, "inputs": inputs}
    )
    assert record["inputs"] == inputs
    assert record["outputs"] == ["out.parquet", "out.json"]
    assert (record["state"], record["rows"]) == ("done", 3)
    assert progress.said == []
    before = study.path("study.json").read_bytes()
    assert _run(Study.open(tmp_path), {"limit": 1}, None, progress) == {"n": 3}
    assert progress.said == ["The traces are there."]
    assert study.path("study.json").read_bytes() == before


def test_files_that_other_settings_do_not_write_go_when_these_are_there(tmp_path):
    """Also where a run in between was broken off; a file of another stage stays."""
    study, names = _study(tmp_path), ("more.json", "shared.json")

    def run_with(settings, written, fails=False):
        with _open(study, settings) as stage:
            if fails:
                raise KeyboardInterrupt
            for name in written:
                stage.write_json(name, settings)

    run_with({"limit": 1}, ("out.json", *names))
    with study.stage("beside", {}, [], progress=Told(), done="") as stage:
        stage.write_json("shared.json", {})
    with pytest.raises(KeyboardInterrupt):
        run_with({"limit": 2}, (), fails=True)
    # Nothing has taken their place so far.
    assert all(study.path(name).exists() for name in names)
    study = Study.open(tmp_path)
    run_with({"limit": 3}, ("out.json",))
    assert study.path("out.json").exists()
    assert study.path("shared.json").exists()
    assert not study.path("more.json").exists()
    assert "former" not in study.record("trace")


def test_hashes_may_be_given_as_they_are(tmp_path):
    study, hashes = _study(tmp_path), {"elsewhere": "ab"}
    with study.stage("s", {}, hashes, progress=Told(), done="") as stage:
        assert stage.state == "redo"
    assert study.record("s")["inputs"] == hashes


def test_an_interrupted_stage_goes_on_with_its_parts_and_says_so(tmp_path):
    study, progress, seen = _study(tmp_path), Told(), []

    def stopped(batch):
        seen.append(batch)
        if batch == ["b"]:
            raise KeyboardInterrupt
        return _rows(batch)

    with pytest.raises(KeyboardInterrupt):
        _run(study, {}, stopped)
    assert len(study.parts("trace")) == 1
    assert study.record("trace")["state"] == "running"
    more = study.part("trace_more", "0", ".parquet")
    atomic_write_bytes(more, b"x")
    _run(study, {}, lambda batch: seen.append(batch) or _rows(batch), progress)
    assert seen == [["a"], ["b"], ["b"], ["c"]]
    assert progress.said == ["Going on where the last run stopped."]
    assert not more.parent.parent.exists()


def test_what_other_settings_replace_is_said_before_it_is_gone(tmp_path):
    study, progress = _study(tmp_path), Told()
    settings = {"limit": 1, "sampling": {"seed": 0, "top_p": 1.0}}
    _run(study, settings, _rows, progress)
    _run(study, settings | {"limit": 2}, _rows, progress)
    [said] = progress.said
    assert "Replacing out.parquet, out.json: the stage `trace`" in said
    assert "(limit)" in said
    assert "give another study or a copy of this one" in said
    progress.said.clear()
    with _open(study, settings | {"sampling": {"seed": 1}}, progress):
        assert study.path("out.json").exists()
    assert "(limit, sampling.seed, sampling.top_p)" in progress.said[0]


def test_what_follows_from_a_file_made_anew_is_redone_without_a_word(tmp_path):
    study, progress = _study(tmp_path), Told()
    _run(study, {}, _rows, progress)
    study.write_json("in.json", {"rows": 4})
    _run(study, {}, _rows, progress)
    assert progress.said == []
    for prompts in ("ab", "cd"):
        with study.stage(
            "s", {}, {"prompts": prompts}, progress=progress, done=""
        ) as s:
            s.write_json("s.json", {})
    [said] = progress.said
    assert "Replacing s.json: the stage `s`" in said
    assert "(prompts)" in said


def test_parts_that_other_settings_throw_away_are_told(tmp_path):
    study, progress = _study(tmp_path), Told()

    def stopped(batch):
        if batch == ["b"]:
            raise KeyboardInterrupt
        return _rows(batch)

    with pytest.raises(KeyboardInterrupt):
        _run(study, {"limit": 1}, stopped)
    _run(study, {"limit": 2}, _rows, progress)
    [said] = progress.said
    assert said.startswith("Replacing what an interrupted run has drawn: ")


def test_parts_of_other_settings_go(tmp_path):
    study = _study(tmp_path)
    with pytest.raises(KeyboardInterrupt), _open(study, {}):
        raise KeyboardInterrupt
    atomic_write_bytes(study.part("trace_more", "0", ".parquet"), b"x")
    with _open(study, {}) as stage:
        assert stage.state == "continue"
        assert study.parts("trace_more")
        stage.outputs.append("missing")
    with _open(study, {}) as stage:
        assert stage.state == "redo"
        assert not study.parts("trace_more")


def test_a_lack_of_evidence_is_recorded_as_the_reason(tmp_path):
    study = _study(tmp_path)
    lack = TooFewExamplesError("four rows", "three", "Ask more.")
    with pytest.raises(TooFewExamplesError), _open(study, {}):
        raise lack
    record = Study.open(tmp_path).record("trace")
    assert (record["state"], record["reason"]) == ("running", str(lack))
    # What then succeeds has no reason any more.
    _run(study, {}, _rows)
    assert "reason" not in Study.open(tmp_path).record("trace")


def test_a_stage_without_outputs_keeps_its_reason_and_is_not_called_there(tmp_path):
    study, progress = _study(tmp_path), Told()
    for state in ("redo", "done"):
        with _open(study, {}, progress) as stage:
            assert stage.state == state
            stage.facts["reason"] = "no thinking"
    assert study.record("trace")["reason"] == "no thinking"
    assert progress.said == []
