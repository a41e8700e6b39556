"""Models over several devices: how one is spread, and what is said of it."""

import logging
from collections import Counter
from importlib.util import find_spec
from typing import Any, Final

import torch

from holdfast.errors import EnvironmentProblem

BALANCED: Final = "balanced"
"""Name of the choice to spread a model over all accelerators of the machine."""
SPREAD: Final = torch.device("meta")
"""Stands for all of them where one device is asked for: nothing runs on it itself."""
_OFFLOADED = ("cpu", "disk")

log = logging.getLogger("holdfast")


def balanced() -> torch.device:
    """Return the device of a model that is spread; the CPU where there is nothing else.

    Raises:
        EnvironmentProblem: If the package that spreads it is missing.
    """
    if not torch.cuda.is_available():
        log.warning("No GPU is found: --device %s is the CPU here.", BALANCED)
        return torch.device("cpu")
    if find_spec("accelerate") is None:
        raise EnvironmentProblem(
            f"the package accelerate, for --device {BALANCED}",
            "it is not installed",
            "Install it with `pip install accelerate`, or name one --device.",
        )
    return SPREAD


def device_map(device: torch.device, *, packed: bool) -> dict[str, Any]:
    """Return what `from_pretrained` is told of devices; nothing for a plain model.

    `packed`: Whether its weights are quantised: they do not all go from one device to
        another, and are read to where they stay.
    """
    if device == SPREAD:
        return {"device_map": BALANCED}
    return {"device_map": {"": device}} if packed else {}


def tell_places(model: Any) -> None:
    """Say over which devices a model was spread, and what lies on none of them."""
    places = getattr(model, "hf_device_map", None) or {}
    parts = Counter(
        f"cuda:{place}" if isinstance(place, int) else str(place)
        for place in places.values()
    )
    if len(parts) < 2:
        return
    log.warning(
        "The model is spread over %s.",
        ", ".join(f"{place} ({count} parts)" for place, count in parts.items()),
    )
    away = sum(parts[place] for place in _OFFLOADED)
    if away:
        log.warning(
            "%d parts do not fit on a GPU and are fetched in every pass, which is "
            "slow: take a 16-bit --dtype, a quantised copy or more GPUs. Heads in "
            "them cannot be measured.",
            away,
        )
