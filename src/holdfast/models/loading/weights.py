"""Read tokenizer and weights of a checkpoint, and its identity."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from holdfast.data.chat.rendering import template_sha256
from holdfast.errors import InputError, ModelError
from holdfast.models.containers import gguf
from holdfast.models.containers.kept import kept
from holdfast.models.containers.placement import device_map, tell_places
from holdfast.models.containers.quantised import all_tensors, is_packed, settle
from holdfast.models.containers.vocabulary import SENTENCES, TEKKEN, others
from holdfast.models.library import library_errors, quietly
from holdfast.models.loading.checkpoint import Checkpoint
from holdfast.models.loading.files import (
    ADAPTER_CONFIG,
    CONFIG,
    GENERATION_CONFIG,
    read_config,
    read_header,
    shapes_of,
    weight_files,
)
from holdfast.models.model import ModelIdentity
from holdfast.study.files import file_sha256

TOKENIZER_FILES = ("tokenizer.json", SENTENCES, "vocab.json", "spiece.model")
WITHOUT_PROMPTS = (
    "States and heads of given tokens can be read without it, in Python: "
    "`holdfast.load(MODEL, needs_template=False)`."
)
"""What is left of a model whose prompts cannot be rendered."""
# Buffers that old checkpoints carry and every model computes for itself.
HARMLESS = "rotary_emb.inv_freq"
OTHER_SIZE = 16
"""How many times the weights of the files are those of another model."""
PACKED = 16
"""How many weights one number of a packed file may hold."""
_LAYER = re.compile(r"\.(\d+)\.")


class MissingTokenizerError(InputError):
    """A model has no tokenizer that is read."""


def read_tokenizer(checkpoint: Checkpoint, *, native_class: str | None = None) -> Any:
    """Read the tokenizer; that of an adapter goes before that of its base.

    What the directory's own files say counts, whatever else is installed: a package
    that would read another file in their place is not asked.

    `native_class`: Class of transformers that reads this family's vocabulary, in place
    of code that travels with it.

    Raises:
        InputError: If there is none, or it needs code that travels with it, or the
            settings of the model cannot be read.
        ModelError: If it cannot be read.
    """
    # The reader of tokenizers reads the model's settings too, and blames itself.
    _check_settings(checkpoint)
    directory = tokenizer_file(checkpoint).parent
    kind = _tokenizer_class(directory, checkpoint, native_class)
    # Auto classes ask on the terminal whether to run code if they are not told.
    answers = (
        {"trust_remote_code": False, "mistral_format": False}
        if kind is transformers.AutoTokenizer
        else {}
    )
    with library_errors(
        ModelError,
        f"a tokenizer that can be read in {directory}",
        "Restore the tokenizer's files.",
    ):
        tokenizer = kind.from_pretrained(directory, local_files_only=True, **answers)
        # Settings of a wrong kind are kept as they are, and fail on the first text.
        tokenizer.decode(tokenizer("A word.", verbose=False)["input_ids"])
    _check_second(directory, tokenizer)
    return tokenizer


def _check_second(directory: Path, tokenizer: Any) -> None:
    """Refuse a second vocabulary that gives tokens other numbers than the one read."""
    if not (directory / "tokenizer.json").is_file():
        return
    known, listed = tokenizer.get_vocab(), directory / "vocab.json"
    found = read_config(listed).items() if listed.is_file() else ()
    differ = {
        listed.name: [token for token, number in found if known.get(token) != number],
        **{name: others(directory / name, known) for name in (TEKKEN, SENTENCES)},
    }
    for name, other in differ.items():
        if other:
            raise InputError(
                f"one tokenizer in {directory}",
                f"tokenizer.json and, beside it, a {name} of another: {len(other)} "
                f"tokens have other numbers, such as {other[0]!r}",
                "Remove the files of the one that is not the model's.",
            )


def tokenizer_file(checkpoint: Checkpoint) -> Path:
    """Return the file of the vocabulary; an adapter's goes before its base's.

    Raises:
        InputError: If there is none.
    """
    folders = [path for path in (checkpoint.adapter, checkpoint.directory) if path]
    for path in (folder / name for folder in folders for name in TOKENIZER_FILES):
        if path.is_file():
            if path.name != "tokenizer.json" and path.with_name(TEKKEN).is_file():
                # Which of them is read hangs on the order of names in the folder.
                raise InputError(
                    f"one tokenizer in {path.parent}",
                    f"{path.name} and {TEKKEN}, and no tokenizer.json",
                    "Add the tokenizer.json that was published for transformers, or "
                    "remove the file that is not the model's.",
                )
            return path
    tekken = any((folder / TEKKEN).is_file() for folder in folders)
    wanted = (
        "Add the tokenizer.json, tokenizer_config.json and chat template that were "
        "published for transformers."
        if tekken
        else "Save the tokenizer next to the model."
    )
    raise MissingTokenizerError(
        f"a tokenizer with {checkpoint.model_id}",
        f"{TEKKEN} alone" if tekken else f"none of {', '.join(TOKENIZER_FILES)}",
        f"{wanted} {WITHOUT_PROMPTS}",
    )


def _tokenizer_class(
    directory: Path, checkpoint: Checkpoint, native_class: str | None
) -> Any:
    config = directory / "tokenizer_config.json"
    travels = config.is_file() and read_config(config).get("auto_map")
    if not travels and not checkpoint.config.get("auto_map"):
        return transformers.AutoTokenizer
    if (directory / "tokenizer.json").is_file():
        return transformers.PreTrainedTokenizerFast
    if native_class is not None:
        return getattr(transformers, native_class)
    if not travels:
        return transformers.AutoTokenizer
    raise InputError(
        f"a tokenizer without code of its own in {directory}",
        "one whose code travels with it, and such code is never run",
        "Add the tokenizer.json of the same tokenizer.",
    )


def read_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """Read the weights of a checkpoint, of the base alone if it is an adapter.

    `settings`: Further arguments of `from_pretrained`, such as a configuration in place
    of that of the directory.

    Raises:
        ModelError: If a file is damaged or weights do not fit the configuration.
        EnvironmentProblem: If memory runs out.
    """
    # Names files that are cut short, which the loaders below would not.
    _ = checkpoint.weight_files
    kind = getattr(transformers, checkpoint.family.causal_class)
    with (
        library_errors(
            ModelError,
            f"weights of {checkpoint.model_id} that can be loaded as its {CONFIG} says",
            "Restore the checkpoint's files.",
        ),
        quietly(),
    ):
        _check_sizes(checkpoint, kind, settings or {})
        packed = checkpoint.quantised is not None
        places = device_map(device, packed=packed)
        model, info = kind.from_pretrained(
            checkpoint.directory,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            **places,
            **(settings or {}),
        )
        _check_complete(checkpoint, info)
        tell_places(model)
        if packed:
            return settle(model, dtype)
        return model if places else model.to(device)


def _check_settings(checkpoint: Checkpoint) -> None:
    """Refuse settings that transformers cannot read, before it meets them itself.

    It falls back in silence on settings of its own where `generation_config.json` is
    damaged, and the tokens that end an answer are lost.
    """
    directory = checkpoint.directory
    kind = getattr(transformers, checkpoint.family.causal_class).config_class
    # The settings of some families are translated first, and read then.
    if kind.model_type == checkpoint.config.get("model_type"):
        with reading(directory / CONFIG):
            kind.from_pretrained(directory, local_files_only=True)
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        return
    settings = read_config(path)
    _check_sampling(path, settings)
    stops = settings.get("eos_token_id")
    tokens = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if any(type(token) is not int for token in tokens):
        raise InputError(
            f"token ids in `eos_token_id` of {path}", str(stops)[:80], "Restore it."
        )
    with reading(path):
        transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)


def _check_sampling(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a temperature or nucleus of a model's own that none can be drawn with."""
    for name, least, most in (("temperature", 0.0, math.inf), ("top_p", 1e-9, 1.0)):
        value = settings.get(name)
        usable = value is None or (
            type(value) in (int, float) and math.isfinite(value) and value >= least
        )
        if not usable or (value is not None and value > most):
            raise InputError(
                f"a number that can be drawn with in `{name}` of {path}",
                str(value)[:80],
                "Restore it.",
            )


def reading(path: Path) -> AbstractContextManager[None]:
    """Turn what transformers says about a file of settings into one line about it.

    Raises:
        InputError: If it cannot be read.
    """
    expected = f"settings that transformers can read in {path}"
    return library_errors(InputError, expected, "Restore that file.")


def _check_sizes(
    checkpoint: Checkpoint, kind: Any, settings: Mapping[str, Any]
) -> None:
    """Refuse settings of another size of model before any of it is made.

    What the files lack would be made first, however much that is, and missed then.
    """
    config = settings.get("config") or kind.config_class.from_pretrained(
        checkpoint.directory, local_files_only=True
    )
    shapes = shapes_of(weight_files(checkpoint.directory, "model"))
    numbers = [found[1] for found in map(_LAYER.search, shapes) if found]
    held = max(map(int, numbers), default=-1) + 1
    text = config.get_text_config()
    # Where layers run several times, each run is counted as a layer.
    wanted = getattr(text, "num_layers_per_stack", None) or text.num_hidden_layers
    if wanted > held:
        raise _other_size(checkpoint, f"{wanted} layers", f"{held}")
    with torch.device("meta"):
        n_wanted = sum(weight.numel() for weight in kind(config).parameters())
    n_held = sum(map(math.prod, shapes.values()))
    # Ties, buffers and names that are translated do not make up an order of size.
    if n_wanted > (PACKED if checkpoint.quantised else 1) * OTHER_SIZE * n_held:
        raise _other_size(checkpoint, f"{n_wanted:,} weights", f"{n_held:,}")


def _other_size(checkpoint: Checkpoint, wanted: str, held: str) -> ModelError:
    return ModelError(
        f"{wanted} of {checkpoint.model_id}, as its {CONFIG} says",
        f"{held} in its files",
        f"Restore the checkpoint, or its {CONFIG}.",
    )


def _check_complete(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    for kind in ("mismatched_keys", "missing_keys", "unexpected_keys"):
        keys = sorted(_with_shapes(key) for key in info.get(kind) or ())
        keys = [key for key in keys if not key.endswith(HARMLESS)]
        if keys:
            raise ModelError(
                f"weights that fit the configuration of {checkpoint.model_id}",
                f"{len(keys)} {kind.replace('_', ' ')}: {first_three(keys)}",
                "Weights would be left at random or left out: restore the "
                f"checkpoint, or its {CONFIG}.",
            )


def first_three(names: list[str]) -> str:
    """Return names for a message, no more than three of them."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _with_shapes(key: Any) -> str:
    """Return the name of a weight, with both shapes where they differ."""
    if isinstance(key, tuple):
        name, stored, wanted = key
        return f"{name} {list(stored)} where {CONFIG} wants {list(wanted)}"
    return str(key)


SMALL_TENSOR = 1 << 20
"""Bytes up to which a tensor is hashed with its neighbours, not by itself."""


def fingerprint_files(checkpoint: Checkpoint) -> str:
    """Return a fingerprint of a checkpoint's configuration and weights.

    Every byte of the weights counts: one changed row in the middle of an embedding is
    another model. Tensors over 1 MiB enter by their own SHA-256, which are taken side
    by side, at about the speed at which the file is read. Files that have not changed
    since are not read again (see `kept`).
    """
    configs = [(checkpoint.directory / CONFIG).read_bytes()]
    if checkpoint.adapter is not None:
        configs.append((checkpoint.adapter / ADAPTER_CONFIG).read_bytes())
    files = checkpoint.weight_files

    def compute() -> str:
        digest = hashlib.sha256(b"".join(configs))
        for file in files:
            for part in _file_parts(file):
                digest.update(part)
        return digest.hexdigest()

    key = {"configs": [hashlib.sha256(each).hexdigest() for each in configs]}
    return kept("weights", key, compute, read=str, files=files)


def fingerprint_model(model: torch.nn.Module, config: dict[str, Any]) -> str:
    """Return a fingerprint of a model in memory, of every byte as well.

    It differs from that of the same model's files.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    packed = is_packed(model)
    for name, tensor in all_tensors(model) if packed else model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_tensor_part(tensor))
    return digest.hexdigest()


def identify(
    checkpoint: Checkpoint, tokenizer: Any, dtype: torch.dtype
) -> ModelIdentity:
    """Return what a study records about a checkpoint."""
    templated = getattr(tokenizer, "chat_template", None)
    known: dict[str, str] = {}
    if tokenizer is not None:
        vocabulary = tokenizer_file(checkpoint)
        known = {
            "tokenizer_class": type(tokenizer).__name__,
            "tokenizer_source": vocabulary.name,
            "tokenizer_sha256": file_sha256(vocabulary),
        }
    return ModelIdentity(
        model_id=checkpoint.model_id,
        revision=checkpoint.revision,
        template_sha256=template_sha256(tokenizer) if templated else "",
        weights_sha256=fingerprint_files(checkpoint),
        dtype=str(dtype).removeprefix("torch."),
        model_type=str(checkpoint.config["model_type"]),
        gguf_sha256=gguf.origin(checkpoint.directory),
        **known,
    )


def identify_in_memory(model: Any, tokenizer: Any, model_id: str) -> ModelIdentity:
    """Return what a study records about a model in memory."""
    config = model.config.to_dict()
    return ModelIdentity(
        model_id=model_id,
        revision=None,
        template_sha256="" if tokenizer is None else template_sha256(tokenizer),
        weights_sha256=fingerprint_model(model, config),
        dtype=str(model.dtype).removeprefix("torch."),
        model_type=str(config["model_type"]),
        tokenizer_class="" if tokenizer is None else type(tokenizer).__name__,
    )


def _file_parts(file: Path) -> Iterator[bytes]:
    header, begin = read_header(file)
    yield json.dumps(header, sort_keys=True).encode()
    offsets = {
        name: [begin + offset for offset in entry["data_offsets"]]
        for name, entry in sorted(header.items())
        if name != "__metadata__"
    }
    # Hashing leaves the interpreter's lock, so that large tensors go side by side.
    with ThreadPoolExecutor(os.cpu_count()) as pool, file.open("rb") as stream:
        digests = {
            name: pool.submit(_digest_of_range, file, start, end)
            for name, (start, end) in offsets.items()
            if end - start > SMALL_TENSOR
        }
        for name, (start, end) in offsets.items():
            if name in digests:
                yield digests[name].result()
            else:
                stream.seek(start)
                yield stream.read(end - start)


def _digest_of_range(file: Path, start: int, end: int) -> bytes:
    """Return the SHA-256 of a part of a file, read piece by piece."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        stream.seek(start)
        for offset in range(start, end, SMALL_TENSOR):
            digest.update(stream.read(min(SMALL_TENSOR, end - offset)))
    return digest.digest()


def _tensor_part(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1).to("cpu").contiguous()
    content = flat.view(torch.uint8).numpy().data
    if content.nbytes <= SMALL_TENSOR:
        return bytes(content)
    return hashlib.sha256(content).digest()
