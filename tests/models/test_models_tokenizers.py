"""The tokenizer is what the directory's own files say, whatever is installed."""

import importlib
import json
import shutil
import types

import pytest

import tiny_thinker
from holdfast.errors import InputError, ModelError
from holdfast.models.loading.causal import load
from holdfast.models.loading.load import fingerprint_source


@pytest.fixture
def with_tekken(thinker, tmp_path):
    """A directory that holds the vocabulary of another library as well."""
    folder = tmp_path / "tekken"
    shutil.copytree(thinker, folder)
    (folder / "tekken.json").write_text('{"config": {}, "vocab": []}')
    return folder


def test_an_installed_package_does_not_change_the_tokenizer(with_tekken, monkeypatch):
    before = load(with_tekken)
    auto = importlib.import_module("transformers.models.auto.tokenization_auto")
    asked = []

    def installed(place, mistral_format=None, **more):
        asked.append(mistral_format)
        return mistral_format is not False

    class Other:
        @classmethod
        def from_pretrained(cls, *places, **how):
            return types.SimpleNamespace(chat_template=None)

    monkeypatch.setattr(auto, "_use_mistral_format", installed)
    by_name = auto.tokenizer_class_from_name
    monkeypatch.setattr(
        auto,
        "tokenizer_class_from_name",
        lambda name: Other if name == "MistralCommonBackend" else by_name(name),
    )
    # The place where it would matter: a family whose own class is the package's.
    monkeypatch.setitem(auto.TOKENIZER_MAPPING_NAMES, "qwen3", "MistralCommonBackend")
    plain = auto.AutoTokenizer.from_pretrained(with_tekken, local_files_only=True)
    assert plain.chat_template is None
    after = load(with_tekken)
    assert after.identity == before.identity
    text = "<|user|>How do I paint a boat?<|end|>"
    assert after.tokenizer(text).input_ids == before.tokenizer(text).input_ids


def test_class_file_and_hash_of_the_tokenizer_are_in_the_identity(thinker, tmp_path):
    identity = load(thinker).identity
    assert identity.tokenizer_class == "TokenizersBackend"
    assert identity.tokenizer_source == "tokenizer.json"
    # Another vocabulary under the same weights and template is another model.
    folder = tmp_path / "other"
    shutil.copytree(thinker, folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    merges = vocabulary["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    other = fingerprint_source(folder)
    known = fingerprint_source(thinker)
    assert other["tokenizer_sha256"] != known["tokenizer_sha256"]
    assert other["weights_sha256"] == known["weights_sha256"]
    assert load(folder).identity != identity


def test_a_tokenizer_that_only_another_package_reads_is_named(thinker, tmp_path):
    folder = tmp_path / "alone"
    shutil.copytree(thinker, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    (folder / "tekken.json").write_text("{}")
    with pytest.raises(InputError, match=r"tekken\.json alone.*tokenizer\.json"):
        load(folder)


def test_a_second_vocabulary_of_another_tokenizer_is_named(thinker, tmp_path):
    folder = shutil.copytree(thinker, tmp_path / "two")
    whole = json.loads((folder / "tokenizer.json").read_text())
    vocab = dict(whole["model"]["vocab"])
    # Many models come with both files, which say the same.
    (folder / "vocab.json").write_text(json.dumps(vocab))
    load(folder)
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(InputError, match=r"vocab\.json of another: 2 tokens"):
        load(folder)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": 3}', "\x00"])
def test_a_damaged_tokenizer_is_one_line(thinker, tmp_path, content):
    folder = tmp_path / "damaged"
    shutil.copytree(thinker, folder)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="tokenizer") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_template_is_refused_as_before(thinker, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(thinker, folder)
    (folder / "chat_template.jinja").unlink()
    made = tiny_thinker.tokenizer()
    made.chat_template = None
    made.save_pretrained(folder)
    with pytest.raises(ModelError, match="chat template"):
        load(folder)
