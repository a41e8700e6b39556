"""What every detector on the signal can do, and those that are a reading of it.

A detector is fitted on benign rows alone, or on nothing. Higher scores are further
from what benign responses do. It can be asked after every step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.errors import InputError

Channel = Literal[
    "compliance",
    "compliance_logit",
    "text",
    "probe",
    "logit_difference",
    "perplexity",
]
"""What a detector reads, one number per row and step. What is known of a row before it
is answered (the perplexity of its prompt) is the same number at every step."""
Reading = Literal["mean", "last", "dip", "rebound"]


@dataclass(frozen=True)
class Detector(ABC):
    """A fitted detector."""

    kind: ClassVar[str]

    channel: Channel  # What it reads.
    n_steps: int  # Steps of the series that it reads.

    @abstractmethod
    def _score(self, rows: Tensor) -> Tensor:
        """Return the score of rows `[example, step]` in float64, of 1 step or more."""

    def at(
        self, rows: Float[Tensor, "example _"], steps: int
    ) -> Float[Tensor, "example"]:
        """Return the score of each row after its first steps.

        Args:
            rows: The series; what comes after the first `steps` is not looked at.
            steps: How many steps were seen, from 1.

        Raises:
            InputError: If the detector or the rows have no so many steps.
        """
        if not 1 <= steps <= min(self.n_steps, rows.shape[1]):
            raise self._other_steps(f"1 to {self.n_steps} steps", rows, f"{steps} of ")
        return self._score(rows[:, :steps].detach().double().cpu())

    def score(self, rows: Float[Tensor, "example step"]) -> Float[Tensor, "example"]:
        """Return the score of each whole response; higher is less like benign ones.

        Raises:
            InputError: If the rows have another number of steps.
        """
        if rows.shape[1] != self.n_steps:
            raise self._other_steps(f"series of {self.n_steps} steps", rows)
        return self.at(rows, self.n_steps)

    def prefixes(
        self, rows: Float[Tensor, "example step"]
    ) -> Float[Tensor, "example step"]:
        """Return the score of each row after every step, the first included.

        Raises:
            InputError: If the rows have another number of steps.
        """
        before = [self.at(rows, step) for step in range(1, self.n_steps)]
        return torch.stack([*before, self.score(rows)], 1)

    def parts(self) -> dict[str, Any]:
        """Return what it is made of, for files: tensors, and what JSON can hold."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return {"kind": self.kind} | own

    def _other_steps(self, steps: str, rows: Tensor, seen: str = "") -> InputError:
        return InputError(
            f"{steps}, as the detector was fitted on",
            f"{seen}{rows.shape[1]} steps",
            "Fit a detector for so many steps.",
        )


READINGS: dict[Reading, Callable[[Tensor], Tensor]] = {
    "mean": lambda rows: rows.mean(1),
    "last": lambda rows: rows[:, -1],
    "dip": lambda rows: 1 - rows.min(1).values,
    "rebound": lambda rows: rows[:, -1] - rows.min(1).values,
}


@final
@dataclass(frozen=True)
class SeriesReading(Detector):
    """A number that is read off the series so far; nothing is fitted."""

    kind: ClassVar[str] = "read"

    # `mean` or `last` of the steps so far; `dip`, how far the series has fallen below
    # 1; `rebound`, how far it has come up again since.
    reading: Reading

    def _score(self, rows: Tensor) -> Tensor:
        return READINGS[self.reading](rows)


def read_off(
    rows: Float[Tensor, "example step"], channel: Channel, *, reading: Reading
) -> SeriesReading:
    """Return the detector that reads series as long as these rows."""
    return SeriesReading(channel, rows.shape[1], reading)
