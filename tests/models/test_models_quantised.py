"""Checkpoints whose weights are packed, read as they are."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import transformers

pytest.importorskip("accelerate", reason="packed weights need accelerate")

from holdfast.errors import EnvironmentProblem, InputError, ModelError
from holdfast.models.containers import quantised
from holdfast.models.containers.quantised import (
    all_tensors,
    is_packed,
    method_of,
    require_savable,
)
from holdfast.models.finite import check_numbers
from holdfast.models.loading.causal import load
from holdfast.models.loading.checkpoint import find_checkpoint
from holdfast.models.loading.parts import open_model
from holdfast.models.loading.weights import (
    fingerprint_files,
    fingerprint_model,
    read_tokenizer,
)
from tiny_models import edit_json, random_sequences, tiny_model

IDS = torch.tensor(random_sequences([12]))
BLOCK = 16
FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": ["lm_head"],
}
TENSORS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}
            | {"symmetric": True, "dynamic": False},
        }
    },
}


def opened(path, dtype="float32"):
    """The model of a checkpoint, its identity, and the checkpoint."""
    checkpoint = find_checkpoint(path, None)
    model, _, identity = open_model(
        checkpoint, torch.device("cpu"), dtype, read_tokenizer
    )
    return model, identity, checkpoint


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.fixture(scope="session")
def plain(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("plain")
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
    model = tiny_model("llama", attention_bias=False, initializer_range=0.1, **sizes)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def in_blocks(weight):
    """The fp8 numbers of a weight by blocks, its scales, and what they say."""
    rows, columns = (size // BLOCK for size in weight.shape)
    blocks = weight.float().reshape(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448
    packed = (blocks / scales).to(torch.float8_e4m3fn)
    value = (packed.float() * scales).reshape(weight.shape)
    return packed.reshape(weight.shape), scales[:, 0, :, 0].contiguous(), value


def repacked(plain, folder, pack, settings):
    """Pack the projections of a checkpoint by hand; returns what they are worth."""
    shutil.copytree(plain, folder)
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    values = dict(weights)
    for name in [each for each in weights if each.endswith("proj.weight")]:
        weights |= pack(name, weights[name], values)
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    edit_json(folder / "config.json", quantization_config=settings)
    return values


@pytest.fixture
def fp8(plain, tmp_path):
    """A checkpoint in blocks of fp8, and its weights as its scales say."""

    def pack(name, weight, values):
        packed, scales, values[name] = in_blocks(weight)
        return {name: packed, f"{name}_scale_inv": scales}

    folder = tmp_path / "fp8"
    return folder, repacked(plain, folder, pack, FP8)


def twin_of(plain, values):
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype="float32")
    model.load_state_dict(values)
    return model.eval()


def test_blocks_of_fp8_have_the_values_that_their_scales_say(fp8, plain):
    folder, values = fp8
    model, identity, checkpoint = opened(folder)
    assert checkpoint.quantised == "fp8"
    # All in one arithmetic: what was never packed comes in another otherwise.
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert identity.dtype == "float32"
    assert torch.equal(logits(model), logits(twin_of(plain, values)))
    adapter = load(folder)
    assert all(proof.passed for proof in adapter.proofs)


def test_a_scale_is_a_part_of_the_fingerprint(fp8):
    folder, _ = fp8
    before = fingerprint_files(find_checkpoint(folder, None))
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["model.layers.1.self_attn.o_proj.weight_scale_inv"][0, 0] *= 2
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    assert fingerprint_files(find_checkpoint(folder, None)) != before


def test_a_packed_number_that_is_none_is_named(plain):
    model = transformers.AutoModelForCausalLM.from_pretrained(plain)
    projection = model.model.layers[1].self_attn.o_proj
    packed = projection.weight.detach().to(torch.float8_e4m3fn)
    projection.weight = torch.nn.Parameter(packed, requires_grad=False)
    check_numbers(model, "packed")
    packed.view(torch.uint8)[3, 5] = 0x7F
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.o_proj.*\[3, 5\]"):
        check_numbers(model, "packed")


def test_a_copy_of_expanded_blocks_is_another_model_and_is_refused(fp8, tmp_path):
    folder, _ = fp8
    model, _, checkpoint = opened(folder)
    model.save_pretrained(tmp_path / "copy")
    copy = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "copy", dtype="float32"
    )
    # That this becomes right is the day to look at the refusal again.
    assert (logits(copy) - logits(model)).abs().max() > 1
    assert not is_packed(model)
    with pytest.raises(ModelError, match="quantised by fp8"):
        require_savable(model, checkpoint.quantised)


def test_training_whole_weights_is_refused_before_it_begins(fp8, tmp_path):
    from holdfast.finetune.settings import Recipe
    from holdfast.finetune.trainer import train

    adapter = load(fp8[0])
    told = {"fingerprint": "", "told": lambda *_: None}
    for recipe, whole in ((Recipe(method="full"), False), (Recipe(), True)):
        with pytest.raises(ModelError, match=r"quantised by fp8.*Write an adapter"):
            train(adapter, [], recipe, tmp_path, whole=whole, **told)
    over = replace(adapter, source=adapter.source._replace(adapter=tmp_path))
    # Writing an adapter is what was asked for here, and is no way out.
    with pytest.raises(ModelError, match=r"quantised by fp8.*over the base alone"):
        train(over, [], Recipe(), tmp_path, **told)


def test_a_plain_model_may_be_saved(plain):
    model, _, checkpoint = opened(plain)
    require_savable(model, checkpoint.quantised)


def test_missing_weights_of_a_packed_checkpoint_are_named(fp8):
    folder, _ = fp8
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    del weights["model.layers.1.input_layernorm.weight"]
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="missing keys"):
        opened(folder)


def test_a_missing_package_is_named(monkeypatch):
    config = {"quantization_config": {"load_in_4bit": True}}
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="pip install accelerate bitsandbytes"):
        method_of(config, "a model")
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    with pytest.raises(EnvironmentProblem, match="accelerate compressed-tensors"):
        method_of(config, "a model")


def test_a_quantisation_without_a_method_is_named():
    assert method_of({"quantization_config": None}, "a model") is None
    for said in ({"bits": 4}, "four", {"quant_method": 4}):
        with pytest.raises(InputError, match="`quant_method`"):
            method_of({"quantization_config": said}, "a model")


def test_compressed_tensors_are_read_as_they_are(plain, tmp_path):
    pytest.importorskip("compressed_tensors", reason="it reads these files")

    def pack(name, weight, values):
        scales = weight.float().abs().amax(1, keepdim=True).to(torch.bfloat16) / 448
        packed = (weight.float() / scales.float()).to(torch.float8_e4m3fn)
        values[name] = packed.float() * scales.float()
        return {name: packed, f"{name}_scale": scales}

    folder = tmp_path / "compressed"
    values = repacked(plain, folder, pack, TENSORS)
    model, _, checkpoint = opened(folder)
    assert checkpoint.quantised == "compressed-tensors"
    check_numbers(model, "compressed")
    expected = logits(twin_of(plain, values))
    assert torch.allclose(logits(model), expected, atol=1e-2 * float(expected.max()))
    load(folder).require("heads")
    with pytest.raises(ModelError, match="quantised by compressed-tensors"):
        require_savable(model, checkpoint.quantised)


def _with_torchao():
    pytest.importorskip("torchao", reason="it reads these files")
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig()), "torchao", torch.float32


def _with_bitsandbytes(**bits):
    pytest.importorskip("bitsandbytes", reason="it reads these files")
    return transformers.BitsAndBytesConfig(**bits), "bitsandbytes", torch.bfloat16


METHODS = {
    "torchao": _with_torchao,
    "8 bits": lambda: _with_bitsandbytes(load_in_8bit=True),
    "4 bits": lambda: _with_bitsandbytes(load_in_4bit=True),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_weights_packed_by_a_library_are_read_as_they_are(
    plain, tmp_path, tokenizer, name
):
    settings, method, dtype = METHODS[name]()
    made = transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=settings, dtype="bfloat16", device_map={"": "cpu"}
    )
    made.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, identity, checkpoint = opened(tmp_path)
    assert checkpoint.quantised == method
    # Whatever was asked for, the record says what it runs in.
    assert identity.dtype == str(dtype).removeprefix("torch.")
    assert is_packed(model)
    check_numbers(model, name)
    expected = logits(made)
    assert (logits(model) - expected).abs().max() < 0.02 * expected.abs().max()
    before = fingerprint_model(model, {})
    assert (logits(model) - expected).abs().max() < 0.02 * expected.abs().max()
    [packed, *_] = (
        tensor
        for key, tensor in all_tensors(model)
        if "o_proj.weight" in key and tensor.element_size() == 1
    )
    packed.view(torch.uint8)[0, 0] ^= 1
    assert fingerprint_model(model, {}) != before
    with pytest.raises(ModelError, match=f"quantised by {method}"):
        require_savable(model, checkpoint.quantised)
    with pytest.raises(ModelError, match="quantised by another library"):
        require_savable(model, None)
    load(tmp_path).require("states")
    assert logging.getLogger("bitsandbytes").level == logging.ERROR
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]
