import json
import shutil
import warnings

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model

from holdfast.errors import AdapterError, InputError, ModelError, OfflineError
from holdfast.models.hidden_states import final_states
from holdfast.models.loading.causal import adapt, load
from holdfast.models.loading.checkpoint import name_base
from tiny_models import edit_json, random_sequences, tiny_model, tiny_tokenizer

SEQUENCES = random_sequences([9, 5])


@pytest.fixture
def lora(saved, tmp_path):
    """A LoRA adapter that changes the model, and the states it should give."""
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj", "up_proj"])
    model = tiny_model()
    model.name_or_path = str(saved)
    with warnings.catch_warnings():
        # The library asks transformers by a name that is about to go.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
        batch = torch.tensor([SEQUENCES[0]])
        states = adapted.model.model(batch).last_hidden_state[0, -1]
    adapted.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora", states, adapted


def test_an_adapter_is_loaded_over_its_base_and_merged(lora, saved):
    directory, expected, _ = lora
    adapter = load(directory)
    states = final_states(adapter, SEQUENCES)[0]
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
    base = load(saved)
    assert not torch.allclose(states, final_states(base, SEQUENCES)[0], atol=0.1)
    assert adapter.identity.weights_sha256 != base.identity.weights_sha256
    assert adapter.identity.model_id == str(directory)


def test_an_adapter_that_is_not_merged_has_no_heads_in_memory(lora, tokenizer):
    _, _, adapted = lora
    adapter = adapt(adapted.get_base_model(), tokenizer)
    assert adapter.lacks("states") is None
    with pytest.raises(AdapterError, match="merge_and_unload"):
        adapter.require("heads")


def test_an_adapter_without_some_of_its_weights_is_refused(lora):
    file = lora[0] / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors.pop(next(name for name in tensors if "layers.2" in name))
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="missing adapter keys"):
        load(lora[0])


def test_an_adapter_file_cut_short_is_named(lora):
    file = lora[0] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        load(lora[0])


def test_an_adapter_of_another_kind_is_refused(lora):
    edit_json(lora[0] / "adapter_config.json", peft_type="PREFIX_TUNING")
    with pytest.raises(InputError, match="type PREFIX_TUNING"):
        load(lora[0])


def test_the_base_of_an_adapter_may_lie_beside_it(lora, saved):
    shutil.copytree(saved, lora[0] / "base")
    edit_json(lora[0] / "adapter_config.json", base_model_name_or_path="base")
    states = final_states(load(lora[0]), SEQUENCES)[0]
    torch.testing.assert_close(states, lora[1], atol=1e-4, rtol=1e-4)


def adapt_with(saved, folder, config, **changes):
    """Write an adapter over a tiny model, and return the logits it should give."""
    base = tiny_model(**changes)
    if changes:
        base.save_pretrained(folder.parent / "base")
        tiny_tokenizer().save_pretrained(folder.parent / "base")
        saved = folder.parent / "base"
    base.name_or_path = str(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(base, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(0, 0.3)
            elif "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "token_adapter" in name and "delta" in name:
                parameter.normal_(0, 0.3)
        logits = adapted(torch.tensor([SEQUENCES[0]])).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    return logits


def logits_of(adapter):
    with torch.no_grad():
        return adapter.model(torch.tensor([SEQUENCES[0]])).logits


TIED = {
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "the head anew": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "the embedding anew": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
    },
    "some tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": [SEQUENCES[0][0], SEQUENCES[0][3]],
    },
}


@pytest.mark.parametrize("what", TIED)
def test_an_adapter_on_tied_embeddings_is_the_model_that_was_trained(
    saved, tmp_path, what
):
    config = LoraConfig(r=2, **TIED[what])
    expected = adapt_with(saved, tmp_path / "lora", config, tie_word_embeddings=True)
    adapter = load(tmp_path / "lora")
    torch.testing.assert_close(logits_of(adapter), expected, atol=1e-3, rtol=1e-3)
    shown = [proof for proof in adapter.proofs if "merged adapter" in proof.name]
    assert [proof.passed for proof in shown] == [True]
    # Written out as a whole model it is still that one.
    adapter.model.save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(
        logits_of(load(tmp_path / "whole")), expected, atol=1e-3, rtol=1e-3
    )


def test_a_merge_that_changes_the_model_is_no_proof(lora, monkeypatch):
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.merge", lambda *_, **__: None)
    with pytest.raises(AdapterError, match="logits of base and adapter"):
        load(lora[0])


def test_an_adapter_of_a_deeper_base_is_refused_and_three_keys_named(lora, saved):
    file = lora[0] / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    deeper = {
        name.replace("layers.2", "layers.3"): weight.clone()
        for name, weight in tensors.items()
        if "layers.2" in name
    }
    safetensors.torch.save_file(tensors | deeper, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="6 surplus adapter keys") as caught:
        load(lora[0])
    assert caught.value.found.count("layers.3") == 3
    assert str(saved) in caught.value.expected


@pytest.mark.parametrize(
    ("file", "changes", "cause"),
    [
        ("adapter_config.json", {"r": 4}, "of rank 2 where adapter_config.json says 4"),
        (
            "adapter_config.json",
            {"target_modules": ["q_proj", "o_proj"]},
            "6 surplus adapter keys",
        ),
        (
            "adapter_config.json",
            {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]},
            "6 missing adapter keys",
        ),
        ("base", {"hidden_size": 40}, r"\[2, 32\] where the base takes \[2, 40\]"),
    ],
)
def test_the_cause_of_a_misfit_is_said(lora, tmp_path, file, changes, cause):
    if file == "base":
        tiny_model(**changes).save_pretrained(tmp_path / "wider")
        tiny_tokenizer().save_pretrained(tmp_path / "wider")
        changes = {"base_model_name_or_path": str(tmp_path / "wider")}
    edit_json(lora[0] / "adapter_config.json", **changes)
    with pytest.raises(ModelError, match=cause) as caught:
        load(lora[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"r": "two"}, {"r": -1}, {"target_modules": 3}, {"target_modules": ["nowhere"]}],
)
def test_settings_of_an_adapter_that_cannot_be_meant_are_named(lora, changes):
    edit_json(lora[0] / "adapter_config.json", **changes)
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        load(lora[0])


PISSA = {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}
KINDS = {
    "DoRA": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "rank-stabilised": {"target_modules": ["q_proj"], "use_rslora": True},
    "ranks by name": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 4},
        "alpha_pattern": {"q_proj": 3},
    },
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "PiSSA": PISSA,
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_adapters_are_the_models_that_were_trained(saved, tmp_path, kind):
    config = LoraConfig(**{"r": 2, "lora_alpha": 8, **KINDS[kind]})
    expected = adapt_with(saved, tmp_path / "lora", config)
    torch.testing.assert_close(
        logits_of(load(tmp_path / "lora")), expected, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        # What PiSSA took from the base was drawn by chance, and LoRA-GA's by data.
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights` of pissa_niter_4"),
        ({"init_lora_weights": "lora_ga"}, "`init_lora_weights` of lora_ga"),
        # PEFT only warns, and loads the model as if the line were not there.
        ({"use_newer_scaling": True}, "`use_newer_scaling`, which is none"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "`layer_replication`"),
        ({"alora_invocation_tokens": [5]}, "`alora_invocation_tokens`"),
    ],
)
def test_settings_that_no_merged_weights_follow_are_refused(lora, changes, found):
    edit_json(lora[0] / "adapter_config.json", **changes)
    with pytest.raises(ModelError) as caught:
        load(lora[0])
    assert found in caught.value.found
    assert "adapter_config.json" in caught.value.expected


def test_a_setting_of_a_later_version_that_is_off_is_no_matter(lora):
    edit_json(lora[0] / "adapter_config.json", use_newer_scaling=False)
    states = final_states(load(lora[0]), SEQUENCES)[0]
    torch.testing.assert_close(states, lora[1], atol=1e-4, rtol=1e-4)


def test_shards_of_an_adapter_are_not_passed_by(lora):
    file = lora[0] / "adapter_model.safetensors"
    shard = file.rename(lora[0] / "adapter_model-00001-of-00001.safetensors")
    names = dict.fromkeys(safetensors.torch.load_file(shard), shard.name)
    index = {"weight_map": names}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"1 shards in .* PEFT does not read"):
        load(lora[0])


def test_a_vocabulary_that_grew_in_training_is_told_as_that(saved, tmp_path):
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    )
    adapt_with(saved, tmp_path / "lora", config)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in tensors if "embed" in name)
    tensors[name] = torch.cat([tensors[name], tensors[name][:4]])
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"were tokens added\?") as caught:
        load(tmp_path / "lora")
    assert "[304, 32] where the base takes [300, 32]" in caught.value.found


def test_a_folder_of_several_adapters_names_them(lora, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(lora[0], tmp_path / "several" / name)
    with pytest.raises(InputError, match=r"one of the models in it: first, second\."):
        load(tmp_path / "several")


def test_an_adapter_over_an_adapter_is_refused(lora, tmp_path):
    shutil.copytree(lora[0], tmp_path / "second")
    edit_json(
        tmp_path / "second" / "adapter_config.json", base_model_name_or_path="../lora"
    )
    with pytest.raises(InputError, match=r"found another adapter, \.\./lora\. Merge"):
        load(tmp_path / "second")


def test_a_base_that_has_changed_since_the_training_is_refused(lora, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "base")
    edit_json(lora[0] / "adapter_config.json", base_model_name_or_path="../base")
    known = load(tmp_path / "base").identity.weights_sha256
    for name in ("holdfast_finetune.json", "holdfast.json"):
        record = lora[0] / name
        record.write_text(json.dumps({"base": {"weights_sha256": known}}))
        assert load(lora[0]).n_layers == 3
        tiny_model(seed=1).save_pretrained(tmp_path / "base")
        with pytest.raises(ModelError, match=f"another one in {tmp_path / 'base'}"):
            load(lora[0])
        tiny_model().save_pretrained(tmp_path / "base")
        record.unlink()


def test_a_base_beside_the_adapter_goes_before_one_of_that_name_elsewhere(
    lora, saved, tmp_path, monkeypatch
):
    shutil.copytree(saved, lora[0] / "base")
    tiny_model(seed=1).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    edit_json(lora[0] / "adapter_config.json", base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    states = final_states(load("lora"), SEQUENCES)[0]
    torch.testing.assert_close(states, lora[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("base", ["../gone", "runs/gone", "/no/such/model"])
def test_a_base_that_is_not_there_is_looked_for_in_the_adapters_own_words(
    lora, base, monkeypatch, tmp_path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    edit_json(lora[0] / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises((InputError, OfflineError), match="base of the adapter") as told:
        load(lora[0])
    assert base in told.value.found
    assert "path from the adapter" in told.value.next_step


def test_a_base_is_named_by_its_path_from_the_adapter(lora, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "here" / "base")
    shutil.move(lora[0], tmp_path / "here" / "runs" / "lora")
    adapter = tmp_path / "here" / "runs" / "lora"
    name_base(adapter, load(tmp_path / "here" / "base").source)
    found = json.loads((adapter / "adapter_config.json").read_text())
    assert found["base_model_name_or_path"] == "../../base"
    assert found["revision"] is None
    # Both are moved together, and are found from wherever the command runs.
    shutil.move(tmp_path / "here", tmp_path / "there")
    states = final_states(load(tmp_path / "there" / "runs" / "lora"), SEQUENCES)[0]
    torch.testing.assert_close(states, lora[1], atol=1e-4, rtol=1e-4)


def test_a_base_in_the_hubs_cache_is_named_as_the_hub_does(lora, saved, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--owner--some-model" / "snapshots" / commit
    shutil.copytree(saved, snapshot)
    base = load(snapshot)
    assert (base.identity.model_id, base.identity.revision) == (
        "owner/some-model",
        commit,
    )
    name_base(lora[0], base.source)
    found = json.loads((lora[0] / "adapter_config.json").read_text())
    assert found["base_model_name_or_path"] == "owner/some-model"
    assert found["revision"] == commit


def test_a_rank_of_one_module_alone_is_told_as_such(lora):
    edit_json(lora[0] / "adapter_config.json", rank_pattern={"q_proj": 7})
    with pytest.raises(
        ModelError, match=r"of rank 2 where adapter_config\.json says 7"
    ):
        load(lora[0])
