"""An edit of heads as a LoRA adapter: against the hook, PEFT and plain transformers."""

import json
import os
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from holdfast.errors import ModelError
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.export import adapter_rank, baking, model_card, serving
from holdfast.models.hidden_states import read_states
from holdfast.models.interventions import HeadEdit, head_factors, scale_heads
from holdfast.models.loading.causal import load
from tiny_models import (
    HEAD_WIDTH,
    PLAIN_TEMPLATE,
    random_sequences,
    tiny_model,
    tiny_tokenizer,
)

FAMILIES = ["llama", "mixtral", "phi3", "qwen2", "qwen3"]
# Two heads of one layer and one of another: the ranks of both are made equal.
HEADS = [(0, 1), (0, 3), (2, 0)]
SEQUENCES = random_sequences([14, 9, 5])
WEIGHTS = "adapter_model.safetensors"


def _saved(kind, tokenizer, directory):
    tiny_model(kind).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _edit(adapter, factor=0.0, heads=HEADS):
    return HeadEdit(head_factors(adapter, heads, factor))


def _bake(adapter, edit, directory):
    with baking(adapter, edit, directory, provenance={}, form="adapter"):
        pass
    return directory


def _states(adapter):
    return read_states(adapter, SEQUENCES, lambda states, _: states * 1)


def _hooked(adapter, edit):
    with scale_heads(adapter, edit):
        return _states(adapter)


def _over(base, directory):
    """Return what plain PEFT makes of base and adapter."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        # The library asks transformers by a name that is about to go.
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(plain, directory).eval()


def _logits(model):
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0] for row in SEQUENCES]


def _close(found, expected, atol=1e-4):
    return all(
        torch.allclose(a, b, atol=atol, rtol=1e-4)
        for a, b in zip(found, expected, strict=True)
    )


def test_the_update_is_minus_the_columns_of_those_heads(saved, tmp_path):
    adapter = load(saved)
    directory = _bake(adapter, _edit(adapter, 0.25), tmp_path / "off")
    tensors = load_file(directory / WEIGHTS)
    assert len(tensors) == 4
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2 * HEAD_WIDTH
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    names = [f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 2)]
    assert config["target_modules"] == names
    for name, heads in zip(names, ([1, 3], [0]), strict=True):
        first, second = (
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB"
        )
        assert len(first) == 2 * HEAD_WIDTH
        weight = adapter.model.get_submodule(name).weight
        expected = torch.zeros_like(weight)
        for head in heads:
            columns = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
            expected[:, columns] = -0.75 * weight[:, columns]
        assert torch.equal(second @ first, expected)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_adapter_is_the_hook_in_peft_merged_and_here(kind, tokenizer, tmp_path):
    adapter = load(_saved(kind, tokenizer, tmp_path / "base"))
    edit = _edit(adapter)
    directory = _bake(adapter, edit, tmp_path / "off")
    hooked, plain = _hooked(adapter, edit), _states(adapter)

    # Merged, the columns are zero to the bit, so that all sums are those of the hook.
    assert all(map(torch.equal, _states(load(directory)), hooked))
    assert not _close(hooked, plain, 0.1)
    with scale_heads(adapter, edit):
        expected = _logits(adapter.model)
    beside = _over(tmp_path / "base", directory)
    assert _close(_logits(beside), expected)
    with beside.disable_adapter():
        assert all(map(torch.equal, _logits(beside), _logits(adapter.model)))
    merged = beside.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert all(map(torch.equal, _logits(again), expected))


def test_the_columns_of_a_neighbour_are_another_edit(saved, tmp_path):
    """The oracle says no: an adapter whose selection is shifted by one head."""
    adapter = load(saved)
    edit = _edit(adapter)
    directory = _bake(adapter, edit, tmp_path / "off")
    tensors = load_file(directory / WEIGHTS)
    for name, tensor in tensors.items():
        if "lora_A" in name:
            tensors[name] = tensor.roll(HEAD_WIDTH, 1).contiguous()
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    with scale_heads(adapter, edit):
        expected = _logits(adapter.model)
    assert not _close(_logits(_over(saved, directory)), expected, 0.1)
    assert not _close(_states(load(directory)), _hooked(adapter, edit), 0.1)


def test_another_factor_is_the_hook_to_rounding(saved, tmp_path):
    adapter = load(saved)
    edit = _edit(adapter, 1.7)
    directory = _bake(adapter, edit, tmp_path / "more")
    assert _close(_states(load(directory)), _hooked(adapter, edit))


def test_sixteen_bits_are_exact_copies(saved, tmp_path):
    adapter = load(saved, dtype="bfloat16")
    edit = _edit(adapter)
    directory = _bake(adapter, edit, tmp_path / "off")
    assert {t.dtype for t in load_file(directory / WEIGHTS).values()} == {
        torch.bfloat16
    }
    merged = load(directory, dtype="bfloat16")
    assert all(map(torch.equal, _states(merged), _hooked(adapter, edit)))


def test_plain_peft_writes_the_tokens_of_the_hooked_model(tmp_path):
    base = _saved("qwen3", tiny_tokenizer(PLAIN_TEMPLATE), tmp_path / "base")
    adapter = load(base)
    edit = _edit(adapter)
    sampling = Sampling(temperature=0, max_thinking=0, max_answer=10)
    prompts = [(ids, 0) for ids in SEQUENCES]
    hooked = {
        row.index: row.token_ids
        for batch in generate(adapter, prompts, sampling, stop_ids=[999], edit=edit)
        for row in batch
    }
    beside = _over(base, _bake(adapter, edit, tmp_path / "off"))
    for index, ids in enumerate(SEQUENCES):
        found = beside.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=[999],
            pad_token_id=0,
        )
        assert tuple(found[0].tolist()) == hooked[index]


def test_the_folder_names_its_base_and_what_was_done(saved, tmp_path):
    adapter = load(saved)
    directory = _bake(adapter, _edit(adapter), tmp_path / "off")
    assert {path.name for path in directory.iterdir()} == {
        "adapter_config.json",
        WEIGHTS,
        "holdfast_bake.json",
    }
    named = json.loads((directory / "adapter_config.json").read_text())
    path = os.path.relpath(saved, directory)
    assert named["base_model_name_or_path"] == path
    record = json.loads((directory / "holdfast_bake.json").read_text())
    assert record["form"] == "adapter"
    assert record["rank"] == 2 * HEAD_WIDTH
    # The same command writes the same bytes, whatever the order of sets.
    again = _bake(adapter, _edit(adapter), tmp_path / "again")
    for name in ("adapter_config.json", WEIGHTS):
        assert (again / name).read_bytes() == (directory / name).read_bytes()


def test_a_base_that_has_changed_since_is_refused(copy, tmp_path):
    adapter = load(copy)
    directory = _bake(adapter, _edit(adapter), tmp_path / "off")
    load(directory)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="was made for, of fingerprint"):
        load(directory)


def test_an_adapter_over_an_adapter_is_not_written(saved, tmp_path):
    adapter = load(saved)
    first = load(_bake(adapter, _edit(adapter), tmp_path / "first"))
    with pytest.raises(ModelError, match="--as checkpoint"):
        _bake(first, _edit(first, heads=[(1, 1)]), tmp_path / "second")
    assert not (tmp_path / "second").exists()


class Packed(torch.nn.Linear):
    """A projection whose weight is kept in half the columns."""

    def __init__(self, like):
        super().__init__(like.in_features, like.out_features, bias=False)
        packed = torch.zeros((like.out_features, like.in_features // 2))
        self.weight = torch.nn.Parameter(packed.to(torch.uint8), requires_grad=False)


@pytest.mark.parametrize("form", ["checkpoint", "adapter"])
def test_packed_weights_are_refused_in_the_layers_that_change(saved, form, tmp_path):
    adapter = load(saved)
    blocks = list(adapter.blocks)
    blocks[2] = replace(blocks[2], projection=Packed(blocks[2].projection))
    adapter.model.model.layers[2].self_attn.o_proj = blocks[2].projection
    packed = replace(adapter, blocks=tuple(blocks))
    with (
        pytest.raises(ModelError, match="packed weights: a Packed of uint8") as refusal,
        baking(packed, _edit(packed), tmp_path / "b", provenance={}, form=form),
    ):
        pass
    assert "Bake the unquantised model" in str(refusal.value)
    assert "--as adapter" not in str(refusal.value)
    assert not (tmp_path / "b").exists()
    # A layer that is left alone may be packed: an adapter does not touch it.
    _bake(packed, _edit(packed, heads=[(0, 1)]), tmp_path / "first")


def test_a_quantised_checkpoint_is_not_written_back_but_adapted(saved, tmp_path):
    adapter = load(saved)

    expanded = replace(adapter, source=adapter.source._replace(quantised="fp8"))
    with (
        pytest.raises(ModelError, match=r"packed by fp8[\s\S]*--as adapter"),
        baking(expanded, _edit(adapter), tmp_path / "b", provenance={}),
    ):
        pass
    directory = _bake(expanded, _edit(adapter), tmp_path / "off")
    hooked = _hooked(adapter, _edit(adapter))
    assert all(map(torch.equal, _states(load(directory)), hooked))


def test_the_card_says_what_a_server_must_allow(saved):
    adapter = load(saved)
    edit = _edit(adapter)
    card = model_card(adapter.identity, edit, [], adapter_rank(adapter, edit))
    assert "library_name: peft" in card
    assert f"--max-lora-rank {2 * HEAD_WIDTH}" in card
    assert "this checkpoint" not in card
    assert "--max-lora-rank" not in model_card(adapter.identity, edit, [])


def test_a_rank_between_those_of_vllm_is_rounded_up_and_one_above_is_told():
    assert "--max-lora-rank 256" in serving(192)
    assert "--max-lora-rank 320" in serving(320)
    assert "more than the 512" in serving(513)
