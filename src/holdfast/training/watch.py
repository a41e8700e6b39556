"""When a run is stopped: its loss is no number, or worse than knowing nothing."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from transformers import TrainerCallback

from holdfast.errors import ModelError
from holdfast.training.checkpoints import disown, finite
from holdfast.training.targets import IGNORED, Example

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

        Args:
            blind: Loss of a model that knows nothing (see `blind_loss`).
            folder: Where checkpoints lie.
            defended: Whether there is a defense whose options may be at fault.
        """
        self._bound = blind
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
            found = f"{value} at step {step + 1}"
            raise self._stopped("a finite loss", found, name, step)

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
    """Return the loss of a model that knows how often each token occurs and no more.

    Args:
        examples: Training sequences; what carries loss counts.

    Returns:
        Entropy of the frequencies, in nats.
    """
    counts = Counter(
        label for each in examples for label in each.labels if label != IGNORED
    )
    n = counts.total()
    return -sum(count / n * math.log(count / n) for count in counts.values())
