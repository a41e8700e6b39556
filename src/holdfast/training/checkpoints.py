"""Checkpoints that are whole and finite, and the loss curve beside them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import TrainerCallback

from holdfast.errors import InputError
from holdfast.models.checkpoints import name_base
from holdfast.models.files import ADAPTER_CONFIG, STEP_RECORD
from holdfast.models.parts import Adapter
from holdfast.study import atomic_write_bytes, atomic_write_json

MARKER: Final = STEP_RECORD

STATE: Final = "holdfast_defense.safetensors"
"""What a defense carries from step to step."""


class Keeper(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint as good, or leaves it unmarked."""

    def __init__(
        self, fingerprint: str, state: Mapping[str, Tensor], base: Adapter | None = None
    ) -> None:
        """Remember what the run is keyed by.

        Args:
            fingerprint: Hash of everything that the result depends on.
            state: What the defense carries from step to step, as it is at any time.
            base: The model that is trained.
        """
        self._fingerprint, self._state, self._base = fingerprint, state, base

    def on_save(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        """Mark the checkpoint that was just written."""
        if not state.is_world_process_zero:
            return
        if finite(things["model"], *self._state.values()):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if self._state:
                kept = {name: each.cpu() for name, each in self._state.items()}
                atomic_write_bytes(folder / STATE, save(kept))
            mark: dict[str, Any] = {
                "step": state.global_step,
                "fingerprint": self._fingerprint,
            }
            if self._base is not None and (folder / ADAPTER_CONFIG).is_file():
                name_base(folder, self._base.source)
                mark["base"] = {"weights_sha256": self._base.identity.weights_sha256}
            atomic_write_json(folder / MARKER, mark)


def finite(model: torch.nn.Module, *others: Tensor) -> bool:
    """Return whether every trained weight, and every other tensor, is a number."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return all(bool(torch.isfinite(each).all()) for each in [*weights, *others])


def last_checkpoint(folder: Path, fingerprint: str, *, clear: bool) -> Path | None:
    """Return the last good checkpoint of a run.

    Args:
        folder: Where the checkpoints of the run lie.
        fingerprint: What the run is keyed by.
        clear: Whether to remove those that an interruption left half-written; they
            would count against the number that is kept.

    Raises:
        InputError: If the checkpoints are those of a run with other settings.
    """
    good: dict[int, Path] = {}
    for path in sorted(folder.glob("checkpoint-*")):
        try:
            mark = json.loads((path / MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            if clear:
                shutil.rmtree(path, ignore_errors=True)
            continue
        if mark.get("fingerprint") != fingerprint:
            raise InputError(
                f"checkpoints of this very run in {folder}",
                "those of a run with other data or settings",
                "Finish that run with its own command, remove the folder, or choose "
                "another -o.",
            )
        good[int(mark["step"])] = path
    return good[max(good)] if good else None


def disown(folder: Path, since: int) -> Path | None:
    """Take the mark of being good from checkpoints of a run that went wrong.

    Args:
        folder: Where the checkpoints of the run lie.
        since: Optimiser steps after which the weights were bad.

    Returns:
        The last good checkpoint before that, or None.
    """
    good: dict[int, Path] = {}
    for mark in folder.glob(f"checkpoint-*/{MARKER}"):
        step = int(mark.parent.name.rpartition("-")[2])
        if step < since:
            good[step] = mark.parent
        else:
            mark.unlink(missing_ok=True)
    return good[max(good)] if good else None


def restore(checkpoint: Path, state: dict[str, Tensor]) -> None:
    """Give a defense back what it carried when a checkpoint was written.

    Args:
        checkpoint: A good checkpoint.
        state: What the defense begins with; overwritten.

    Raises:
        InputError: If the checkpoint has other tensors.
    """
    if not state:
        return
    path = checkpoint / STATE
    found = load_file(path) if path.exists() else {}
    if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in state.items()}:
        raise InputError(
            f"the {len(state)} tensors of the defense in {path}",
            f"{len(found)}, or others" if found else "no such file",
            "Remove the folder to train anew, or choose another -o.",
        )
    for name, tensor in found.items():
        state[name] = tensor.to(state[name].device, state[name].dtype)
