import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.cli.app import run
from holdfast.errors import InputError
from holdfast.rollout.session import Session
from holdfast.rollout.settings import ModelSettings
from holdfast.study import Study


@pytest.fixture
def claimed(thinker, tmp_path, monkeypatch):
    """A study of a model that was named by a path from where the command ran."""
    shutil.copytree(thinker, tmp_path / "runs" / "model")
    monkeypatch.chdir(tmp_path)
    study = Study.create(tmp_path / "study")
    Session("runs/model").claim(study)
    return study


def test_a_study_says_where_its_model_lay(claimed, tmp_path):
    manifest = json.loads((claimed.directory / "study.json").read_text())
    assert manifest["model"]["id"] == "runs/model"
    assert manifest["loading"]["directory"] == str(tmp_path / "runs" / "model")


def test_a_model_named_by_a_path_is_found_from_any_folder(
    claimed, tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    session = Session.of(Study.open(claimed.directory), ModelSettings())
    session.check_same(claimed)
    assert session.name == "runs/model"
    assert session.adapter.source.directory == tmp_path / "runs" / "model"


def test_the_same_command_from_another_folder_finds_the_model_and_asks_no_hub(
    claimed, tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    session = Session("runs/model")
    session.claim(claimed)
    assert session.adapter.source.directory == tmp_path / "runs" / "model"
    assert claimed.manifest["loading"]["directory"] == str(tmp_path / "runs" / "model")
    (tmp_path / "runs").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="where it lay; found no such directory"):
        Session("runs/model").claim(claimed)


def test_a_session_keeps_to_the_folder_that_it_was_made_in(
    claimed, tmp_path, monkeypatch
):
    session = Session("runs/model")
    monkeypatch.chdir("/")
    assert session.fingerprints()["weights_sha256"]
    assert session.adapter.n_layers == 2


def test_the_same_model_under_another_name_goes_on_with_its_study(
    claimed, tmp_path, monkeypatch
):
    before = dict(claimed.manifest["model"])
    monkeypatch.chdir(tmp_path / "runs")
    Session("model").claim(claimed)
    Session(str(tmp_path / "runs" / "model")).claim(claimed)
    assert claimed.manifest["model"] == before


def test_a_model_that_was_moved_is_missed_by_place_and_taken_up_at_the_new_one(
    claimed, tmp_path
):
    before = dict(claimed.manifest["model"])
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    with pytest.raises(InputError, match="where it lay; found no such directory"):
        Session.of(claimed, ModelSettings())
    Session("moved/model").claim(claimed)
    assert claimed.manifest["model"] == before
    place = claimed.manifest["loading"]["directory"]
    assert place == str(tmp_path / "moved" / "model")
    assert Session.of(claimed, ModelSettings()).adapter.n_layers == 2


def test_another_model_of_the_same_relative_name_is_another_model(
    claimed, tmp_path, monkeypatch
):
    other = tmp_path / "elsewhere" / "runs" / "model"
    shutil.copytree(tmp_path / "runs" / "model", other)
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] += torch.ones(())
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"found one of runs/model in "):
        Session("runs/model").claim(claimed)


def test_a_rollout_without_a_place_says_where_its_study_lies(
    thinker, world, tmp_path, monkeypatch, capsys
):
    shutil.copytree(thinker, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    command = ["rollout", "model", *world, "--limit", "4"]
    assert run(command) == 0
    [study] = (tmp_path / "studies").iterdir()
    assert study.name.startswith("model-")
    said = f"\nThe study lies in {study.relative_to(tmp_path)}\n"
    assert capsys.readouterr().out.endswith(said)
    assert run([*command, "--json"]) == 0
    assert "lies in" not in capsys.readouterr().out


def test_a_report_does_not_tell_the_folders_of_this_machine(
    thinker, world, tmp_path, monkeypatch
):
    shutil.copytree(thinker, tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    command = ["rollout", "model", *world, "--limit", "4", "-o", "../study"]
    assert run(command) == 0
    monkeypatch.chdir(tmp_path)
    assert run(["rollout", "here/model", *command[2:-1], "study"]) == 0
    manifest = json.loads((tmp_path / "study" / "study.json").read_text())
    assert str(tmp_path) not in json.dumps(manifest["model"])
