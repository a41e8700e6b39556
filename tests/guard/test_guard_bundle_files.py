"""Bundles whose files were changed by hand: refused, whatever they would score."""

import json
import shutil

import pytest
import torch
from live_bundles import random_bundle
from safetensors.torch import save_file

from holdfast.errors import InputError, SettingsError
from holdfast.guard.monitor.bundle import read_bundle, write_bundle
from holdfast.guard.monitor.control import require_policy
from holdfast.guard.monitor.monitor import Monitor
from holdfast.study import file_sha256

NONE = float("nan")


@pytest.fixture(scope="module")
def written(qwen3, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    return write_bundle(folder, random_bundle(qwen3, {"last": 1.0}))


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def change(folder, *place, to=None):
    """Set one place of the JSON, or take it out."""
    facts = json.loads((folder / "bundle.json").read_text())
    *path, last = place
    at = facts
    for name in path:
        at = at[name]
    if to is None:
        del at[last]
    else:
        at[last] = to
    (folder / "bundle.json").write_text(json.dumps(facts))


CHANGES = {
    "a rule that nobody knows": ("detectors", 5, "rule", "median"),
    "a channel that is none": ("detectors", 5, "channel", "prompt"),
    "a direction that is not there": ("detectors", 5, "reads", "z"),
    "the signal without anchors": ("detectors", 5, "reads", "signal"),
    "no window": ("detectors", 3, "window", 0),
    "more support than window": ("detectors", 3, "support", 9),
    "no sign": ("detectors", 3, "sign", 0),
    "two of one name": ("detectors", 4, "name", "last"),
    "one by the name of all": ("detectors", 4, "name", "any"),
    "a field that nobody reads": ("detectors", 4, "odd", 1),
    "nobody acts": ("acts_on", "nobody"),
    "whoever acts has no threshold": ("thresholds", "last", None),
    "a threshold that is no number": ("thresholds", "last", 0, "value", NONE),
    "a threshold that is text": ("thresholds", "last", 0, "value", "1"),
    "a rate that is none": ("thresholds", "last", 0, "level", 2),
    "an offset that is no number": ("offsets", "b", NONE),
    "an offset that is missing": ("offsets", "b", None),
    "a scale that does not rise": ("scales", "last", [1.0, 1.0, 2.0, 3.0]),
    "a short scale": ("scales", "last", [1.0]),
    "lengths that are missing": ("calibration", "longest", "answer", None),
    "scripts that are one word": ("calibration", "scripts", "LATIN"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_would_score_something_else_or_nothing_is_refused(copy, name):
    *place, value = CHANGES[name]
    read_bundle(copy)
    change(copy, *place, to=value)
    with pytest.raises(InputError, match="a guard bundle in"):
        read_bundle(copy)


def replace(folder, **tensors):
    bundle = read_bundle(folder)
    save_file(bundle.tensors() | tensors, folder / "bundle.safetensors")
    own = file_sha256(folder / "bundle.safetensors")
    change(folder, "tensors_sha256", to=own)


def test_directions_and_heads_of_another_width_are_refused(qwen3, copy):
    replace(copy, **{"direction/b": torch.zeros(5)})
    with pytest.raises(InputError, match=f"directions of {qwen3.d_model} numbers"):
        Monitor(qwen3, read_bundle(copy))
    replace(copy, **{"direction/b": torch.zeros(qwen3.d_model)}, edit=torch.ones(1, 2))
    monitor = Monitor(qwen3, read_bundle(copy))
    require_policy(monitor, "stop")
    with pytest.raises(SettingsError, match="one factor per head"):
        require_policy(monitor, "redraw")
    replace(copy, **{"direction/b": torch.full((qwen3.d_model,), torch.nan)})
    with pytest.raises(InputError, match="numbers that are none"):
        read_bundle(copy)
