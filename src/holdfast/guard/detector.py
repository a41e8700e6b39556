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
    """A fitted detector.

    Attributes:
        channel: What it reads.
        n_steps: Steps of the series that it reads.
    """

    kind: ClassVar[str]

    channel: Channel
    n_steps: int

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
            raise InputError(
                f"1 to {self.n_steps} steps, as the detector was fitted on",
                f"{steps} of rows of {rows.shape[1]} steps",
                "Fit a detector for so many steps.",
            )
        return self._score(rows[:, :steps].detach().double().cpu())

    def score(self, rows: Float[Tensor, "example step"]) -> Float[Tensor, "example"]:
        """Return the score of each whole response; higher is less like benign ones.

        Raises:
            InputError: If the rows have another number of steps.
        """
        return self.at(self._whole(rows), self.n_steps)

    def prefixes(
        self, rows: Float[Tensor, "example step"]
    ) -> Float[Tensor, "example step"]:
        """Return the score of each row after every step, the first included.

        Raises:
            InputError: If the rows have another number of steps.
        """
        whole = self._whole(rows)
        steps = range(1, self.n_steps + 1)
        return torch.stack([self.at(whole, step) for step in steps], 1)

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name, for a file."""
        return {key: each for key, each in self._parts() if isinstance(each, Tensor)}

    def facts(self) -> dict[str, Any]:
        """Return all else that it is made of, as JSON can hold it."""
        parts = self._parts()
        others = {key: each for key, each in parts if not isinstance(each, Tensor)}
        return {"kind": self.kind} | others

    def _parts(self) -> list[tuple[str, Any]]:
        return [(each.name, getattr(self, each.name)) for each in fields(self)]

    def _whole(self, rows: Tensor) -> Tensor:
        if rows.shape[1] == self.n_steps:
            return rows
        raise InputError(
            f"series of {self.n_steps} steps, as the detector was fitted on",
            f"{rows.shape[1]} steps",
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
class Read(Detector):
    """A number that is read off the series so far; nothing is fitted.

    Attributes:
        reading: `mean` or `last` of the steps so far; `dip`, how far the series has
            fallen below 1; `rebound`, how far it has come up again since.
    """

    kind: ClassVar[str] = "read"

    reading: Reading

    def _score(self, rows: Tensor) -> Tensor:
        return READINGS[self.reading](rows)
