import json

import pytest
import transformers

from holdfast.errors import InputError, UnsupportedFamilyError
from holdfast.models.loading.causal import load
from holdfast.models.loading.families import FAMILIES, REFUSED, family_of
from tiny_models import KINDS, tiny_config


def test_every_family_is_proved_on_a_tiny_model():
    assert set(KINDS) == set(FAMILIES)


def test_every_family_names_a_class_that_transformers_has():
    for family in FAMILIES.values():
        assert hasattr(transformers, family.causal_class)


def test_no_type_is_both_accepted_and_refused():
    assert not set(FAMILIES) & set(REFUSED)


@pytest.mark.parametrize(
    ("config_class", "word"),
    [
        ("GemmaConfig", "offset from one"),
        ("Gemma2Config", "norm after the attention"),
        ("Gemma3TextConfig", "norm after the attention"),
        ("Olmo2Config", "norm after the attention"),
        ("Olmo3Config", "norm after the attention"),
        ("GptOssConfig", "learned sink"),
        ("Qwen3NextConfig", "linear-attention"),
        ("Qwen3_5TextConfig", "linear-attention"),
        ("DeepseekV3Config", "latent attention"),
        ("GraniteConfig", "multiplied"),
        ("MambaConfig", "no attention heads"),
        ("ModernBertConfig", "both ways"),
    ],
)
def test_what_would_give_wrong_numbers_is_refused_by_name(config_class, word):
    config = getattr(transformers, config_class)().to_dict()
    with pytest.raises(UnsupportedFamilyError, match=word) as caught:
        family_of(config, "a model")
    assert f"`{config['model_type']}`" in str(caught.value)


def test_an_unknown_type_is_refused_with_the_families_that_fit():
    with pytest.raises(UnsupportedFamilyError, match="nobody has proved") as caught:
        family_of({"model_type": "gpt2"}, "a model")
    assert "`gpt2`" in str(caught.value)
    assert all(name in caught.value.next_step for name in FAMILIES)


def test_code_that_travels_with_a_checkpoint_is_refused():
    config = {"model_type": "novel", "auto_map": {"AutoModelForCausalLM": "m.Model"}}
    with pytest.raises(UnsupportedFamilyError, match="is never run"):
        family_of(config, "a model")


def test_a_native_class_is_taken_in_place_of_travelling_code():
    config = tiny_config("qwen2").to_dict() | {"auto_map": {"AutoModel": "m.Model"}}
    assert family_of(config, "a model").causal_class == "Qwen2ForCausalLM"


def test_a_fitting_type_with_other_layers_is_refused():
    config = tiny_config().to_dict()
    config["layer_types"] = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(UnsupportedFamilyError, match="layers of type linear_attention"):
        family_of(config, "a model")


def test_a_classifier_is_refused():
    config = tiny_config().to_dict()
    config["architectures"] = ["Qwen3ForSequenceClassification"]
    with pytest.raises(UnsupportedFamilyError, match="no language-model head"):
        family_of(config, "a model")


def test_a_configuration_without_a_type_is_no_model():
    with pytest.raises(InputError, match="model_type"):
        family_of({"hidden_size": 3}, "a model")


def test_loading_refuses_before_it_looks_at_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(UnsupportedFamilyError, match="`gemma2`"):
        load(tmp_path)
