"""The signal of every row as a file of the study, and back."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from holdfast.errors import InputError
from holdfast.study import Study, atomic_write_bytes, canonical_json

SIGNAL = "signal.safetensors"
ABOUT = "about"


class Signal(NamedTuple):
    """The signal of a study.

    Attributes:
        row_ids: Which rows it is of, in order.
        channels: Every channel, one entry a row.
        facts: Identity of the anchors, requests behind them, mode.
    """

    row_ids: list[str]
    channels: dict[str, Float[Tensor, "example step"]]
    facts: dict[str, Any]


def write_signal(
    study: Study,
    row_ids: Sequence[str],
    channels: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    """Write the signal of every row.

    Args:
        study: Where it goes.
        row_ids: Which rows it is of.
        channels: Every channel, one entry a row.
        facts: What it belongs to.
    """
    about = {"row_ids": list(row_ids), "facts": dict(facts)}
    tensors = {key: each.contiguous() for key, each in channels.items()}
    # One entry, since the order of several changes from one run to the next.
    data = save(tensors, {ABOUT: canonical_json(about)})
    atomic_write_bytes(study.path(SIGNAL), data)


def read_signal_file(study: Study) -> Signal:
    """Read the signal of every row.

    Raises:
        InputError: If it is missing or damaged.
    """
    path = study.require(SIGNAL)
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()[ABOUT])
            channels = {key: file.get_tensor(key) for key in file.keys()}
        return Signal(about["row_ids"], channels, about["facts"])
    # The reader of safetensors raises its own error, which is no ValueError.
    except Exception as error:
        raise InputError(
            f"the signal of every row in {study.path(SIGNAL)}",
            f"a damaged file ({error})",
            "Remove it and run `holdfast signal` again.",
        ) from error
