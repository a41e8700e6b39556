"""Every error that Holdfast raises on purpose.

```text
HoldfastError
├── InputError             exit 2   what the user gave cannot be read or used
│   ├── PromptFileError             a prompt file: missing, empty, malformed
│   └── SettingsError               an option, or options that contradict each other
├── ModelError             exit 3   the model does not fit, or failed a check
│   ├── AdapterError                a proof on load failed
│   │   └── UnsupportedFamilyError  an architecture that is refused by name
│   ├── EngineError                 another model, template or vocabulary answers
│   └── ThinkingFormatError         thinking is required and the chat template has none
├── EvidenceError          exit 4   not enough evidence to say anything
│   └── TooFewExamplesError         with the counts, and what to add
├── EnvironmentProblem     exit 5   the machine: disk, permissions, network
│   ├── StorageError                full disk, read-only study
│   ├── OfflineError                a Hub id that cannot be reached
│   └── EndpointError               a server is down, or its budget spent
└── InterruptedRun         exit 130 stopped by the user; what was computed is kept
```

Each message says what was expected, what was found, and what to do next.
"""

from collections.abc import Sequence
from typing import Any


class HoldfastError(Exception):
    """Base of the tree; `exit_status` is what the command line returns."""

    exit_status = 1

    def __init__(self, expected: str, found: str, next_step: str) -> None:
        """Keep the three parts, and join them into one message.

        Args:
            expected: What had to be true.
            found: What was there instead.
            next_step: What the reader can do about it.
        """
        self.expected = expected
        self.found = found
        self.next_step = next_step
        super().__init__(f"expected {expected}; found {found}. {next_step}")


class InputError(HoldfastError):
    """What the user gave cannot be read or does not fit together."""

    exit_status = 2


class PromptFileError(InputError):
    """A prompt file is missing, empty or malformed; names file and line."""


class SettingsError(InputError):
    """An option is out of range, or options contradict each other."""


class ModelError(HoldfastError):
    """The model does not fit, or a result was refused by its own check."""

    exit_status = 3


class AdapterError(ModelError):
    """A proof that the adapter runs on load has failed.

    Attributes:
        proofs: Every proof that was tried, passed or not, as `models.parts.Proof`;
            empty where a part of the model was missing, and none could be tried.
    """

    def __init__(
        self, expected: str, found: str, next_step: str, proofs: Sequence[Any] = ()
    ) -> None:
        """Keep the proofs beside the message."""
        super().__init__(expected, found, next_step)
        self.proofs = tuple(proofs)


class UnsupportedFamilyError(AdapterError):
    """An architecture that Holdfast refuses by name, with the reason."""


class ThinkingFormatError(ModelError):
    """Thinking is required, and the chat template has no thinking format."""


class EngineError(ModelError):
    """An engine that draws does something else than the model it stands for."""


class EvidenceError(HoldfastError):
    """There is not enough evidence to say anything."""

    exit_status = 4


class TooFewExamplesError(EvidenceError):
    """A class or a split has too few rows; the message gives the counts."""


class EnvironmentProblem(HoldfastError):
    """The machine stands in the way: disk, permissions or network."""

    exit_status = 5


class StorageError(EnvironmentProblem):
    """The disk is full, or the study cannot be written."""


class OfflineError(EnvironmentProblem):
    """A Hub id was asked for, and the Hub cannot be reached."""


class EndpointError(EnvironmentProblem):
    """A server is down or refuses us, or the budget for it is spent."""


class InterruptedRun(HoldfastError):
    """The user stopped the run; what was computed is kept and resumed."""

    exit_status = 130
