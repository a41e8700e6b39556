import json
import shutil

import pytest
import safetensors.torch
import torch
import transformers

from holdfast.errors import (
    EnvironmentProblem,
    HoldfastError,
    InputError,
    ModelError,
    SettingsError,
)
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.hidden_states import final_states, target_losses
from holdfast.models.loading import parts
from holdfast.models.loading import weights as loading_weights
from holdfast.models.loading.causal import adapt, load
from holdfast.models.loading.files import weight_files
from holdfast.models.loading.load import fingerprint_source
from holdfast.models.loading.weights import fingerprint_model
from holdfast.rollout.questions import resolve_sampling
from holdfast.rollout.settings import RolloutSettings
from tiny_models import (
    PLAIN_TEMPLATE,
    edit_json,
    random_sequences,
    tiny_model,
    tiny_tokenizer,
)

SEQUENCES = random_sequences([9, 5])


def test_a_saved_model_gives_the_states_of_the_one_in_memory(saved, tokenizer):
    loaded = load(saved)
    in_memory = adapt(tiny_model(), tokenizer)
    states = final_states(loaded, SEQUENCES)
    assert torch.equal(states, final_states(in_memory, SEQUENCES))
    assert loaded.identity.model_id == str(saved)
    assert loaded.identity.revision is None
    assert loaded.identity.dtype == "float32"
    assert loaded.identity.template_sha256 == in_memory.identity.template_sha256
    assert all(proof.passed for proof in loaded.proofs)


def test_a_sharded_model_is_the_same_model(saved, tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    states = final_states(load(tmp_path), SEQUENCES)
    assert torch.equal(states, final_states(load(saved), SEQUENCES))


def test_a_missing_shard_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        load(tmp_path)


@pytest.mark.parametrize("keep", [-7, 300, 3, 0])
def test_a_weight_file_cut_short_is_named(copy, keep):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"whole safetensors file .*model\.safet"):
        load(copy)


def test_weights_that_are_pickled_are_not_read(copy):
    (copy / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no such file") as caught:
        load(copy)
    assert "safetensors only" in caught.value.next_step


def test_weights_that_are_missing_are_not_left_at_random(copy):
    file = copy / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing keys: .*layers\.1\.mlp\.up"):
        load(copy)


def test_weights_that_would_be_left_out_are_named(copy):
    file = copy / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.ones(32)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 unexpected keys"):
        load(copy)


def test_weights_of_another_width_do_not_load(copy):
    edit_json(copy / "config.json", intermediate_size=40)
    shapes = r"up_proj\.weight \[48, 32\] where config\.json wants \[40, 32\]"
    with pytest.raises(ModelError, match=rf"9 mismatched keys: .*{shapes}"):
        load(copy)


@pytest.mark.parametrize(
    ("kind", "setting", "said"),
    [
        ("llama", {"num_hidden_layers": 10**9}, "1000000000 layers .* found 3 in its"),
        ("llama", {"num_hidden_layers": 4}, "4 layers .* found 3 in its files"),
        ("qwen3", {"vocab_size": 10**9}, "64,000,.* weights .* found [0-9,]+ in its"),
        ("mixtral", {"num_local_experts": 10**6}, "weights .* found [0-9,]+ in its"),
    ],
)
def test_settings_of_another_size_are_refused_before_anything_is_made(
    kind, setting, said, tmp_path, monkeypatch
):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load(tmp_path).n_layers == 3
    edit_json(tmp_path / "config.json", **setting)
    monkeypatch.setattr(type(model), "from_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ModelError, match=said):
        load(tmp_path)


def test_a_model_without_a_tokenizer_is_refused(copy):
    for file in copy.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="a tokenizer with"):
        load(copy)


def test_a_tokenizer_that_cannot_be_read_is_refused(copy):
    (copy / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ModelError, match="tokenizer that can be read"):
        load(copy)


@pytest.mark.parametrize("length", [[], "x", {}])
def test_a_tokenizer_that_fails_on_the_first_text_is_refused(copy, length):
    edit_json(copy / "tokenizer_config.json", model_max_length=length)
    with pytest.raises(ModelError, match=r"tokenizer that can be read in .*TypeError"):
        load(copy)


def test_a_tokenizers_own_code_is_not_run(copy):
    code = "raise SystemExit('this ran')"
    (copy / "own.py").write_text(code)
    edit_json(
        copy / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["own.Tokenizer", None]},
    )
    assert load(copy).thinking is not None
    (copy / "tokenizer.json").rename(copy / "vocab.json")
    with pytest.raises(InputError, match="never run"):
        load(copy)


def test_a_models_own_code_is_not_run(copy):
    (copy / "own.py").write_text("raise SystemExit('this ran')")
    edit_json(copy / "config.json", auto_map={"AutoModelForCausalLM": "own.Model"})
    assert load(copy).n_layers == 3


def test_a_model_without_a_chat_template_is_refused(copy):
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="a chat template with"):
        load(copy)


def test_a_directory_without_a_model_says_so(tmp_path):
    with pytest.raises(InputError, match=r"a model directory with a config\.json"):
        load(tmp_path)


def test_a_broken_configuration_is_named(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"a readable config\.json"):
        load(copy)


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "/no/such/model", "a b"])
def test_a_path_that_is_not_there_is_no_hub_id(name):
    with pytest.raises(InputError, match="which is neither"):
        load(name)


def test_a_file_is_no_model(copy):
    with pytest.raises(InputError, match="which is a file"):
        load(copy / "config.json")


def test_half_precision_is_widened_on_the_cpu_unless_asked_for(copy):
    tiny_model().half().save_pretrained(copy)
    assert load(copy).dtype == torch.float32
    assert load(copy, dtype="bfloat16").identity.dtype == "bfloat16"


def test_auto_keeps_the_checkpoints_arithmetic_on_an_accelerator():
    gpu = torch.device("cuda")
    config = {"dtype": "bfloat16"}
    assert parts.choose_dtype("auto", gpu, config) == torch.bfloat16
    assert parts.choose_dtype("auto", gpu, {}) == torch.float32
    with pytest.raises(SettingsError, match="float8"):
        parts.choose_dtype("auto", gpu, {"dtype": "float8_e4m3fn"})


@pytest.mark.parametrize("device", ["cuda:77", "abacus"])
def test_a_device_that_is_not_there_is_refused(saved, device):
    with pytest.raises(SettingsError, match=device):
        load(saved, device=device)


def test_the_fingerprint_follows_the_weights(copy, saved):
    before = load(saved).identity.weights_sha256
    assert load(copy).identity.weights_sha256 == before
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight[3, 5] += 0.5
    model.save_pretrained(copy)
    assert load(copy).identity.weights_sha256 != before


def test_the_fingerprint_sees_one_row_in_the_middle_of_a_large_tensor(tmp_path):
    model = tiny_model(vocab_size=40_000)
    embedding = model.model.embed_tokens.weight
    assert embedding.nbytes > 3 << 20
    for name in ("before", "after"):
        tiny_tokenizer(PLAIN_TEMPLATE).save_pretrained(tmp_path / name)
    model.save_pretrained(tmp_path / "before")
    before = fingerprint_source(tmp_path / "before")["weights_sha256"]
    in_memory = fingerprint_model(model, {})
    row = embedding[20_000].detach().clone()
    with torch.no_grad():
        embedding[20_000] += 0.5
    model.save_pretrained(tmp_path / "after")
    assert fingerprint_source(tmp_path / "after")["weights_sha256"] != before
    assert fingerprint_model(model, {}) != in_memory
    with torch.no_grad():
        embedding[20_000] = row
    assert fingerprint_model(model, {}) == in_memory


def test_memory_that_ends_while_loading_is_the_machines_fault(saved, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(
        loading_weights.transformers.Qwen3ForCausalLM, "from_pretrained", fail
    )
    with pytest.raises(EnvironmentProblem, match="memory for"):
        load(saved)


def test_a_loaded_model_stops_where_its_generation_config_says(copy):
    tiny_tokenizer(PLAIN_TEMPLATE).save_pretrained(copy)
    sampling = Sampling(temperature=0, max_thinking=0, max_answer=8)
    prompts = [(SEQUENCES[0], 0)]
    ((free,),) = generate(load(copy), prompts, sampling)
    third = free.token_ids[len(SEQUENCES[0]) + 2]
    edit_json(copy / "generation_config.json", eos_token_id=[257, third])
    ((row,),) = generate(load(copy), prompts, sampling)
    assert row.finish == "stop"
    assert row.token_ids == free.token_ids[: len(row.token_ids)]
    assert row.token_ids[-1] == third


def test_an_index_beside_newer_weights_is_refused(tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    old = load(tmp_path).identity.weights_sha256
    # Transformers reads this file, and a fingerprint by the index would be `old`.
    weights = tiny_model(seed=2).state_dict()
    safetensors.torch.save_file(
        weights, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    for find in (load, fingerprint_source):
        with pytest.raises(ModelError, match=r"one set of weights .*index\.json"):
            find(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert load(tmp_path).identity.weights_sha256 != old


def test_an_index_of_one_file_is_that_file(copy, saved):
    names = safetensors.torch.load_file(copy / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load(copy).identity.weights_sha256 == load(saved).identity.weights_sha256


def test_an_adapters_index_beside_its_weights_is_refused(copy):
    # PEFT reads the one file, whatever the index says.
    (copy / "adapter_config.json").write_text("{}")
    index = {"weight_map": {"a": "adapter_model-00001-of-00001.safetensors"}}
    path = copy / "adapter_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match="no such file"):
        weight_files(copy, "adapter_model")
    one = {"a": torch.ones(2)}
    for name in ("adapter_model", "adapter_model-00001-of-00001"):
        safetensors.torch.save_file(one, copy / f"{name}.safetensors")
    with pytest.raises(ModelError, match="one set of weights"):
        weight_files(copy, "adapter_model")


def test_weights_under_a_name_of_their_own_are_not_passed_by(copy):
    shutil.copy(copy / "model.safetensors", copy / "old.safetensors")
    edit_json(copy / "config.json", transformers_weights="old.safetensors")
    with pytest.raises(ModelError, match="`transformers_weights` in its config"):
        load(copy)


def test_shards_that_are_not_those_of_the_index_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    last = max(index.values())
    index["model.norm.weight"] = min(index.values())
    path.write_text(json.dumps({"weight_map": index}))
    assert last != min(index.values())
    with pytest.raises(ModelError, match=r"another place for model\.norm\.weight"):
        load(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": None},
        {},
        {"weight_map": {}},
        {"weight_map": ["a"]},
        {"weight_map": {"a": 3}},
        {"weight_map": {"a": "../elsewhere.safetensors"}},
        [],
    ],
)
def test_an_index_that_says_nothing_is_named(copy, index):
    path = copy / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        load(copy)


@pytest.mark.parametrize(
    ("name", "row"), [("model.embed_tokens.weight", 17), ("lm_head.weight", 200)]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_no_number_is_named(copy, name, row, value):
    file = copy / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[name][row] = value
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="finite in float32") as caught:
        load(copy)
    assert f"32 that are not in `{name}`, the first at [{row}, 0]" in str(caught.value)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = value
    with pytest.raises(ModelError, match=r"1 that are not in .*first at \[3\]"):
        adapt(model, tokenizer)


def test_a_number_that_is_too_large_for_the_arithmetic_is_named(copy):
    file = copy / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.embed_tokens.weight"][250, 1] = 1e6
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"finite in float16.*\[250, 1\]"):
        load(copy, dtype="float16")


def test_logits_that_are_not_finite_stop_the_run(tokenizer):
    held = adapt(tiny_model(), tokenizer)
    prompts = [([5, 6, 7], 0), ([17, 6], 1)]
    greedy = Sampling(temperature=0, max_thinking=4, max_answer=8)
    drawn = Sampling(temperature=1.0, top_p=0.9, max_thinking=4, max_answer=8)
    # Damaged after the proofs, as a device may do, or an edit of heads.
    with torch.no_grad():
        held.model.model.embed_tokens.weight[17] = torch.nan
    for sampling in (greedy, drawn):
        with pytest.raises(ModelError, match="nan or inf in the row of prompt 1"):
            list(generate(held, prompts, sampling))
        with pytest.raises(ModelError, match="nan or inf"):
            list(generate(held, prompts, sampling, drafts=[[], [5, 6]]))
    with pytest.raises(ModelError, match="nan or inf in the states of sequence 1"):
        final_states(held, [[5, 6], [17, 3]])
    with pytest.raises(ModelError, match="nan or inf in the logits"):
        target_losses(held, [[17, 3, 4]], [(1, 3)])


def test_a_temperature_of_the_models_own_is_taken_as_it_stands(tokenizer):
    held = adapt(tiny_model(), tokenizer)

    def resolved(**own):
        held.model.generation_config = transformers.GenerationConfig(**own)
        return resolve_sampling(held, RolloutSettings())

    assert resolved(do_sample=True, temperature=0.0).temperature == 0.0
    assert resolved(do_sample=True, temperature=0.7, top_p=0.8).temperature == 0.7
    assert resolved(do_sample=True).temperature == 1.0
    assert resolved(temperature=0.7).temperature == 0.0


BROKEN = {
    "layers": ("config.json", {"num_hidden_layers": 7, "layer_types": None}),
    "heads": ("config.json", {"num_attention_heads": 16.0}),
    "no heads": ("config.json", {"num_attention_heads": 0}),
    "words": ("config.json", {"num_attention_heads": "four"}),
    "width": ("config.json", {"head_dim": 0}),
    "types": ("config.json", {"layer_types": 3}),
    "class": ("config.json", {"architectures": 3}),
    "positions": ("config.json", {"max_position_embeddings": None}),
    "rope": ("config.json", {"rope_parameters": [1]}),
    "act": ("config.json", {"hidden_act": "nothing"}),
    "stop": ("generation_config.json", {"eos_token_id": "<|end|>"}),
    "hot": ("generation_config.json", {"temperature": "hot", "do_sample": True}),
    "endless": ("generation_config.json", {"temperature": float("inf")}),
    "below 0": ("generation_config.json", {"temperature": -1.0}),
    "true": ("generation_config.json", {"temperature": True}),
    "nucleus": ("generation_config.json", {"top_p": 7}),
    "no nucleus": ("generation_config.json", {"top_p": 0}),
    "stops": ("generation_config.json", {"eos_token_id": [1, None]}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_settings_that_cannot_be_meant_are_named_in_one_line(copy, what):
    file, changes = BROKEN[what]
    if what == "layers":
        types = ["full_attention"] * 8
        changes = changes | {"layer_types": types}
    edit_json(copy / file, **changes)
    with pytest.raises(HoldfastError, match=file) as caught:
        load(copy)
    assert caught.value.exit_status in (2, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["[]", "", '{"eos_token_id": 2', "3", "[" * 100_000])
def test_a_file_of_settings_that_is_no_object_is_named(copy, name, text):
    (copy / name).write_text(text)
    with pytest.raises(InputError, match=name):
        load(copy)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 3},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
    ],
)
def test_a_header_of_weights_that_cannot_be_read_is_named(copy, header):
    text = json.dumps(header).encode()
    file = copy / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    with pytest.raises(ModelError, match=r"whole safetensors file .*model\.safet"):
        load(copy)
