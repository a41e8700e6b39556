"""Checkpoints that are whole and finite, and the watch on the loss."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import TrainerCallback

from holdfast.errors import InputError, ModelError
from holdfast.finetune.targets import IGNORED, Example
from holdfast.models.loading.checkpoint import name_base
from holdfast.models.loading.files import ADAPTER_CONFIG, STEP_RECORD
from holdfast.models.model import Adapter
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

        `state`: What the defense carries from step to step, as it is at any time.
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
    """Return the last good checkpoint of a run."""
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

    `since`: Optimiser steps after which the weights were bad.
    Returns: The last good checkpoint before that, or None.
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
    """Give a defense back what it carried when a checkpoint was written."""
    if not state:
        return
    path = checkpoint / STATE
    tensors = load_file(path) if path.exists() else {}
    kept, expected = ({n: t.shape for n, t in d.items()} for d in (tensors, state))
    if kept != expected:
        raise InputError(
            f"the {len(state)} tensors of the defense in {path}",
            f"{len(tensors)}, or others" if tensors else "no such file",
            "Remove the folder to train anew, or choose another -o.",
        )
    for name, tensor in tensors.items():
        state[name] = tensor.to(state[name].device, state[name].dtype)


PATIENCE: Final = 10
"""Steps in a row with a loss above the bound, after which a run is stopped."""
SLACK: Final = 1.5
"""How many times the loss of its first rows a run may have: others differ by luck."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """Stops a run whose loss diverges, and keeps its last good checkpoint.

    With gradients clipped, too strong a penalty never makes a loss infinite: it makes
    the task's loss large and keeps it there. A spoilt model comes down to knowing how
    often each token occurs and no more. What is worse than that, and by half than the
    loss of the first step, has diverged.
    """

    def __init__(self, blind: float, folder: Path, *, defended: bool) -> None:
        """Remember what it costs to know nothing.

        `blind`: Loss of a model that knows nothing (see `blind_loss`).
        """
        self._bound = blind
        self._folder, self._defended = folder, defended
        self._above = 0
        self._began = False

    def require_number(self, value: float, name: str, step: int) -> None:
        """Check one part of a loss."""
        if not math.isfinite(value):
            found = f"{value} at step {step + 1}"
            raise self._stopped("a finite loss", found, name, step)

    def step(self, loss: float, step: int) -> None:
        """See the task's loss of one step, before its gradient is applied."""
        self._begin(loss)
        self._above = self._above + 1 if loss > self._bound else 0
        if self._above >= PATIENCE:
            raise self._stopped(
                f"a loss of the task of {self._bound:.4g} at most, that of knowing how "
                f"often each token occurs or {SLACK:g} times that of the first step",
                f"{loss:.4g} at step {step + 1}, and above it for {PATIENCE} steps",
                "task",
                step + 1 - PATIENCE,
            )

    def on_train_begin(
        self, args: Any, state: Any, control: Any, **things: Any
    ) -> None:
        """Read from the curve of a resumed run where it began."""
        history: Sequence[Mapping[str, float]] = state.log_history
        for entry in history[:1]:
            self._begin(entry["task_loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        """Save nothing while the loss is above the bound: only so many are kept."""
        if self._above:
            control.should_save = False

    def on_train_end(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        """Look at the weights: after the last step no loss would tell of them."""
        if not finite(things["model"]):
            step = state.global_step
            found = f"nan or inf at step {step}"
            raise self._stopped("finite weights", found, "task", step)

    def _begin(self, loss: float) -> None:
        if not self._began:
            self._began, self._bound = True, max(self._bound, SLACK * loss)

    def _stopped(self, expected: str, found: str, part: str, since: int) -> ModelError:
        # What was saved after so many steps has the weights that the bad loss is of.
        kept = disown(self._folder, since)
        where = "No good checkpoint was saved"
        if kept is not None:
            where = f"The last good checkpoint is {kept}"
        least = "Lower --learning-rate or set --clip"
        if self._defended:
            least = (
                "Lower the strength of the defense (--defense-option) or "
                "--learning-rate, or set --clip"
            )
        if part != "task":
            found += f" in {part}"
        return ModelError(expected, found, f"{where}. {least}, and give another -o.")


def blind_loss(examples: Sequence[Example]) -> float:
    """Return the loss of a model that knows how often each token occurs and no more."""
    counts = Counter(
        label for each in examples for label in each.labels if label != IGNORED
    )
    n = counts.total()
    return -sum(count / n * math.log(count / n) for count in counts.values())
