"""Where the time of a batch goes, so that the others can be estimated by it."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from holdfast.models.decoding import Tick
from holdfast.session.progress import Advance


class Work(NamedTuple):
    """What a step costs, in multiples of what each token of its context adds.

    Attributes:
        fixed: Cost of a step whatever its context.
        per_token: What a token of the context adds.
    """

    fixed: float = 1.0
    per_token: float = 0.0


class Meter:
    """Told of every pass of a batch: moves the bar on, and keeps the times.

    Attributes:
        reading: Seconds of the passes that read prompts.
        read: Tokens that these read, padding included.
        writing: Seconds of all other passes.
        steps: How many there were.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin with nothing.

        Args:
            clock: Tells the time in seconds.
        """
        self._clock = clock
        self._advance: Advance | None = None
        self._at = clock()
        self.open(0, None)

    def open(self, n_items: int, advance: Advance | None) -> None:
        """Begin a batch of so many items; the times begin anew."""
        self._left, self._advance = n_items, advance
        self._at = self._clock()
        self.reading = self.writing = 0.0
        self.read = self.steps = 0

    def tick(self, tick: Tick) -> None:
        """Take note of a pass.

        Args:
            tick: What it did; items beyond those of the batch are not counted twice.
        """
        now = self._clock()
        took, self._at = now - self._at, now
        if tick.is_prompt:
            self.reading += took
            self.read += tick.read
        else:
            self.writing += took
            self.steps += 1
        steps = min(tick.finished, self._left)
        self._left -= steps
        if self._advance is not None:
            self._advance(steps, tick.written)

    def close(self) -> None:
        """End a batch: whatever of it was not told one by one is done now."""
        if self._advance is not None:
            self._advance(self._left)
        self._left, self._advance = 0, None

    def cost(self, lengths: Sequence[int], first: Sequence[int], work: Work) -> float:
        """Return what a batch costs, in seconds of the passes of the one measured.

        Reading goes by its tokens. Writing takes as many steps as in the batch that
        was measured; a step costs more the longer its context is, and half as much
        less where half of the rows are missing.

        Args:
            lengths: Tokens of each prompt of the batch.
            first: Those of the batch that was measured.
            work: What a step costs.
        """
        reading = self.reading / max(1, self.read) * len(lengths) * max(lengths)
        contexts = [max(each) + self.steps / 2 for each in (lengths, first)]
        here, there = (work.fixed + work.per_token * each for each in contexts)
        width = (1 + len(lengths) / len(first)) / 2
        return reading + self.writing * here / there * width
