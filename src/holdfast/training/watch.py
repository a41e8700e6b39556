"""When a run is stopped: its loss is no number, or worse than knowing nothing."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from transformers import TrainerCallback

from holdfast.errors import ModelError
from holdfast.training.checkpoints import finite

PATIENCE: Final = 10
"""Steps in a row with a loss above the bound, after which a run is stopped."""

SLACK: Final = 1.1
"""How far above the loss of its first rows a run may be: other rows differ by luck."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """Stops a run whose loss diverges, and keeps its last good checkpoint.

    With gradients clipped, too strong a penalty never makes a loss infinite: it makes
    the task's loss large and keeps it there. A model that guesses every token with
    equal chance has a loss of the logarithm of the vocabulary. What is worse than that,
    and by a tenth than the loss of the first step, has diverged.
    """

    def __init__(self, n_vocab: int, folder: Path, *, defended: bool) -> None:
        """Remember what a uniform guess would cost.

        Args:
            n_vocab: Tokens that the model chooses from.
            folder: Where checkpoints lie, for the message.
            defended: Whether there is a defense whose options may be at fault.
        """
        self._bound = math.log(n_vocab)
        self._folder, self._defended = folder, defended
        self._above = 0
        self._began = False

    def require_number(self, value: float, name: str, step: int) -> None:
        """Check one part of a loss.

        Args:
            value: The part.
            name: Which part.
            step: Optimiser step, from 0.

        Raises:
            ModelError: If it is no number.
        """
        if not math.isfinite(value):
            raise self._stopped("a finite loss", f"{value} at step {step + 1}", name)

    def step(self, loss: float, step: int) -> None:
        """See the task's loss of one step, before its gradient is applied.

        Args:
            loss: The loss.
            step: Optimiser step, from 0.

        Raises:
            ModelError: If it has been above the bound for too long.
        """
        self._begin(loss)
        self._above = self._above + 1 if loss > self._bound else 0
        if self._above >= PATIENCE:
            raise self._stopped(
                f"a loss of the task of {self._bound:.4g} at most, that of a uniform "
                f"guess or {SLACK:g} times that of the first step",
                f"{loss:.4g} at step {step + 1}, and above it for {PATIENCE} steps",
                "task",
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
            raise self._stopped(
                "finite weights", f"nan or inf at step {state.global_step}", "task"
            )

    def _begin(self, loss: float) -> None:
        if not self._began:
            self._began, self._bound = True, max(self._bound, SLACK * loss)

    def _stopped(self, expected: str, found: str, part: str) -> ModelError:
        kept = sorted(self._folder.glob("checkpoint-*/holdfast.json"))
        where = (
            f"The last good checkpoint lies in {self._folder}"
            if kept
            else "None was saved"
        )
        least = "Lower --learning-rate or set --clip"
        if self._defended:
            least = (
                "Lower the strength of the defense (--defense-option) or "
                "--learning-rate, or set --clip"
            )
        if part != "task":
            found += f" in {part}"
        return ModelError(expected, found, f"{where}. {least}, and give another -o.")
