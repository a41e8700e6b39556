"""What is kept of one start for the next, and when it must not be."""

import json
import os

import pytest
import safetensors.torch
import torch
from transformers import Qwen3ForCausalLM

from holdfast.errors import AdapterError, ModelError
from holdfast.models.containers import kept as keeping
from holdfast.models.containers.kept import PLACE, kept
from holdfast.models.loading import parts, weights
from holdfast.models.loading.causal import adapt, load
from tiny_models import tiny_model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder for what is kept, and files that need no time to settle."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(PLACE, str(folder))
    monkeypatch.setattr(keeping, "SETTLED_NS", 0)
    return folder


@pytest.fixture
def read(monkeypatch):
    """The names of the passes over all weights, as they are done."""
    done = []

    def watch(module, name):
        original = getattr(module, name)

        def watched(*arguments):
            done.append(name)
            return original(*arguments)

        monkeypatch.setattr(module, name, watched)

    watch(parts, "check_numbers")
    watch(parts, "prove")
    watch(weights, "_file_parts")
    return done


EVERYTHING = ["_file_parts", "check_numbers", "prove"]


def test_a_second_start_reads_the_weights_once_and_shows_the_same_proofs(
    copy, cache, read
):
    first = load(copy)
    assert read == EVERYTHING
    second = load(copy)
    assert read == EVERYTHING
    assert second.proofs == first.proofs
    assert second.identity == first.identity


def test_another_arithmetic_is_proved_anew(copy, cache, read):
    load(copy)
    load(copy, dtype="bfloat16")
    assert read == [*EVERYTHING, "check_numbers", "prove"]


def test_other_code_of_ours_is_proved_anew(copy, cache, read, monkeypatch):
    load(copy)
    monkeypatch.setattr(keeping, "_code", lambda: "other")
    load(copy)
    assert read == [*EVERYTHING, "check_numbers", "prove"]


def test_another_number_of_threads_is_proved_anew(copy, cache, read, monkeypatch):
    load(copy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    load(copy)
    assert read == [*EVERYTHING, "check_numbers", "prove"]


def test_a_model_that_lies_elsewhere_is_proved_anew(copy, cache, read, monkeypatch):
    load(copy)
    # As where some of it did not fit, and its heads cannot be read.
    places = {"model": 0, "lm_head": "cpu"}
    monkeypatch.setattr(Qwen3ForCausalLM, "hf_device_map", places, raising=False)
    load(copy)
    assert read == [*EVERYTHING, "check_numbers", "prove"]


def test_a_changed_weight_shows_though_size_and_time_are_set_back(copy, cache, read):
    path = copy / "model.safetensors"
    identity, seen = load(copy).identity, path.stat()
    tensors = safetensors.torch.load_file(path)
    tensors["model.norm.weight"][0] += 1
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert path.stat().st_size == seen.st_size
    assert load(copy).identity != identity
    assert read == EVERYTHING * 2


def test_a_file_that_has_just_changed_is_hashed_every_time(copy, cache, read):
    keeping.SETTLED_NS = 60_000_000_000
    load(copy)
    load(copy)
    assert read == [*EVERYTHING, "_file_parts"]


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, cache):
    path = tmp_path / "weights"
    path.write_text("one")

    def compute():
        path.write_text("three")
        return "of one"

    assert kept("hash", {}, compute, files=[path]) == "of one"
    assert kept("hash", {}, lambda: "of three", files=[path]) == "of three"


def _cut(path, others):
    path.write_text(path.read_text()[:-20])


def _other_proof(path, others):
    record = json.loads(path.read_text())
    record["value"][0][1] = False
    path.write_text(json.dumps(record))


def _another_model(path, others):
    path.write_text(next(each for each in others if each != path).read_text())


def _no_record(path, others):
    path.write_text("[" * 100_000)


@pytest.mark.parametrize("damage", [_cut, _other_proof, _another_model, _no_record])
def test_a_damaged_or_foreign_record_is_passed_by(copy, cache, read, damage):
    first = load(copy)
    load(copy, dtype="bfloat16")
    records = sorted((cache / "proofs").iterdir())
    texts = [path.read_text() for path in records]
    for path in records[:1]:
        damage(path, records)
    read.clear()
    assert load(copy).proofs == first.proofs
    load(copy, dtype="bfloat16")
    assert read == ["check_numbers", "prove"]
    # What was passed by is written anew.
    assert sorted(path.read_text() for path in records) == sorted(texts)


def test_what_fails_is_not_kept(copy, cache, read):
    path = copy / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    for _ in range(2):
        with pytest.raises(ModelError, match="finite"):
            load(copy)
    assert read.count("check_numbers") == 2


def test_a_kept_proof_that_failed_still_refuses(copy, cache, monkeypatch):
    proofs = load(copy).proofs
    failing = [proofs[0]._replace(passed=False, value=float("inf")), *proofs[1:]]
    monkeypatch.setattr(parts, "prove", lambda named: tuple(failing))
    for path in (cache / "proofs").iterdir():
        path.unlink()
    for prove in (parts.prove, lambda named: proofs):
        monkeypatch.setattr(parts, "prove", prove)
        with pytest.raises(AdapterError, match=proofs[0].name):
            load(copy)


def test_a_model_in_memory_is_always_proved(tokenizer, cache, read):
    for _ in range(2):
        adapt(tiny_model(), tokenizer)
    assert read == ["check_numbers", "prove"] * 2


def test_where_nothing_can_be_kept_all_is_computed(copy, tmp_path, monkeypatch, read):
    monkeypatch.setattr(keeping, "SETTLED_NS", 0)
    (tmp_path / "file").write_text("")
    for place in ("", str(tmp_path / "file")):
        monkeypatch.setenv(PLACE, place)
        load(copy)
        load(copy)
    assert read == EVERYTHING * 4
