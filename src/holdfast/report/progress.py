"""Progress of a stage: told as it goes, and logged where there is no terminal."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol, runtime_checkable


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


EVERY = 60.0
"""Seconds between two lines."""


class Tally:
    """How far a bar is, as a line of text."""

    def __init__(
        self, label: str, total: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin at nothing.

        `clock`: Tells the time in seconds.
        """
        self._label, self._total, self._clock = label, total, clock
        self._begun = clock()
        self._done = self._tokens = 0

    def advance(self, steps: int, tokens: int = 0) -> None:
        """Move on by so many steps; so many tokens were written meanwhile."""
        self._done += steps
        self._tokens += tokens

    def line(self) -> str:
        """Return how far it is."""
        tokens = f", {self._tokens} tokens" if self._tokens else ""
        minutes, seconds = divmod(round(self._clock() - self._begun), 60)
        gone = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
        return f"{self._label}: {self._done} of {self._total}{tokens}, after {gone}"


@contextmanager
def logged(
    say: Callable[[str], None], label: str, total: int, every: float = EVERY
) -> Iterator[Advance]:
    """Say a line now and then, however long a step takes, and one at the end."""
    tally, ended = Tally(label, total), threading.Event()

    def tell() -> None:
        while not ended.wait(every):
            say(tally.line())

    # Where a step takes minutes, nobody else is free to say so.
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield tally.advance
    finally:
        ended.set()
        teller.join()
        say(tally.line())


class Tick(NamedTuple):
    """What one forward pass of a batch did."""

    finished: int  # Rows that it ended.
    written: int  # Tokens that it wrote, over all rows.
    read: int  # Tokens that it read, padding included.
    is_prompt: bool  # Whether it read the prompts.
