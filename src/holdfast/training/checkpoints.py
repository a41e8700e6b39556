"""Checkpoints that are whole and finite, and the loss curve beside them."""

import json
import shutil
from pathlib import Path
from typing import Any, Final

import torch
from transformers import TrainerCallback

from holdfast.errors import InputError
from holdfast.study import atomic_write_json

MARKER: Final = "holdfast.json"
"""Written into a checkpoint when all of it is on disk and every weight is finite."""


class Keeper(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint as good, or leaves it unmarked."""

    def __init__(self, fingerprint: str) -> None:
        """Remember what the run is keyed by.

        Args:
            fingerprint: Hash of everything that the result depends on.
        """
        self._fingerprint = fingerprint

    def on_save(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        """Mark the checkpoint that was just written."""
        if not state.is_world_process_zero:
            return
        if finite(things["model"]):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            mark = {"step": state.global_step, "fingerprint": self._fingerprint}
            atomic_write_json(folder / MARKER, mark)


def finite(model: torch.nn.Module) -> bool:
    """Return whether every trained weight is a number."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return all(bool(torch.isfinite(weight).all()) for weight in weights)


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
