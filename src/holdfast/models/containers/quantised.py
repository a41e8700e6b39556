"""Quantised checkpoints: by which method, what reads them, and what may be saved."""

import logging
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from holdfast.errors import EnvironmentProblem, InputError, ModelError

_NEEDS: Mapping[str, tuple[str, ...]] = {
    "bitsandbytes": ("accelerate", "bitsandbytes"),
    "compressed-tensors": ("accelerate", "compressed_tensors"),
    "torchao": ("accelerate", "torchao"),
    "fp8": ("accelerate",),
    "mxfp8": ("accelerate",),
    "mxfp4": ("accelerate",),
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
}
"""Modules that transformers needs beside itself, by method."""
PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def method_of(config: Mapping[str, Any], source: str) -> str | None:
    """Return by which method the weights of a configuration are packed; None if none.

    Raises:
        InputError: If it says that they are, and not how.
        EnvironmentProblem: If a package is missing that reads them.
    """
    said = config.get("quantization_config")
    if not said:
        return None
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    if method is None and isinstance(said, Mapping):
        # Old files of bitsandbytes name no method.
        loaded = said.get("load_in_4bit") or said.get("load_in_8bit")
        method = "bitsandbytes" if loaded else None
    if not isinstance(method, str):
        raise InputError(
            f"a `quant_method` in the `quantization_config` of {source}",
            str(said)[:80],
            "Restore its config.json.",
        )
    missing = [name for name in _NEEDS.get(method, ()) if find_spec(name) is None]
    if missing:
        names = " ".join(missing).replace("_", "-")
        raise EnvironmentProblem(
            f"what reads weights packed by {method}, as those of {source} are",
            f"no {' and no '.join(missing)}",
            f"Install it with `pip install {names}`, or use the unquantised model.",
        )
    return method


def settle(model: Any, dtype: torch.dtype) -> Any:
    """Bring a model that was just read into the form that it will keep.

    Some methods expand weights at the first pass, and some leave weights that were
    never packed in their own arithmetic beside expanded ones of another.
    """
    # It tells at every layer of every pass that it rounds the inputs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        if not is_packed(model):
            model.to(dtype)
        model(torch.zeros((1, 1), dtype=torch.long, device=embedding.device))
    return model


def is_packed(model: Any) -> bool:
    """Return whether some weights of a model are not the numbers it multiplies with."""
    return any(
        type(weight.data) is not Tensor or weight.dtype not in PLAIN
        for weight in model.parameters()
    )


def require_savable(model: Any, method: str | None, *, adapted: bool = False) -> None:
    """Refuse to write a whole model whose copy would be another model.

    A checkpoint in blocks of fp8 that was expanded on loading is packed again when it
    is saved, the embedding too, and its configuration does not say so: whoever reads
    the copy takes packed numbers for weights. Packed weights cannot be trained or
    edited in the first place.

    `method`: How the checkpoint is quantised that the model was read from; None if it
        is not.
    `adapted`: Whether it has an adapter merged into it, which nothing can be laid over.

    Raises:
        ModelError: If it is, or some weight in memory is packed.
    """
    if method is None and not is_packed(model):
        return
    raise ModelError(
        "a model whose weights are plain numbers, to write a whole one",
        f"one quantised by {method or 'another library'}",
        "What is trained over another adapter is written whole: train over the base "
        "alone, or merge that adapter into the unquantised base first."
        if adapted
        else "Write an adapter over it, which leaves them as they are, or begin with "
        "the unquantised model.",
    )


def all_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name, packed ones as what they are made of.

    `state_dict()` is no way to them: on a CPU, bitsandbytes turns weights of 4 bits
    back for it once they have been used, and computes with wrong ones from then on.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        yield from _inner(name, tensor.detach())


def _inner(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _inner(f"{name}.{part}", getattr(tensor, part))
