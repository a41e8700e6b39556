"""GGUF files: expanded once, with nothing of the model lost."""

import hashlib
import json
import math
import os
import shutil

import pytest
import torch
import transformers

pytest.importorskip("gguf", reason=".[gguf] is not installed")
pytest.importorskip("accelerate", reason=".[gguf] is not installed")

from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from gguf_files import write_gguf
from holdfast.errors import (
    EnvironmentProblem,
    InputError,
    ModelError,
    StorageError,
    UnsupportedFamilyError,
)
from holdfast.models.containers import gguf as containers
from holdfast.models.containers import kept as keeping
from holdfast.models.export import baking
from holdfast.models.hidden_states import final_states
from holdfast.models.interventions import HeadEdit, head_factors, scale_heads
from holdfast.models.loading.causal import adapt, load
from holdfast.models.loading.checkpoint import find_checkpoint
from holdfast.models.loading.load import fingerprint_source
from holdfast.rollout.session import Session
from holdfast.rollout.settings import ModelSettings
from holdfast.study import Study
from tiny_models import random_sequences, tiny_model

SEQUENCES = random_sequences([40, 9])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(keeping.PLACE, str(folder))
    return folder


def tiny(**changes):
    return tiny_model("llama", attention_bias=False, **changes)


@pytest.fixture
def write(tmp_path, tokenizer):
    """Writes a GGUF file of a tiny Llama into a folder of its own."""

    def written(model=None, name="tiny.gguf", **settings):
        folder = tmp_path / "files"
        folder.mkdir(exist_ok=True)
        return write_gguf(folder / name, model or tiny(), tokenizer, **settings)

    return written


def assert_twin(path, model, tokenizer):
    """The file gives the very states and logits of a model in memory."""
    found, twin = load(path), adapt(model, tokenizer)
    assert torch.equal(final_states(found, SEQUENCES), final_states(twin, SEQUENCES))
    ids = torch.tensor([SEQUENCES[0]])
    with torch.no_grad():
        assert torch.equal(found.model(ids).logits, twin.model(ids).logits)
    return found


def test_a_file_is_its_twin_in_safetensors_and_is_expanded_once(
    write, tokenizer, cache, monkeypatch, caplog
):
    path = write()
    found = assert_twin(path, tiny(), tokenizer)
    assert "once: about" in caplog.text
    assert found.identity.model_id == str(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.identity.gguf_sha256 == digest
    assert found.tokenizer.chat_template == tokenizer.chat_template
    text = "<|user|>Hi 12 <think>"
    assert found.encode(text) == tuple(tokenizer(text)["input_ids"])
    [copy] = (each for each in (cache / "gguf").iterdir() if each.is_dir())
    config = json.loads((copy / "config.json").read_text())
    assert not {"_model_name_or_path", "quantization_config"} & set(config)
    monkeypatch.setattr(containers, "_expand", None)
    again = load(path.parent)
    assert again.identity.weights_sha256 == found.identity.weights_sha256
    assert fingerprint_source(path)["weights_sha256"] == found.identity.weights_sha256
    # What reads it anew is a plain checkpoint, without any of this.
    plain = transformers.AutoModelForCausalLM.from_pretrained(copy, dtype="float32")
    assert torch.equal(plain.lm_head.weight, tiny().lm_head.weight)


def test_an_adapter_over_a_file_names_it_and_not_its_copy(write, tmp_path):
    file = write()
    adapter = load(file)
    edit = HeadEdit(head_factors(adapter, [(0, 1)]))
    off = tmp_path / "off"
    with baking(adapter, edit, off, provenance={}, form="adapter"):
        pass
    named = json.loads((off / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == f"../files/{file.name}"
    with scale_heads(adapter, edit):
        expected = final_states(adapter, SEQUENCES)
    assert torch.equal(final_states(load(off), SEQUENCES), expected)


def test_a_study_names_the_file_and_its_hash_and_finds_it_from_elsewhere(
    write, tmp_path, monkeypatch
):
    path = write()
    monkeypatch.chdir(path.parent)
    study = Study.create(tmp_path / "study")
    Session("tiny.gguf").claim(study)
    model = study.manifest["model"]
    assert model["gguf_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model["id"] == "tiny.gguf"
    assert study.manifest["loading"]["directory"] == str(path)
    monkeypatch.chdir(tmp_path)
    session = Session.of(Study.open(study.directory), ModelSettings())
    session.check_same(study)
    assert session.model_record() == model


def test_packed_weights_have_the_values_that_the_format_says(write, tokenizer):
    model = tiny()
    kind = GGMLQuantizationType.Q8_0
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2 and weight.shape[1] % 32 == 0:
                packed = quantize(weight.numpy(), kind)
                weight.copy_(torch.from_numpy(dequantize(packed, kind)))
    assert_twin(write(packed=True), model, tokenizer)


def test_equal_head_and_embedding_are_tied_again(write, cache):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    found = load(write(model))
    assert found.lm_head.weight is found.embedding.weight
    assert found.model.config.tie_word_embeddings
    untied = load(write(tiny(), name="other.gguf"))
    assert untied.lm_head.weight is not untied.embedding.weight


def test_the_end_of_a_turn_is_a_stop_token(write):
    path = write(tokenizer__ggml__eot_token_id=260, tokenizer__ggml__eom_token_id=259)
    assert load(path).stop_ids == {257, 259, 260}
    generation = transformers.GenerationConfig.from_pretrained(
        find_checkpoint(path, None).directory
    )
    assert generation.eos_token_id == [257, 260, 259]


def _llama3(width, base, factor):
    """Divisors as Llama 3.1 defines them: by wavelength, in three parts."""
    found = []
    for index in range(0, width, 2):
        wavelength = 2 * math.pi * base ** (index / width)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found)


STRETCHED = [
    (
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0}
        | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        {"rope_freqs__weight": _llama3(8, 500_000.0, 32.0)},
    ),
    (
        {"rope_type": "linear", "factor": 4.0},
        {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0},
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0}
        | {"llama__rope__scaling__original_context_length": 128},
    ),
]


@pytest.mark.parametrize(("rotary", "said"), STRETCHED)
def test_stretched_rotary_frequencies_are_those_of_the_file(
    write, tokenizer, rotary, said
):
    theta = {"rope_theta": 500_000.0}
    model = tiny(rope_parameters=rotary | theta)
    found = assert_twin(write(model, **said), model, tokenizer)
    # The case that transformers reads for itself would be another model.
    plain = adapt(tiny(rope_parameters={"rope_type": "default"} | theta), tokenizer)
    assert not torch.allclose(
        final_states(found, SEQUENCES), final_states(plain, SEQUENCES), atol=1e-4
    )


@pytest.mark.parametrize(
    "said",
    [
        {"rope_freqs__weight": torch.tensor([1.0, 2.0, 3.0, 4.0])},
        {"llama__rope__scaling__type": "longrope"},
        {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__log": 1.0},
        {"llama__rope__scale_linear": 4.0},
        {"rope_factors_long__weight": torch.ones(4)},
    ],
)
def test_frequencies_that_nothing_reads_are_refused(write, said):
    with pytest.raises(UnsupportedFamilyError, match=r"rotary.*safetensors"):
        load(write(**said))


@pytest.mark.parametrize(
    "said",
    [
        {"blk__1__attn_q__bias": torch.ones(32)},  # The model has no place for it.
        {"blk__1__ffn_norm__weight": None},  # It would be left at random.
        {"blk__1__ffn_norm__weight": None, "extra__weight": torch.ones(32)},
    ],
)
def test_a_weight_without_a_place_or_a_place_without_one_is_refused(write, cache, said):
    with pytest.raises(ModelError, match="one place in the model for each weight"):
        load(write(**said))
    assert not [each for each in (cache / "gguf").iterdir() if each.is_dir()]


def test_an_architecture_that_cannot_be_read_is_named(write):
    path = write(architecture="mamba9")
    with pytest.raises(UnsupportedFamilyError, match=r"`mamba9`.*Give the safetensors"):
        load(path)


def test_an_architecture_that_does_not_fit_is_refused_before_it_is_expanded(
    write, monkeypatch
):
    monkeypatch.setattr(containers, "_model", None)

    def check(config, name):
        raise UnsupportedFamilyError("one that fits", config["model_type"], name)

    path = write()
    with pytest.raises(UnsupportedFamilyError, match=f"found llama. {path}"):
        find_checkpoint(path, None, check)


def test_a_missing_template_is_said_and_one_beside_the_file_is_taken(
    write, caplog, tokenizer
):
    path = write(template=None)
    with pytest.raises(ModelError, match="a chat template"):
        load(path)
    assert "no chat template" in caplog.text
    (path.parent / "chat_template.jinja").write_text(tokenizer.chat_template)
    assert load(path).tokenizer.chat_template == tokenizer.chat_template


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _other_kind(path):
    path.write_bytes(b"GGML" + path.read_bytes()[4:])


def _beheaded(path):
    path.write_bytes(path.read_bytes()[:200])


def _empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_cut, _other_kind, _beheaded, _empty])
def test_a_damaged_file_is_named(write, damage):
    path = write()
    damage(path)
    with pytest.raises(InputError, match=r"a GGUF file in .*tiny\.gguf"):
        load(path)


def test_a_part_of_several_is_refused(write):
    with pytest.raises(InputError, match=r"one part of several.*gguf-split --merge"):
        load(write(split__count=3))


def test_of_several_files_one_has_to_be_named(write):
    path = write()
    shutil.copy(path, path.with_name("second.gguf"))
    with pytest.raises(InputError, match=r"found 2: second\.gguf, tiny\.gguf"):
        load(path.parent)
    load(path)


def test_a_killed_expansion_leaves_nothing_and_is_done_again(write, cache, monkeypatch):
    path = write()
    original = transformers.PreTrainedTokenizerBase.save_pretrained

    def killed(*arguments, **named):
        os.replace(next(_staged(cache)), cache / "gguf" / "kept")
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        load(path)
    monkeypatch.setattr(
        transformers.PreTrainedTokenizerBase, "save_pretrained", original
    )
    # As if the process had been killed: its folder is still there, without an owner.
    directory = containers_directory(path, cache, monkeypatch)
    os.replace(cache / "gguf" / "kept", directory.with_name(f".{directory.name}.1.tmp"))
    load(path)
    assert not list(_staged(cache))


def _staged(cache):
    return (cache / "gguf").glob(".*.tmp")


def containers_directory(path, cache, monkeypatch):
    """Where the copy of a file will lie."""
    found = []
    with monkeypatch.context() as patched:
        patched.setattr(
            containers, "_expand", lambda _, folder, *__: found.append(folder)
        )
        containers.expanded(path, lambda *_: None)
    return found[0]


def test_a_missing_package_is_named(write, monkeypatch):
    none = dict.fromkeys(keeping.versions())
    monkeypatch.setattr(containers, "versions", lambda: none)
    with pytest.raises(EnvironmentProblem, match=r"pip install '\.\[gguf\]'"):
        load(write())


def test_a_copy_needs_a_folder_with_room(write, monkeypatch):
    path = write()
    usage = shutil.disk_usage("/")._replace(free=1000)
    with monkeypatch.context() as patched:
        patched.setattr(containers.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(StorageError, match="GB for the expanded copy"):
            load(path)
    monkeypatch.setenv(keeping.PLACE, "")
    with pytest.raises(EnvironmentProblem, match="nothing is kept"):
        load(path)


def test_a_splitting_that_transformers_does_not_know_is_said(
    write, caplog, monkeypatch
):
    load(write(tokenizer__ggml__pre="unheard-of"))
    assert "`unheard-of` splits text" in caplog.text
