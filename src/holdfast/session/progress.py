"""How a stage tells what it is doing; silent unless somebody listens."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, steps: int, tokens: int = 0) -> None:
        """Move it on by so many steps; so many tokens were written meanwhile."""


@runtime_checkable
class Progress(Protocol):
    """Where a stage says what it does."""

    def say(self, message: str) -> None:
        """Tell the user one thing."""

    def warn(self, message: str) -> None:
        """Tell the user one thing that must not be missed."""

    def track(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """Open a bar of `total` steps; what it yields moves it on by so many."""


class Silent:
    """The library's default: nothing is shown."""

    def say(self, message: str) -> None:
        """Say nothing."""

    def warn(self, message: str) -> None:
        """Say nothing."""

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Advance]:
        """Show nothing."""
        yield lambda steps, tokens=0: None
