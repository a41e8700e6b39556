import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pyarrow as pa
import pytest

from holdfast.errors import InputError, StorageError
from holdfast.study import (
    Study,
    atomic_write_json,
    atomic_write_text,
    canonical_json,
    fingerprint,
)
from holdfast.study import files as study_files


@dataclass(frozen=True)
class Settings:
    limit: int = 3
    sources: tuple[str, ...] = ("a", "b")


def test_a_fingerprint_does_not_depend_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_a_dataclass_and_its_fields_have_one_canonical_json():
    assert canonical_json(Settings()) == '{"limit":3,"sources":["a","b"]}'


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    atomic_write_text(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space left") as caught:
        atomic_write_text(path, "new")
    assert caught.value.exit_status == 5
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_an_unknown_error_of_the_system_is_told_in_its_words(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(errno.EINVAL, "odd")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StorageError, match="odd"):
        atomic_write_text(tmp_path / "file.txt", "new")


def test_not_a_number_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        atomic_write_json(tmp_path / "x.json", {"value": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_a_stage_is_done_only_with_the_same_settings_inputs_and_outputs(tmp_path):
    study = Study.create(tmp_path / "study")
    state, key = study.begin("probe", Settings(), {"rollouts": "h1"})
    assert state == "redo"
    assert study.begin("probe", Settings(), {"rollouts": "h1"}) == ("continue", key)
    study.write_json("out.json", {})
    study.finish("probe", ["out.json"])
    again = Study.open(tmp_path / "study")
    assert again.begin("probe", Settings(), {"rollouts": "h1"})[0] == "done"
    study.path("out.json").unlink()
    assert again.begin("probe", Settings(), {"rollouts": "h1"})[0] == "redo"
    again.write_json("out.json", {})
    again.finish("probe", ["out.json"])
    assert again.begin("probe", Settings(limit=4), {"rollouts": "h1"})[0] == "redo"
    again.finish("probe", ["out.json"])
    assert again.begin("probe", Settings(limit=4), {"rollouts": "h2"})[0] == "redo"


def test_parts_survive_an_interruption_and_not_a_change(tmp_path):
    study = Study.create(tmp_path)
    study.begin("rollout", Settings(), {})
    part = study.part("rollout", "0000", ".parquet")
    study_files.atomic_write_bytes(part, b"x")
    assert study.begin("rollout", Settings(), {})[0] == "continue"
    assert part.exists()
    assert study.begin("rollout", Settings(limit=9), {})[0] == "redo"
    assert not part.exists()
    assert not part.parent.parent.exists()


def test_a_folder_that_is_no_study_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="a folder without study"):
        Study.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="no readable study"):
        Study.open(tmp_path)


def test_a_damaged_manifest_and_an_old_schema_are_named(tmp_path):
    manifest = tmp_path / "study.json"
    manifest.write_text("{")
    with pytest.raises(InputError, match="a damaged file"):
        Study.open(tmp_path)
    manifest.write_text(json.dumps({"schema": "holdfast-study/0"}))
    with pytest.raises(InputError, match="holdfast-study/0"):
        Study.create(tmp_path)


@pytest.mark.parametrize(
    ("name", "next_step"),
    [
        ("rollouts.parquet", "Run `holdfast rollout` into this folder"),
        ("probes/final.json", "Run `holdfast probe` on the study"),
        ("trace.parquet", "Run `holdfast trace` on the study"),
        ("controls.json", "`holdfast audit` runs them all"),
        ("signal.parquet", "Run `holdfast signal` on the study"),
        ("guard/detectors.safetensors", "Run `holdfast guard fit` on the study"),
        ("generations.parquet", "the same `holdfast audit` or .* with --judge"),
        ("evaluation.json", "Only `holdfast evaluate` writes it"),
    ],
)
def test_a_missing_file_names_what_writes_it(tmp_path, name, next_step):
    with pytest.raises(InputError, match=next_step) as caught:
        Study.create(tmp_path).require(name)
    assert ("runs them all" in str(caught.value)) == (name == "controls.json")


def test_two_processes_cannot_work_on_one_study(tmp_path):
    study = Study.create(tmp_path)
    leftover = tmp_path / ".report.json.1.tmp"
    leftover.write_bytes(b"half")
    code = (
        "import sys; from holdfast.study import Study\n"
        "with Study.open(sys.argv[1]).lock(): pass\n"
    )
    with study.lock():
        assert not leftover.exists()
        second = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
        )
    assert "another holdfast process" in second.stderr
    with study.lock():
        pass


def test_tables_and_json_come_back_as_they_were_and_damage_is_named(tmp_path):
    study = Study.create(tmp_path)
    table = pa.table({"a": [1, 2], "b": [[1, 2], []]})
    study.write_table("a.parquet", table)
    assert study.read_table("a.parquet").equals(table)
    study.path("a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="a damaged file"):
        study.read_table("a.parquet")
    study.path("a.json").write_text("{")
    with pytest.raises(InputError, match="a damaged file"):
        study.read_json("a.json")
    with pytest.raises(InputError, match="Run the earlier stages first"):
        study.read_table("b.parquet")
