import json
import os
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from holdfast.errors import InputError, ModelError, SettingsError, StorageError
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.export import Measured, baking, model_card
from holdfast.models.hidden_states import read_states
from holdfast.models.interventions import HeadEdit, head_factors, scale_heads
from holdfast.models.loading.causal import adapt, load
from holdfast.models.loading.files import BAKE_RECORD
from tiny_models import (
    HEAD_WIDTH,
    PLAIN_TEMPLATE,
    random_sequences,
    tiny_model,
    tiny_tokenizer,
)

FAMILIES = ["llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3"]
HEADS_EDITED = [(0, 1), (1, 3), (2, 0)]
SEQUENCES = random_sequences([14, 9, 5])


def bake(adapter, edit, directory, **named):
    """Bake a model without trying it out first."""
    with baking(adapter, edit, directory, **named):
        pass
    return directory


def _adapter(kind="qwen3", **changes):
    return adapt(tiny_model(kind, **changes), tiny_tokenizer(PLAIN_TEMPLATE))


def _edit(adapter, factor=0.0, **named):
    return HeadEdit(head_factors(adapter, HEADS_EDITED, factor), **named)


def _states(adapter):
    return read_states(adapter, SEQUENCES, lambda states, _: states * 1)


def _hooked(adapter, edit):
    with scale_heads(adapter, edit):
        return _states(adapter)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_baked_model_is_the_hooked_one_bit_for_bit(kind, tmp_path):
    adapter = _adapter(kind)
    edit, plain = _edit(adapter), _states(adapter)
    hooked = _hooked(adapter, edit)
    baked = load(bake(adapter, edit, tmp_path / "baked", provenance={}))
    assert all(map(torch.equal, _states(baked), hooked))
    assert not any(map(torch.equal, hooked, plain))
    assert all(map(torch.equal, _states(adapter), plain))


def test_another_factor_is_baked_within_rounding(tmp_path):
    adapter = _adapter("llama")
    edit = _edit(adapter, 0.3)
    baked = load(bake(adapter, edit, tmp_path / "baked", provenance={}))
    for found, expected in zip(_states(baked), _hooked(adapter, edit), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_written_as_they_are(dtype, saved, tmp_path):
    adapter = load(saved, dtype=dtype)
    edit = _edit(adapter)
    directory = bake(adapter, edit, tmp_path / "baked", provenance={})
    assert json.loads((directory / "config.json").read_text())["dtype"] == dtype
    baked = load(directory, dtype=dtype)
    assert all(map(torch.equal, _states(baked), _hooked(adapter, edit)))


def test_a_model_with_an_adapter_is_baked_whole(saved, tmp_path):
    """The adapter is merged into what is written, and the base stays as it was."""
    model = tiny_model()
    model.name_or_path = str(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"])
        )
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(tmp_path / "lora")
    adapter = load(tmp_path / "lora")
    edit = _edit(adapter)
    baked = load(bake(adapter, edit, tmp_path / "baked", provenance={}))
    hooked = _hooked(adapter, edit)
    assert all(map(torch.equal, _states(baked), hooked))
    base = load(saved)
    assert not any(map(torch.equal, _hooked(base, _edit(base)), hooked))


def test_plain_transformers_writes_the_tokens_of_the_hooked_model(tmp_path):
    adapter = _adapter()
    edit = _edit(adapter)
    sampling = Sampling(temperature=0, max_thinking=0, max_answer=10)
    prompts = [(ids, 0) for ids in SEQUENCES]
    hooked = {
        row.index: row.token_ids
        for batch in generate(adapter, prompts, sampling, stop_ids=[999], edit=edit)
        for row in batch
    }
    directory = bake(adapter, edit, tmp_path / "baked", provenance={})
    plain = transformers.AutoModelForCausalLM.from_pretrained(directory)
    for index, ids in enumerate(SEQUENCES):
        found = plain.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=[999],
            pad_token_id=0,
        )
        assert tuple(found[0].tolist()) == hooked[index]


def test_only_the_columns_of_those_heads_are_changed(tmp_path):
    adapter = _adapter(tie_word_embeddings=True)
    directory = bake(adapter, _edit(adapter), tmp_path / "baked", provenance={})
    written = load_file(directory / "model.safetensors")
    before = adapter.model.state_dict()
    assert set(written) == set(before) - {"lm_head.weight"}
    for name, tensor in written.items():
        expected = before[name].clone()
        for layer, head in HEADS_EDITED:
            if name == f"model.layers.{layer}.self_attn.o_proj.weight":
                expected[:, head * HEAD_WIDTH : (head + 1) * HEAD_WIDTH] = 0
        assert torch.equal(tensor, expected)


def test_the_directory_holds_all_a_stock_checkpoint_needs(tmp_path):
    adapter = _adapter()
    adapter.model.generation_config.temperature = 0.6
    adapter.model.generation_config.do_sample = True
    directory = bake(
        adapter,
        _edit(adapter),
        tmp_path / "deep" / "baked",
        provenance={"seed": 7},
        max_shard_size=20_000,
    )
    names = {path.name for path in directory.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
    assert {"chat_template.jinja", BAKE_RECORD} <= names
    assert "model.safetensors.index.json" in names
    assert len([n for n in names if n.endswith(".safetensors")]) > 1
    assert load(directory).tokenizer.chat_template == PLAIN_TEMPLATE
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation["temperature"] == 0.6
    record = json.loads((directory / BAKE_RECORD).read_text())
    assert record["n_heads"] == 3
    assert record["n_heads_in_model"] == 12
    assert record["heads"][1] == {"layer": 1, "head": 3, "factor": 0.0}
    assert record["base"]["weights_sha256"] == adapter.identity.weights_sha256
    assert record["provenance"] == {"seed": 7}
    assert os.listdir(directory.parent) == ["baked"]


def test_a_bake_that_is_refused_leaves_nothing(tmp_path):
    adapter = _adapter()

    def try_out():
        with baking(adapter, _edit(adapter), tmp_path / "b", provenance={}) as staged:
            assert load(staged).identity.model_type == "qwen3"
            raise ModelError("a repair", "worse", "Keep the model.")

    with pytest.raises(ModelError, match="worse"):
        try_out()
    assert os.listdir(tmp_path) == []


def test_a_model_card_written_while_it_is_tried_out_comes_along(tmp_path):
    adapter = _adapter()
    edit = _edit(adapter)
    measured = [Measured("attack success", "0.90 [0.82, 0.95]", "0.05 [0.02, 0.1]", 80)]
    with baking(adapter, edit, tmp_path / "baked", provenance={}) as staged:
        card = model_card(adapter.identity, edit, measured)
        (staged / "README.md").write_text(card)
    written = (tmp_path / "baked" / "README.md").read_text()
    assert "| attack success | 0.90 [0.82, 0.95] | 0.05 [0.02, 0.1] | 80 |" in written
    assert "3 heads were scaled" in written
    assert "| 1 | 3 | 0 |" in written
    # A name that is no Hub id would make the card's metadata invalid.
    assert "base_model" not in written


def test_a_card_names_a_base_that_is_on_the_hub():
    adapter = _adapter()
    identity = type(adapter.identity)("owner/name", "abc", "", "w", "float32", "qwen3")
    card = model_card(identity, _edit(adapter), [])
    assert card.startswith("---\nbase_model: owner/name\n")


def test_nothing_is_overwritten(tmp_path):
    adapter = _adapter()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for name in ("full", "full/notes.txt"):
        with pytest.raises(InputError, match="nothing is overwritten"):
            bake(adapter, _edit(adapter), tmp_path / name, provenance={})
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    bake(adapter, _edit(adapter), tmp_path / "empty", provenance={})
    assert (tmp_path / "empty" / "config.json").is_file()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    adapter = _adapter()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter.model, "save_pretrained", full)
    with pytest.raises(StorageError, match="no space left"):
        bake(adapter, _edit(adapter), tmp_path / "baked", provenance={})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ({"ranges": ((0, 3),)}, "at chosen positions"),
        ({"renormalise": "token"}, "renormalisation by token"),
        ({"factor": 1.0}, "scales no head"),
    ],
)
def test_an_edit_that_weights_cannot_hold_is_refused(named, found, tmp_path):
    adapter = _adapter()
    with pytest.raises(SettingsError, match=found):
        bake(adapter, _edit(adapter, **named), tmp_path / "baked", provenance={})
    assert os.listdir(tmp_path) == []
