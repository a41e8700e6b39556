"""Defenses that are trained in: each is one function, found by its name.

A defense is handed the model before the first step and is a context manager: it may
hook the model, and lets go of it at the end. It yields a term that is added to the
loss of every step, after the forward pass that it watched; or None.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

from torch import Tensor

from holdfast.errors import SettingsError

Term = Callable[[], Tensor]
Defense = Callable[[Any], AbstractContextManager[Term | None]]


@contextmanager
def none(model: Any) -> Iterator[Term | None]:
    """Add nothing: plain supervised fine-tuning."""
    yield None


DEFENSES: Final[dict[str, Defense]] = {"none": none}


def defense(name: str) -> Defense:
    """Return a defense by its name.

    Raises:
        SettingsError: If there is none of that name.
    """
    if name not in DEFENSES:
        raise SettingsError(
            f"--defense {' or '.join(DEFENSES)}", repr(name), "Choose one of them."
        )
    return DEFENSES[name]
