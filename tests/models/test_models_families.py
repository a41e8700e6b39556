import json

import pytest
import transformers

from holdfast.errors import HoldfastError, InputError, UnsupportedFamilyError
from holdfast.models.loading.causal import load
from holdfast.models.loading.families import family_of
from tiny_kinds import EVERY, SEEING
from tiny_models import edit_json, tiny_config, tiny_model


@pytest.mark.parametrize("table", [EVERY, SEEING])
def test_every_type_has_a_class_that_generates(table):
    for name, _ in table.values():
        config = getattr(transformers, name)()
        found = family_of({"model_type": config.model_type}, "a model").causal_class
        assert hasattr(transformers, found)


def test_the_class_that_a_checkpoint_names_is_taken():
    config = {"model_type": "qwen3_5"}
    assert family_of(config, "a model").causal_class == "Qwen3_5ForCausalLM"
    config["architectures"] = ["Qwen3_5ForConditionalGeneration"]
    assert family_of(config, "a model").causal_class == config["architectures"][0]


@pytest.mark.parametrize(
    ("config_class", "word"),
    [("ModernBertConfig", "both ways"), ("BertConfig", "both ways")],
)
def test_what_does_not_write_token_by_token_is_refused_by_name(config_class, word):
    config = getattr(transformers, config_class)().to_dict()
    with pytest.raises(UnsupportedFamilyError, match=word) as caught:
        family_of(config, "a model")
    assert f"`{config['model_type']}`" in str(caught.value)


def test_a_type_that_transformers_does_not_have_is_refused():
    with pytest.raises(UnsupportedFamilyError, match="has no class") as caught:
        family_of({"model_type": "novel"}, "a model")
    assert "`novel`" in str(caught.value)


def test_code_that_travels_with_a_checkpoint_is_refused():
    config = {"model_type": "novel", "auto_map": {"AutoModelForCausalLM": "m.Model"}}
    with pytest.raises(UnsupportedFamilyError, match="is never run"):
        family_of(config, "a model")


def test_a_native_class_is_taken_in_place_of_travelling_code():
    config = tiny_config("qwen2").to_dict() | {"auto_map": {"AutoModel": "m.Model"}}
    assert family_of(config, "a model").causal_class == "Qwen2ForCausalLM"


@pytest.mark.parametrize(
    "layer_types",
    [["full_attention", "linear_attention", "full_attention"], ["full_attention"]],
)
def test_layer_types_that_do_not_fit_are_named(layer_types, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", layer_types=layer_types)
    with pytest.raises(HoldfastError, match=r"linear_attention|layer_types") as caught:
        load(tmp_path)
    assert "config.json" in str(caught.value)


def test_a_classifier_is_refused():
    config = tiny_config().to_dict()
    config["architectures"] = ["Qwen3ForSequenceClassification"]
    with pytest.raises(UnsupportedFamilyError, match="no language-model head"):
        family_of(config, "a model")


def test_a_configuration_without_a_type_is_no_model():
    with pytest.raises(InputError, match="model_type"):
        family_of({"hidden_size": 3}, "a model")


def test_loading_refuses_before_it_looks_at_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(UnsupportedFamilyError, match="`bert`"):
        load(tmp_path)
