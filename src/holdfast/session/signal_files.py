"""The signal of every row as a file of the study, and back."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from holdfast.errors import InputError
from holdfast.study import Study, atomic_write_bytes

SIGNAL = "signal.safetensors"


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
    about = {"row_ids": json.dumps(list(row_ids)), "facts": json.dumps(dict(facts))}
    data = save({key: each.contiguous() for key, each in channels.items()}, about)
    atomic_write_bytes(study.path(SIGNAL), data)


def read_signal_file(study: Study) -> Signal:
    """Read the signal of every row.

    Raises:
        InputError: If it is missing or damaged.
    """
    if not study.path(SIGNAL).exists():
        raise InputError(
            f"{SIGNAL} in {study.directory}",
            "no such file",
            "Run `holdfast signal` on the study first.",
        )
    try:
        with safe_open(study.path(SIGNAL), "pt") as file:
            about = file.metadata()
            channels = {key: file.get_tensor(key) for key in file.keys()}
        return Signal(
            json.loads(about["row_ids"]), channels, json.loads(about["facts"])
        )
    # The reader of safetensors raises its own error, which is no ValueError.
    except Exception as error:
        raise InputError(
            f"the signal of every row in {study.path(SIGNAL)}",
            f"a damaged file ({error})",
            "Remove it and run `holdfast signal` again.",
        ) from error
