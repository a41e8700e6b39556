"""Fingerprints of weights, cheap enough to take on every load."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.data.rendering import template_sha256
from holdfast.models.checkpoints import Checkpoint
from holdfast.models.files import ADAPTER_CONFIG, CONFIG, read_header
from holdfast.models.loading import tokenizer_file
from holdfast.models.parts import ModelIdentity
from holdfast.study.files import file_sha256

WHOLE_TENSOR = 1 << 20
SAMPLE = 1 << 16


def fingerprint_files(checkpoint: Checkpoint) -> str:
    """Return a fingerprint of a checkpoint's configuration and weights.

    Tensors up to 1 MiB count whole; of larger ones the first and last 64 KiB, so
    that a model of any size takes moments. Every row of a weight has columns of all
    heads, so an edit of a head shows in the first rows.

    Args:
        checkpoint: The model, and its adapter if it has one.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    configs = [checkpoint.directory / CONFIG]
    if checkpoint.adapter is not None:
        configs.append(checkpoint.adapter / ADAPTER_CONFIG)
    for config in configs:
        digest.update(config.read_bytes())
    for file in checkpoint.weight_files:
        for part in _file_parts(file):
            digest.update(part)
    return digest.hexdigest()


def fingerprint_model(model: torch.nn.Module, config: dict[str, Any]) -> str:
    """Return a fingerprint of a model in memory, by the same rule of sampling.

    Args:
        model: The model.
        config: Its configuration.

    Returns:
        SHA-256 in hexadecimal. It differs from that of the same model's files.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in _tensor_parts(tensor):
            digest.update(part)
    return digest.hexdigest()


def identify(
    checkpoint: Checkpoint, tokenizer: Any, dtype: torch.dtype
) -> ModelIdentity:
    """Return what a study records about a checkpoint.

    Args:
        checkpoint: The model.
        tokenizer: Its tokenizer.
        dtype: Arithmetic that it runs in.
    """
    templated = getattr(tokenizer, "chat_template", None)
    vocabulary = tokenizer_file(checkpoint)
    return ModelIdentity(
        model_id=checkpoint.model_id,
        revision=checkpoint.revision,
        template_sha256=template_sha256(tokenizer) if templated else "",
        weights_sha256=fingerprint_files(checkpoint),
        dtype=str(dtype).removeprefix("torch."),
        model_type=str(checkpoint.config["model_type"]),
        tokenizer_class=type(tokenizer).__name__,
        tokenizer_source=vocabulary.name,
        tokenizer_sha256=file_sha256(vocabulary),
    )


def identify_in_memory(model: Any, tokenizer: Any, model_id: str) -> ModelIdentity:
    """Return what a study records about a model in memory.

    Args:
        model: The model.
        tokenizer: Its tokenizer, or None.
        model_id: What records call it.
    """
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
    with file.open("rb") as stream:
        for name in sorted(header):
            if name == "__metadata__":
                continue
            start, end = header[name]["data_offsets"]
            for low, high in _samples(end - start):
                stream.seek(begin + start + low)
                yield stream.read(high - low)


def _samples(size: int) -> tuple[tuple[int, int], ...]:
    if size <= WHOLE_TENSOR:
        return ((0, size),)
    return ((0, SAMPLE), (size - SAMPLE, size))


def _tensor_parts(tensor: Tensor) -> Iterator[bytes]:
    flat = tensor.detach().reshape(-1)
    width = flat.element_size()
    for low, high in _samples(flat.numel() * width):
        part = flat[low // width : high // width].to("cpu").contiguous()
        yield part.view(torch.uint8).numpy().tobytes()
