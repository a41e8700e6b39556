"""Read tokenizer and weights of a checkpoint, and miss nothing on the way."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from holdfast.errors import EnvironmentProblem, InputError, ModelError
from holdfast.models.batching import is_out_of_memory
from holdfast.models.checkpoints import Checkpoint
from holdfast.models.files import read_config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
TEKKEN = "tekken.json"
# Buffers that old checkpoints carry and every model computes for itself.
HARMLESS = "rotary_emb.inv_freq"


def read_tokenizer(checkpoint: Checkpoint, *, native_class: str | None = None) -> Any:
    """Read the tokenizer; that of an adapter goes before that of its base.

    What the directory's own files say counts, whatever else is installed: a package
    that would read another file in their place is not asked.

    Args:
        checkpoint: The model.
        native_class: Class of transformers that reads this family's vocabulary, in
            place of code that travels with it.

    Returns:
        The tokenizer.

    Raises:
        InputError: If there is none, or it needs code that travels with it.
        ModelError: If it cannot be read.
    """
    directory = tokenizer_file(checkpoint).parent
    kind = _tokenizer_class(directory, checkpoint, native_class)
    # Auto classes ask on the terminal whether to run code if they are not told.
    told = (
        {"trust_remote_code": False, "mistral_format": False}
        if kind is transformers.AutoTokenizer
        else {}
    )
    try:
        return kind.from_pretrained(directory, local_files_only=True, **told)
    except Exception as error:  # Of a damaged file its parsers raise what they like.
        raise ModelError(
            f"a tokenizer that can be read in {directory}",
            _first_line(error),
            "Restore the tokenizer's files.",
        ) from error


def tokenizer_file(checkpoint: Checkpoint) -> Path:
    """Return the file of the vocabulary; an adapter's goes before its base's.

    Raises:
        InputError: If there is none.
    """
    places = [each for each in (checkpoint.adapter, checkpoint.directory) if each]
    for place in places:
        for name in TOKENIZER_FILES:
            if (place / name).is_file():
                return place / name
    tekken = any((place / TEKKEN).is_file() for place in places)
    raise InputError(
        f"a tokenizer with {checkpoint.model_id}",
        f"{TEKKEN} alone" if tekken else f"none of {', '.join(TOKENIZER_FILES)}",
        "Add the tokenizer.json, tokenizer_config.json and chat template that were "
        "published for transformers."
        if tekken
        else "Save the tokenizer next to the model.",
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
    attention: str = "sdpa",
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """Read the weights of a checkpoint, and merge its adapter if it has one.

    Args:
        checkpoint: The model.
        dtype: Arithmetic to load in.
        device: Where the model goes.
        attention: Which implementation of the attention it runs.
        settings: Further arguments of `from_pretrained`, such as a configuration in
            place of that of the directory.

    Returns:
        The language model.

    Raises:
        ModelError: If a file is damaged or weights do not fit the configuration.
        EnvironmentProblem: If memory runs out.
    """
    # Names files that are cut short, which the loaders below would not.
    _ = checkpoint.weight_files
    kind = getattr(transformers, checkpoint.family.causal_class)
    with _load_errors(checkpoint), quietly():
        model, info = kind.from_pretrained(
            checkpoint.directory,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            **(settings or {}),
        )
        _check_complete(checkpoint, info)
        if checkpoint.adapter is not None:
            model = _merged(checkpoint, model)
        return model.to(device)


def _merged(checkpoint: Checkpoint, model: Any) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(model, checkpoint.adapter)
    missing = [
        str(w.message) for w in caught if "missing adapter keys" in str(w.message)
    ]
    if missing:
        raise _incomplete(checkpoint, missing[0])
    return adapted.merge_and_unload()


def _check_complete(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(kind) or ())
        keys = [key for key in keys if not key.endswith(HARMLESS)]
        if keys:
            shown = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
            found = f"{len(keys)} {kind.replace('_', ' ')}: {shown}"
            raise _incomplete(checkpoint, found)


def _incomplete(checkpoint: Checkpoint, found: str) -> ModelError:
    return ModelError(
        f"weights that fit the configuration of {checkpoint.model_id}",
        found,
        "Weights would be left at random or left out: restore the checkpoint, or "
        "its config.json.",
    )


@contextmanager
def _load_errors(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise EnvironmentProblem(
                f"memory for {checkpoint.model_id}",
                "that memory ran out",
                "Use a 16-bit --dtype, a smaller model or a larger machine.",
            ) from error
        raise ModelError(
            f"weights of {checkpoint.model_id} that can be loaded",
            _first_line(error),
            "Restore the checkpoint's files.",
        ) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Keep the progress bars of transformers off the terminal."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    said = str(error).strip().splitlines() or ["no word of it"]
    return f"{type(error).__name__}: {said[0][:300]}"
