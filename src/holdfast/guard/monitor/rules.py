"""Live detectors: what each makes of one number per token, so far and in one pass.

A detector reads one direction (or the step-wise signal) in one channel, the thinking or
the answer. Its score is the highest of the request so far, so that one threshold holds
however often and however long one looks.
"""

import math
from bisect import insort
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from holdfast.cliff.cliff import LAST_SHARE, MIN_TOKENS

Channel = Literal["thinking", "answer"]
Rule = Literal["end", "cliff", "rolling", "segment", "hesitation", "last"]
SIGNAL = "signal"
"""What a detector reads that holds the step-wise signal against anchors."""
ANY = "any"
"""The rarest score of all detectors, as benign requests have them: one threshold for
all of them, and so one promise."""


class LiveDetector(NamedTuple):
    """What is read, where, and by which rule."""

    name: str  # By which thresholds and scores are known.
    reads: str  # Name of a direction, or `SIGNAL`.
    channel: Channel  # Tokens that count; the end of the thinking belongs to it.
    # `end`: the reading at the end of the thinking. `cliff`: the middle of the thinking
    # less that. `rolling`: the mean of the last `window` tokens. `segment`: the
    # `support`-th highest of them, which is over a threshold where so many tokens are.
    # `hesitation`: the share of tokens so far within `band` of 0. `last`: the reading
    # itself.
    rule: Rule
    window: int = 1  # Tokens that a score needs, at least.
    support: int = 1  # Tokens of the window that must agree.
    band: float = 0.0  # Distance from the boundary that counts as near.
    sign: float = 1.0  # -1 where low readings are those to look for.


TAILS = (0.5, 0.1, 0.01, 0.001)
"""Shares of benign requests that score above the knots of a scale."""


class Scale(NamedTuple):
    """What makes scores of different detectors comparable: how rare each is."""

    # Scores that those shares of benign requests are above; they rise.
    knots: tuple[float, ...]

    def rarity(self, score: float) -> float:
        """Return minus the logarithm, to base 10, of the share that scores higher.

        Between knots and beyond them along straight lines, so that it rises with the
        score without end. It is an estimate: promises rest on thresholds alone.
        """
        knots = self.knots
        at = next(
            (i for i, knot in enumerate(knots[1:-1]) if score < knot), len(knots) - 2
        )
        low, high = -math.log10(TAILS[at]), -math.log10(TAILS[at + 1])
        share = (score - knots[at]) / (knots[at + 1] - knots[at])
        return low + share * (high - low)


class Place(NamedTuple):
    """Where a token stands."""

    channel: Channel
    # Whether it belongs to the tokens that end the thinking.
    ends: bool
    n_thinking: int  # Tokens of thinking before that end; so far, while it goes on.


class _Line:
    """One detector at work on one request."""

    def __init__(self, detector: LiveDetector) -> None:
        self.detector = detector
        self.best = -math.inf
        self._near = self._count = 0
        self._sum = 0.0
        self._recent: deque[float] = deque()
        self._ordered: list[float] = []

    def push(self, value: float) -> None:
        """Take the next reading of the channel."""
        detector = self.detector
        value *= detector.sign
        self._count += 1
        if detector.rule in ("end", "last"):
            score = value
        elif detector.rule == "hesitation":
            self._near += abs(value) < detector.band
            score = self._near / self._count
        else:
            score = self._windowed(value)
        if self._count >= detector.window:
            self.best = max(self.best, score)

    def fall(self, middle: float, value: float) -> None:
        """Take a reading at the end of a thinking whose middle is known."""
        self.best = max(self.best, self.detector.sign * (middle - value))

    def _windowed(self, value: float) -> float:
        """Return the mean of the window, or the reading that enough of it reach."""
        recent, detector = self._recent, self.detector
        recent.append(value)
        out = recent.popleft() if len(recent) > detector.window else None
        if detector.rule == "rolling":
            # Added up anew: a sum that is carried along drifts from what it stands for.
            return math.fsum(recent) / len(recent)
        if out is not None:
            self._ordered.remove(out)
        insort(self._ordered, value)
        return self._ordered[-min(detector.support, len(self._ordered))]


class Scorer:
    """All detectors at work on one request."""

    def __init__(
        self, detectors: Sequence[LiveDetector], scales: Mapping[str, Scale]
    ) -> None:
        """Begin a request. Without scales there is no score of all together."""
        lines = [_Line(detector) for detector in detectors]
        self._scales = scales
        self._thought: dict[str, list[float]] = {
            line.detector.reads: [] for line in lines if line.detector.rule == "cliff"
        }
        self._middles: dict[str, float | None] = {}
        self._scores: dict[str, float] = {}
        # What is read at the end of the thinking, and what is read elsewhere.
        self._ending = [x for x in lines if x.detector.rule in ("end", "cliff")]
        others = [x for x in lines if x.detector.rule not in ("end", "cliff")]
        self._lines: dict[Channel, list[_Line]] = {
            "thinking": [x for x in others if x.detector.channel == "thinking"],
            "answer": [x for x in others if x.detector.channel == "answer"],
        }

    def push(self, place: Place, readings: Mapping[str, float]) -> bool:
        """Take the readings of the next token; those that are missing are left out.

        Returns: Whether a score has risen.
        """
        if place.channel == "thinking" and not place.ends:
            for name, values in self._thought.items():
                if name in readings:
                    values.append(readings[name])
        risen = False
        for line in self._ending if place.ends else self._lines[place.channel]:
            detector, before = line.detector, line.best
            value = readings.get(detector.reads)
            if value is None:
                continue
            if detector.rule != "cliff":
                line.push(value)
            elif (middle := self._middle(detector.reads, place)) is not None:
                line.fall(middle, value)
            if line.best > before:
                self._raise(detector.name, line.best)
                risen = True
        return risen

    def _raise(self, name: str, best: float) -> None:
        """Take note of a score; whoever was shown those before keeps them."""
        self._scores = self._scores | {name: best}
        if name in self._scales:
            rarity = self._scales[name].rarity(best)
            self._scores[ANY] = max(rarity, self._scores.get(ANY, rarity))

    def forget(self) -> None:
        """Begin the highest scores anew; what was read stays in windows and middles."""
        self._scores = {}
        for line in (*self._ending, *self._lines["thinking"], *self._lines["answer"]):
            line.best = -math.inf

    def scores(self) -> dict[str, float]:
        """Return the highest score of each detector so far; none where it has none."""
        return self._scores

    def _middle(self, reads: str, place: Place) -> float | None:
        """Return the median of the thinking without its last part, once it is over."""
        if reads not in self._middles:
            kept = place.n_thinking - math.ceil(LAST_SHARE * place.n_thinking)
            values = sorted(self._thought[reads][:kept])
            half = len(values) // 2
            enough = place.n_thinking >= MIN_TOKENS and kept == len(values) > 0
            self._middles[reads] = (
                (values[half] + values[-half - 1]) / 2 if enough else None
            )
        return self._middles[reads]
