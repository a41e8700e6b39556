"""Fingerprints of weights: of exactly what is loaded, on every load."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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

SMALL_TENSOR = 1 << 20
"""Bytes up to which a tensor is hashed with its neighbours, not by itself."""


def fingerprint_files(checkpoint: Checkpoint) -> str:
    """Return a fingerprint of a checkpoint's configuration and weights.

    Every byte of the weights counts: one changed row in the middle of an embedding is
    another model. Tensors over 1 MiB enter by their own SHA-256, which are taken side
    by side, at about the speed at which the file is read.

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
    """Return a fingerprint of a model in memory, of every byte as well.

    Args:
        model: The model.
        config: Its configuration.

    Returns:
        SHA-256 in hexadecimal. It differs from that of the same model's files.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_tensor_part(tensor))
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
