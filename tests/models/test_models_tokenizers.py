"""The tokenizer is what the directory's own files say, whatever is installed."""

import base64
import importlib
import json
import shutil
import types

import pytest
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

import tiny_thinker
from holdfast.errors import InputError, ModelError
from holdfast.models.batching import pad
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


def _tekken(folder, tokens):
    """Write tokens as the other library does: in bytes, without the special ones."""
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    spelt = [
        base64.b64encode(bytes(map(letters.get, each))).decode() for each in tokens
    ]
    vocab = [{"rank": n, "token_bytes": each} for n, each in enumerate(spelt)]
    (folder / "tekken.json").write_text(json.dumps({"config": {}, "vocab": vocab}))


def _sentences(folder, tokens):
    """Write tokens as SentencePiece does: each with a score of four bytes."""
    data = b""
    for token in tokens:
        text = token.encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + b"\0\0\0\0"
        data += b"\x0a" + bytes([len(piece)]) + piece
    # Behind the pieces stand settings of the training.
    (folder / "tokenizer.model").write_bytes(data + b"\x12\x02\x18\x05")


def _ranks(folder, tokens):
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    lines = [
        base64.b64encode(bytes(map(letters.get, each))) + b" %d\n" % n
        for n, each in enumerate(tokens)
    ]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))


@pytest.mark.parametrize("write", [_tekken, _sentences, _ranks])
def test_a_vocabulary_of_another_library_is_compared(write, thinker, tmp_path):
    folder = shutil.copytree(thinker, tmp_path / "two")
    whole = json.loads((folder / "tokenizer.json").read_text())
    special = {each["content"] for each in whole["added_tokens"]}
    numbers = whole["model"]["vocab"]
    own = [t for t in sorted(numbers, key=numbers.get) if t not in special]
    # All of them stand behind the special tokens here, and one is spelt anew.
    write(folder, ["@@", *own[1:]])
    load(folder)
    write(folder, own[::-1])
    with pytest.raises(InputError, match=r"one tokenizer.*of another.*Remove"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n"),
        ("tokenizer.model", b"\x0a\x7fcut"),
        ("tekken.json", b"[]"),
        ("tekken.json", b'{"vocab": [{"token_bytes": "?"}]}'),
    ],
)
def test_one_that_cannot_be_read_is_told_and_not_in_the_way(
    name, data, thinker, tmp_path, caplog
):
    folder = shutil.copytree(thinker, tmp_path / "two")
    (folder / name).write_bytes(data)
    load(folder)
    assert "cannot be compared" in caplog.text


def test_which_of_two_is_read_is_not_left_to_the_order_of_names(thinker, tmp_path):
    folder = shutil.copytree(thinker, tmp_path / "two")
    (folder / "tokenizer.json").unlink()
    _sentences(folder, ["a", "b"])
    _tekken(folder, ["b", "a"])
    with pytest.raises(InputError, match=r"tokenizer\.model and tekken\.json"):
        load(folder)


def test_a_model_without_a_tokenizer_has_its_states_and_heads(thinker, tmp_path):
    folder = shutil.copytree(
        thinker, tmp_path / "alone", ignore=shutil.ignore_patterns("tokenizer*")
    )
    (folder / "tekken.json").write_text("{}")
    with pytest.raises(InputError, match=r"States and heads.*needs_template=False"):
        load(folder)
    alone, whole = load(folder, needs_template=False), load(thinker)
    assert alone.tokenizer is None
    assert alone.identity.tokenizer_sha256 == ""
    assert "tekken.json alone" in alone.lacks("text")
    assert alone.lacks("heads") is None
    batch = pad([[5, 6, 7]], "right", alone.device)
    assert torch.equal(alone.states(batch), whole.states(batch))
