import json

import pytest
import torch
import transformers

from holdfast.errors import AdapterError, InputError, ModelError, UnsupportedFamilyError
from holdfast.models.loading import causal
from holdfast.models.loading.masked import adapt_masked, load_masked
from holdfast.models.loading.masked_families import MASKED, TWO_WAY, masked_family_of
from masked_checkpoints import (
    DREAM_CONFIG,
    LLADA_CONFIG,
    MASK,
    dream_reference,
    dream_weights,
    llada_reference,
    llada_weights,
    write,
    write_dream,
    write_llada,
)
from tiny_models import (
    PLAIN_TEMPLATE,
    VOCAB,
    edit_json,
    random_sequences,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)

ROW = random_sequences([13])[0]


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    return write_llada(tmp_path_factory.mktemp("llada"))


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    return write_dream(tmp_path_factory.mktemp("dream"))


def two_way(kind="qwen3", **changes):
    return tiny_model(kind, is_causal=False, mask_token_id=MASK, **changes)


def tokenizer_with_mask():
    tokenizer = tiny_tokenizer(PLAIN_TEMPLATE)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    return tokenizer


def modernbert(**changes):
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "local_attention": 6,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        **dict.fromkeys(("bos_token_id", "cls_token_id"), 1),
        **dict.fromkeys(("eos_token_id", "sep_token_id"), 256),
    }
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(**settings | changes)
    model = transformers.ModernBertForMaskedLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _logits(masked, row):
    with torch.no_grad():
        states = masked.base(input_ids=torch.tensor([row])).last_hidden_state
        return states[0], masked.lm_head(states)[0]


@pytest.mark.parametrize(
    ("name", "reference"), [("llada", llada_reference), ("dream", dream_reference)]
)
def test_original_names_give_the_logits_of_the_published_architecture(
    name, reference, request
):
    masked = load_masked(request.getfixturevalue(name))
    states, logits = _logits(masked, ROW)
    expected_states, expected = reference(ROW)
    assert (states - expected_states).abs().max() < 1e-4
    assert (logits - expected).abs().max() < 1e-4
    assert masked.mask_id == MASK
    assert masked.shift is (name == "dream")
    assert (
        masked.identity.model_type
        == json.loads((request.getfixturevalue(name) / "config.json").read_text())[
            "model_type"
        ]
    )
    assert all(proof.passed for proof in masked.proofs)


def test_the_reference_is_not_met_by_attention_to_the_left(llada):
    masked = load_masked(llada)
    _, expected = llada_reference(ROW)
    masked.model.config.is_causal = True
    _, logits = _logits(masked, ROW)
    assert (logits[:-1] - expected[:-1]).abs().max() > 0.1
    # The last position sees everything in either case.
    assert (masked.model.config.is_causal, len(ROW)) == (True, 13)


def test_tied_weights_and_other_head_counts_are_translated(tmp_path):
    weights = llada_weights()
    del weights["model.transformer.ff_out.weight"]
    directory = write(tmp_path, {**LLADA_CONFIG, "weight_tying": True}, weights)
    _, logits = _logits(load_masked(directory), ROW)
    states, _ = llada_reference(ROW)
    expected = states @ weights["model.transformer.wte.weight"].T
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("scale_logits", True),
        ("input_emb_norm", True),
        ("attention_layer_norm", True),
        ("include_bias", True),
        ("include_qkv_bias", True),
        ("block_type", "sequential"),
        ("layer_norm_type", "gemma_rms"),
        ("activation_type", "swiglu"),
        ("alibi", True),
        ("block_group_size", 3),
    ],
)
def test_a_setting_that_the_native_class_would_lose_is_refused(setting, value):
    config = {**LLADA_CONFIG, setting: value}
    with pytest.raises(UnsupportedFamilyError, match=f"{setting} {value}"):
        masked_family_of(config, "a model")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("use_sliding_window", True),
        ("hidden_act", "gelu"),
    ],
)
def test_the_same_for_dream(setting, value):
    with pytest.raises(UnsupportedFamilyError, match=setting):
        masked_family_of({**DREAM_CONFIG, setting: value}, "a model")


def test_a_weight_without_a_place_is_refused(tmp_path):
    weights = llada_weights() | {
        "model.transformer.blocks.0.q_norm.weight": torch.ones(32)
    }
    with pytest.raises(ModelError, match="unexpected keys"):
        load_masked(write(tmp_path, LLADA_CONFIG, weights))


def test_a_missing_weight_is_refused(tmp_path):
    weights = llada_weights()
    del weights["model.transformer.blocks.1.up_proj.weight"]
    with pytest.raises(ModelError, match="missing keys"):
        load_masked(write(tmp_path, LLADA_CONFIG, weights))


def test_dreams_vocabulary_is_read_without_its_code(tmp_path):
    write(tmp_path, DREAM_CONFIG, dream_weights())
    tokenizer = tiny_tokenizer(PLAIN_TEMPLATE)
    pieces = json.loads(tokenizer.backend_tokenizer.to_str())
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(pieces["model"]["vocab"]))
    merges = [" ".join(pair) for pair in pieces["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    added = {
        str(token["id"]): {"content": token["content"], "special": token["special"]}
        for token in pieces["added_tokens"]
    }
    edit_json(
        tmp_path / "tokenizer_config.json",
        tokenizer_class="DreamTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        added_tokens_decoder=added,
    )
    (tmp_path / "tokenization_dream.py").write_text("raise SystemExit('was run')\n")
    masked = load_masked(tmp_path)
    text = "<|user|>Hello there<|end|>"
    assert masked.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_masked_language_model_loads_as_it_is(tmp_path):
    model = modernbert()
    model.save_pretrained(tmp_path)
    tokenizer_with_mask().save_pretrained(tmp_path)
    masked = load_masked(tmp_path)
    _, logits = _logits(masked, ROW)
    with torch.no_grad():
        assert (logits - model(torch.tensor([ROW])).logits[0]).abs().max() < 1e-5
    assert masked.mask_id == masked.tokenizer.mask_token_id


@pytest.mark.parametrize("kind", TWO_WAY)
def test_a_native_model_that_says_it_attends_both_ways_is_read(kind, tmp_path):
    two_way(kind).save_pretrained(tmp_path)
    tiny_tokenizer(PLAIN_TEMPLATE).save_pretrained(tmp_path)
    masked = load_masked(tmp_path)
    assert masked.mask_id == MASK
    assert 257 in masked.stop_ids
    with pytest.raises(UnsupportedFamilyError, match="attends both ways"):
        causal.load(tmp_path)


def test_attention_to_the_left_fails_the_proof():
    model = two_way()
    masked = adapt_masked(model, tiny_tokenizer(PLAIN_TEMPLATE))
    assert len(masked.proofs) == 5
    model.model.config = tiny_config("qwen3")
    model.model.config._attn_implementation = "sdpa"
    model.config.is_causal = False
    with pytest.raises(AdapterError, match="attention goes both ways"):
        adapt_masked(model, tiny_tokenizer(PLAIN_TEMPLATE))


def test_every_family_of_the_table_is_loaded_in_these_tests():
    assert set(MASKED) == {"llada", "Dream", "modernbert"}
    assert set(TWO_WAY) == {"llama", "qwen2", "qwen3"}


def test_a_model_without_a_mask_token_is_refused():
    model = tiny_model("qwen3", is_causal=False)
    with pytest.raises(ModelError, match="tokenizer without a mask token") as caught:
        adapt_masked(model, tiny_tokenizer(PLAIN_TEMPLATE))
    assert "mask_token_id" in str(caught.value)


def test_two_mask_tokens_that_differ_are_refused():
    with pytest.raises(ModelError, match=f"{MASK} in config.json and 26"):
        adapt_masked(two_way(), tokenizer_with_mask())


@pytest.mark.parametrize(
    ("config", "reason", "step"),
    [
        (
            {"model_type": "novel", "auto_map": {"AutoModel": "m.Model"}},
            "is never run",
            "is_causal",
        ),
        (
            {"model_type": "llada2_moe", "auto_map": {"AutoModel": "m.Model"}},
            "nobody has proved its attention",
            "is_causal",
        ),
        ({"model_type": "diffusion_gemma"}, "no mask token", "is_causal"),
        ({"model_type": "qwen3"}, "left to right", "causal.load"),
        ({"model_type": "gpt2"}, "nobody has proved", "is_causal"),
    ],
)
def test_what_is_not_in_the_table_is_refused_with_the_next_step(config, reason, step):
    with pytest.raises(UnsupportedFamilyError, match=reason) as caught:
        masked_family_of(config, "a model")
    assert f"`{config['model_type']}`" in str(caught.value)
    assert step in caught.value.next_step
    assert all(name in caught.value.expected for name in (*MASKED, *TWO_WAY))


def test_quantised_weights_are_refused_here_too():
    config = {**LLADA_CONFIG, "quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(UnsupportedFamilyError, match="gptq"):
        masked_family_of(config, "a model")


def test_a_configuration_without_a_type_or_a_size_is_no_model():
    with pytest.raises(InputError, match="model_type"):
        masked_family_of({}, "a model")
    config = {k: v for k, v in LLADA_CONFIG.items() if k != "n_heads"}
    with pytest.raises(InputError, match="n_heads"):
        masked_family_of(config, "a model")


def test_code_beside_an_unknown_checkpoint_is_never_run(tmp_path):
    config = {"model_type": "novel", "auto_map": {"AutoModel": "modeling_novel.Model"}}
    write(tmp_path, config, llada_weights())
    for loader in (load_masked, causal.load):
        with pytest.raises(UnsupportedFamilyError, match="is never run"):
            loader(tmp_path)
