"""Numbers only: weights that are none are refused, and logits that are none stop."""

from typing import Any

import torch
from torch import Tensor

from holdfast.errors import ModelError
from holdfast.models.containers.quantised import all_tensors

PIECE = 2**22
"""Numbers that are added up at a time."""


def check_numbers(model: Any, model_id: str) -> None:
    """Look through all weights once, and refuse those that are no numbers.

    A token whose row of the embedding is damaged, or an expert that is seldom asked,
    would show itself in some prompts alone.

    Raises:
        ModelError: Names the first such weight, and the row.
    """
    for name, weight in all_tensors(model):
        # What lies on no device is fetched while the model runs; logits show the rest.
        if not weight.is_floating_point() or weight.is_meta:
            continue
        # A sum of numbers is one, and in this arithmetic none is too large.
        wide = torch.float32 if weight.device.type == "mps" else torch.float64
        # Piece by piece, since on a CPU a sum copies what it widens.
        parts = torch.split(weight.detach().reshape(-1), PIECE)
        # One byte holds no number that is added up.
        narrow = weight.element_size() == 1
        sums = [(p.float() if narrow else p).sum(dtype=wide) for p in parts]
        if not sums or bool(torch.isfinite(torch.stack(sums).sum())):
            continue
        weight = weight.float() if narrow else weight
        odd = torch.argwhere(~torch.isfinite(weight.detach()))
        if len(odd):
            first = ", ".join(str(place) for place in odd[0].tolist())
            dtype = str(weight.dtype).removeprefix("torch.")
            raise ModelError(
                f"weights of {model_id} that are finite in {dtype}",
                f"{len(odd)} that are not in `{name}`, the first at [{first}]",
                "Download or train it again; where the file is whole, its numbers are "
                "too large for this --dtype.",
            )


def check_finite(values: Tensor, where: str) -> None:
    """Refuse what a model computed if some of it is not finite.

    Raises:
        ModelError: If one is no number, or infinite.
    """
    if not bool(torch.isfinite(values).all()):
        raise not_finite(where)


def not_finite(where: str) -> ModelError:
    """Return the error for states or logits that are no numbers, or infinite."""
    return ModelError(
        "states and logits that are finite",
        f"nan or inf in {where}",
        "Nothing is read from them. Use float32 or bfloat16 (--dtype), or smaller "
        "factors where heads are scaled; else the weights are damaged.",
    )
