"""GGUF files, expanded once into safetensors and read from there ever after.

Reading one takes up to a hundred times as long as the same model in safetensors, and
what transformers then holds cannot be told from any other model: all of its weights are
expanded. What its reader leaves out of a file is put back here, or refused by name.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from holdfast.errors import (
    EnvironmentProblem,
    InputError,
    ModelError,
    StorageError,
    UnsupportedFamilyError,
)
from holdfast.models.containers.kept import PLACE, cache_directory, kept, versions
from holdfast.models.library import library_errors, quietly
from holdfast.study.files import (
    atomic_write_json,
    claim,
    file_sha256,
    fingerprint,
    staging,
    writing,
)

SUFFIX = ".gguf"
RECORD = "holdfast_gguf.json"
"""Written last into an expanded copy: which file it is of."""
TEMPLATE = "chat_template.jinja"
_FORMAT = "holdfast-gguf/1"
_ENDS = ("eot", "eom")
"""Tokens that end a turn or a message, beside the end of the text: one key each."""
_FREQUENCIES = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_LENGTH = 8192
_SCALED = {"linear": {"factor"}, "yarn": {"factor", "original_context_length"}}
_IGNORED = {"type", "finetuned"}
# Bytes of a file that are expanded in a second of one core, and what comes on top.
_RATE, _START = 6e6, 15.0

log = logging.getLogger("holdfast")


class _Header(NamedTuple):
    """What a file says of itself before any of its weights is read."""

    metadata: Mapping[str, Any]
    sizes: Mapping[str, int]  # Number of weights of each tensor.
    frequencies: Tensor | None  # Divisors of the rotary frequencies.

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])


def find_file(path: Path) -> Path | None:
    """Return the GGUF file that a path names; None if it names something else.

    A folder names its only one, unless it holds a model of transformers as well.

    Raises:
        InputError: If a folder holds several.
    """
    if path.suffix.lower() == SUFFIX and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(each for each in path.iterdir() if each.suffix.lower() == SUFFIX)
    if len(found) > 1:
        raise InputError(
            f"one GGUF file in {path}",
            f"{len(found)}: {', '.join(each.name for each in found[:3])}",
            "Name the one that is meant by its own path.",
        )
    return found[0] if found else None


def expanded(file: Path, check: Callable[[Mapping[str, Any], str], object]) -> Path:
    """Return the directory with a GGUF file as safetensors; it is made if missing.

    It lies in the cache, keyed by the hash of the file and by the versions of what
    reads it, and appears there whole or not at all. Weights are in float32, each with
    the value that the file gives it; a `chat_template.jinja` beside the file goes
    before its own.

    `check`: Refuses a configuration that does not fit, given the name of the file.

    Raises:
        EnvironmentProblem: If the package `gguf` is missing, or nothing may be kept.
        InputError: If it is no whole GGUF file.
        UnsupportedFamilyError: If transformers cannot read its architecture.
        ModelError: If something in it would be lost.
        StorageError: If there is no room for the copy.
    """
    folder = cache_directory()
    if folder is None:
        raise EnvironmentProblem(
            f"a folder for the expanded copy of {file.name}",
            f"an empty {PLACE}, which says that nothing is kept",
            "Set it to a folder with room, or unset it.",
        )
    sha256 = kept("sha256", {}, partial(file_sha256, file), read=str, files=[file])
    beside = file.with_name(TEMPLATE)
    template = beside.read_text(encoding="utf-8") if beside.is_file() else None
    made_by = {name: versions()[name] for name in ("transformers", "gguf")}
    key = {"format": _FORMAT, "sha256": sha256, "template": template, **made_by}
    directory = folder / "gguf" / f"{file.stem[:60]}-{fingerprint(key)[:16]}"
    if not (directory / RECORD).is_file():
        if made_by["gguf"] is None or find_spec("accelerate") is None:
            raise EnvironmentProblem(
                f"the packages gguf and accelerate, to read {file}",
                "one of them missing",
                "Install them in the folder of Holdfast: `pip install '.[gguf]'`.",
            )
        with claim(directory.with_name(f"{directory.name}.lock"), wait=True):
            if not (directory / RECORD).is_file():
                _expand(file, directory, check, template, key | {"file": file.name})
    return directory


def origin(directory: Path) -> str:
    """Return the hash of the GGUF file that a directory is of; empty if of none."""
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        return str(record["sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _expand(
    file: Path,
    directory: Path,
    check: Callable[[Mapping[str, Any], str], object],
    template: str | None,
    record: Mapping[str, Any],
) -> None:
    # What a killed conversion has left is nobody's: the claim on it is ours.
    for left in directory.parent.glob(f".{directory.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    header = _read_header(file)
    config = _config(file, header)
    check(config.to_dict(), str(file))
    _tell(file, header, directory)
    with ExitStack() as stack:
        stack.enter_context(quietly())
        stack.enter_context(
            library_errors(
                ModelError,
                f"a GGUF file that transformers can expand, {file}",
                "Download it again; if it is whole, give the model's safetensors.",
            )
        )
        model = _model(file, header, config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True
        )
        if template is not None:
            tokenizer.chat_template = template
        staged = stack.enter_context(staging(directory))
        with writing(directory):
            model.save_pretrained(staged, max_shard_size="5GB")
            tokenizer.save_pretrained(staged)
        _clean(staged / "config.json")
        _drop_tokens(staged, int(header.metadata["tokenizer.ggml.tokens"]))
        atomic_write_json(staged / RECORD, dict(record))


def _read_header(file: Path) -> _Header:
    from gguf import GGUFReader
    from transformers.integrations.gguf.reader import read_gguf_metadata

    with library_errors(
        InputError,
        f"a GGUF file in {file}",
        "Download it again; several parts are joined with `llama-gguf-split --merge`.",
    ):
        metadata, _ = read_gguf_metadata(str(file))
        if int(metadata.get("split.count") or 0) > 1:
            raise ValueError("one part of several")
        found = GGUFReader(file).tensors
        if file.stat().st_size < max(each.data_offset + each.n_bytes for each in found):
            raise ValueError("a file that was cut short")
        sizes = {each.name: int(each.n_elements) for each in found}
        frequencies = next(
            (torch.tensor(each.data) for each in found if each.name == _FREQUENCIES),
            None,
        )
    return _Header(metadata, sizes, frequencies)


def _config(file: Path, header: _Header) -> Any:
    """Return the configuration that a file describes, its rotary embedding put right.

    Raises:
        UnsupportedFamilyError: If transformers does not know its architecture, or has
            no place for something that it says.
    """
    try:
        with quietly():
            config = transformers.AutoConfig.from_pretrained(
                file.parent, gguf_file=file.name, local_files_only=True
            )
    except (ValueError, KeyError, NotImplementedError) as error:
        said = " ".join(str(error).split())[:200]
        raise _unreadable(file, f"`{header.architecture}` ({said})") from error
    rotary = getattr(config, "rope_parameters", None)
    if isinstance(rotary, dict):
        # Where layers differ, only those with full attention are stretched.
        _stretch(file, header, rotary.get("full_attention", rotary))
    config.dtype = torch.bfloat16
    return config


def _unreadable(file: Path, found: str) -> UnsupportedFamilyError:
    return UnsupportedFamilyError(
        "a GGUF file that transformers can expand without loss",
        f"{found} in {file}",
        "Give the safetensors that it was made from. Answers that llama.cpp wrote with "
        "this file can be imported beside them (`holdfast rollout SAFETENSORS "
        "--import FILE`).",
    )


def _stretch(file: Path, header: _Header, rotary: dict[str, Any]) -> None:
    """Say how rotary frequencies are stretched, which transformers does not read.

    Llama 3.1 and later hold divisors of theirs, which follow from one factor; others
    name a method. A model that is read without them differs at every position.
    """
    prefix = f"{header.architecture}.rope."
    said = {
        key.removeprefix(prefix): value
        for key, value in header.metadata.items()
        if key.startswith(prefix)
    }
    scaling = {
        key.removeprefix("scaling."): value
        for key, value in said.items()
        if key.startswith("scaling.") and value not in (None, 0, 0.0)
    }
    kind = scaling.get("type", "none")
    if any(name.startswith("rope_factors") for name in header.sizes):
        raise _unreadable(file, "rotary factors for short and long texts")
    if header.frequencies is not None:
        rotary.update(_llama3(file, header.frequencies, float(rotary["rope_theta"])))
    elif kind in _SCALED and set(scaling) <= _SCALED[kind] | _IGNORED:
        rotary.update(rope_type=kind, factor=float(scaling["factor"]))
        if kind == "yarn":
            length = int(scaling["original_context_length"])
            rotary["original_max_position_embeddings"] = length
    elif kind != "none" or "scale_linear" in said:
        raise _unreadable(file, f"rotary scaling by {kind}, {sorted(scaling)}")


def _llama3(file: Path, divisors: Tensor, base: float) -> dict[str, Any]:
    """Return the settings from which the divisors of Llama 3 follow, if they do."""
    factor = float(divisors.max())
    if factor == 1:
        return {}
    settings = {
        "rope_type": "llama3",
        "factor": factor,
        "original_max_position_embeddings": _LLAMA3_LENGTH,
        **_LLAMA3,
    }
    width = 2 * len(divisors)
    plain = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    # Part of a turn that each has made over the first length: few turns, stretched.
    turns = _LLAMA3_LENGTH * plain / (2 * math.pi)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - share) / factor + share)
    if not torch.allclose(divisors.double(), expected, rtol=1e-4):
        raise _unreadable(file, "rotary divisors that are not those of Llama 3")
    return settings


def _model(file: Path, header: _Header, config: Any) -> Any:
    """Read and expand a file; every weight of it has a place, and every place one."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        config=config,
        # Else the model counts as quantised, and can be neither saved nor trained.
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
        local_files_only=True,
    )
    # The next tokens but one are foretold by blocks that the model leaves out.
    first = int(header.metadata.get(f"{header.architecture}.block_count", 0))
    first -= int(
        header.metadata.get(f"{header.architecture}.nextn_predict_layers") or 0
    )
    held = sum(
        size
        for name, size in header.sizes.items()
        if name != _FREQUENCIES and _block(name) < first
    )
    weights = {each.data_ptr(): each.numel() for each in model.state_dict().values()}
    lost = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if lost or held != sum(weights.values()):
        raise ModelError(
            f"one place in the model for each weight of {file}",
            f"{held:,} weights for {sum(weights.values()):,} places"
            + (f", among them {sorted(map(str, lost))[:3]}" if lost else ""),
            "Give the safetensors that it was made from.",
        )
    _tie(model)
    ends = [header.metadata.get(f"tokenizer.ggml.{end}_token_id") for end in _ENDS]
    settings = model.generation_config
    known = settings.eos_token_id
    stops = known if isinstance(known, list) else [] if known is None else [known]
    stops += [end for end in ends if end is not None and end not in stops]
    settings.eos_token_id = stops or None
    settings._from_model_config = False
    return model


def _block(name: str) -> int:
    """Return the block of a tensor; -1 for one outside of all."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" else -1


def _tie(model: Any) -> None:
    """Let head and embedding be one again where the file holds them twice."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight and torch.equal(
        head.weight, embedding.weight
    ):
        model.config.tie_word_embeddings = True
        model.tie_weights()


def _clean(path: Path) -> None:
    """Take out of a configuration what names neither model nor settings."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("_model_name_or_path", "_name_or_path", "transformers_version"):
        config.pop(key, None)
    # Accelerators take this arithmetic: the weights have no more digits than it has.
    atomic_write_json(path, config | {"dtype": "bfloat16"})


def _drop_tokens(directory: Path, n_tokens: int) -> None:
    """Take out tokens that the reader has added: a default of GPT-2 that none knows."""
    paths = [directory / f"tokenizer{end}.json" for end in ("", "_config")]
    whole, settings = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    known = [each for each in whole["added_tokens"] if each["id"] < n_tokens]
    added = {each["content"] for each in whole["added_tokens"] if each not in known}
    if not added:
        return
    atomic_write_json(paths[0], whole | {"added_tokens": known})
    named = {key: said for key, said in settings.items() if str(said) not in added}
    atomic_write_json(paths[1], named)


def _tell(file: Path, header: _Header, directory: Path) -> None:
    """Say what is done once, and for how long; refuse it where there is no room."""
    size = 4 * sum(header.sizes.values())
    place = next(each for each in directory.parents if each.exists())
    free = shutil.disk_usage(place).free
    if free < size:
        raise StorageError(
            f"{size / 1e9:.1f} GB for the expanded copy of {file} in {place}",
            f"{free / 1e9:.1f} GB",
            f"Free some space, or set {PLACE} to a folder that has some.",
        )
    minutes = (_START + file.stat().st_size / _RATE) / 60
    about = f"{minutes:.0f} min" if minutes >= 1.5 else f"{60 * minutes:.0f} s"
    log.warning(
        "Expanding %s to %.1f GB of safetensors in %s, once: about %s.",
        *(file.name, size / 1e9, directory.parent, about),
    )
    splits = header.metadata.get("tokenizer.ggml.pre")
    if header.metadata.get("tokenizer.chat_template") is None:
        log.warning(
            "%s has no chat template: it may be a base model. One in %s beside the "
            "file is taken.",
            *(file.name, TEMPLATE),
        )
    from transformers.integrations.gguf import gguf_tokenizer_mapping as known

    unknown = splits not in {None, "default", "gpt-2", *known.GGUF_PRE_TOKENIZER_SPLITS}
    if unknown and header.metadata.get("tokenizer.ggml.model") == "gpt2":
        log.warning(
            "transformers does not know how `%s` splits text into words, and splits it "
            "as GPT-2 does: compare token ids with those of the original tokenizer.",
            splits,
        )
