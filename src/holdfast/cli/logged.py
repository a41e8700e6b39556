"""Progress where there is no terminal: a line a minute, for a log file."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from holdfast.session.progress import Advance

EVERY = 60.0
"""Seconds between two lines."""


class Tally:
    """How far a bar is, as a line of text."""

    def __init__(
        self, label: str, total: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin at nothing.

        Args:
            label: What is being done.
            total: Steps of it.
            clock: Tells the time in seconds.
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
    """Say a line now and then, however long a step takes, and one at the end.

    Args:
        say: Prints a line.
        label: What is being done.
        total: Steps of it.
        every: Seconds between two lines.

    Yields:
        What moves it on.
    """
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
