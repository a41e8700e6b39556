"""Models over several devices, as far as one machine without a GPU shows it."""

import pytest
import torch

from holdfast.errors import AdapterError, EnvironmentProblem, SettingsError
from holdfast.models.containers import placement
from holdfast.models.finite import check_numbers
from holdfast.models.loading import parts, weights
from holdfast.models.loading.causal import load_found
from holdfast.models.loading.checkpoint import find_checkpoint
from holdfast.models.loading.weights import read_model
from tiny_models import random_sequences


def test_balanced_without_a_gpu_is_the_cpu_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parts.choose_device("balanced") == torch.device("cpu")
    assert "No GPU is found" in caplog.text


def test_balanced_with_gpus_is_left_to_accelerate(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = parts.choose_device("balanced")
    assert placement.device_map(device, packed=False) == {"device_map": "balanced"}
    # The checkpoint's own arithmetic, as on any accelerator.
    config = {"dtype": "bfloat16"}
    assert parts.choose_dtype("auto", device, config) == torch.bfloat16
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="pip install accelerate"):
        parts.choose_device("balanced")


def test_a_device_on_which_nothing_runs_is_refused():
    with pytest.raises(SettingsError, match="nothing runs there"):
        parts.choose_device("meta")


def test_packed_weights_are_read_to_where_they_stay():
    cpu = torch.device("cpu")
    assert placement.device_map(cpu, packed=True) == {"device_map": {"": cpu}}
    assert placement.device_map(cpu, packed=False) == {}


def test_what_is_offloaded_is_said_and_gives_the_same_logits(
    saved, tmp_path, monkeypatch, caplog
):
    pytest.importorskip("accelerate", reason="it spreads models")
    checkpoint = find_checkpoint(saved, None)
    plain = read_model(checkpoint, torch.float32, torch.device("cpu"))
    here = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm"]
    places = dict.fromkeys([*here, "lm_head"], "cpu")
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    monkeypatch.setattr(
        weights,
        "device_map",
        lambda device, packed: {"device_map": places, "offload_folder": tmp_path},
    )
    spread = read_model(checkpoint, torch.float32, placement.SPREAD)
    assert "cpu (5 parts), disk (2 parts)" in caplog.text
    assert "fetched in every pass" in caplog.text
    check_numbers(spread, "spread")
    adapter = load_found(checkpoint, placement.SPREAD, "float32")
    adapter.require("states")
    with pytest.raises(AdapterError, match=r"those of layers \[1, 2\] are fetched"):
        adapter.require("heads")
    ids = torch.tensor(random_sequences([9]))
    with torch.no_grad():
        assert torch.equal(spread(ids).logits, plain(ids).logits)


def test_a_model_on_one_device_is_not_said_to_be_spread(saved, caplog):
    read_model(find_checkpoint(saved, None), torch.float32, torch.device("cpu"))
    assert not caplog.records
