"""What is asked of the model's thread, and what comes back, piece by piece."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from holdfast.guard.monitor.monitor import NOT_FINITE, TokenScore
from holdfast.models.decoding.row_state import Sampling

Finish = Literal["stop", "length", "content_filter"]
Failure = Literal["timeout", "shutdown", "fault", "memory"]

FAILURES: dict[Failure, str] = {
    "fault": "the model failed at this answer; the log says why",
    "memory": "the memory does not suffice for this answer beside the others",
    "shutdown": "the server is going down",
    "timeout": "it took longer than it may",
}


class Busy(Exception):
    """There is no room to wait in; the message says for what."""


class Scored(NamedTuple):
    """The scores of one token that has been read."""

    # Place of the token, counted from the first that was written. It hides a method of
    # tuples that nobody calls.
    index: int  # type: ignore[assignment]
    channel: str  # `thinking` or `answer`.
    scores: dict[str, float]  # By detector.
    fired: tuple[str, ...]  # Detectors whose threshold is passed here.
    abstains: str | None  # Why thresholds promise nothing here; None if they do.
    acts: bool = False  # Whether the guard acts at this token.

    def record(self) -> dict[str, Any]:
        """Return it as clients get it."""
        return {
            "index": self.index,
            "channel": self.channel,
            "scores": self.scores,
            "fired": list(self.fired),
            "abstains": self.abstains,
        }


def is_sound(score: TokenScore) -> bool:
    """Return whether a token was read: what it was read as, and scores, are numbers.

    States may be numbers of which a direction makes none, and an answer of such tokens
    passes every threshold unwatched.
    """
    finite = score.abstains != NOT_FINITE
    return finite and all(value == value for value in score.scores.values())


@dataclass
class Verdict:
    """What the guard says of one answer."""

    policy: str | None  # What follows when it fires; None where nothing watches.
    watched: bool  # Whether the answer was watched from its first token to its last.
    fired: list[dict[str, Any]] = field(default_factory=list)  # Where each fired first.
    # What was done: `stopped`, `refused`, `steered`, `redrawn`; None for nothing.
    action: str | None = None
    fault: str | None = None  # Why it could not be watched.
    abstains: str | None = None
    stale: tuple[str, ...] = ()
    acts_on: str | None = None  # The detector whose firing flags an answer.
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    # The last scores of each channel, by detector.

    def take(self, scored: Scored) -> None:
        """Take the scores of the next token."""
        self.scores.setdefault(scored.channel, {}).update(scored.scores)
        self.abstains = scored.abstains or self.abstains
        known = {each["detector"] for each in self.fired}
        for name in scored.fired:
            if name not in known:
                self.fired.append(
                    {
                        "detector": name,
                        "index": scored.index,
                        "channel": scored.channel,
                        "score": scored.scores.get(name),
                    }
                )

    def record(self) -> dict[str, Any]:
        """Return it as clients get it."""
        return {
            # The rate is promised of each detector alone: all together fire more often.
            "flagged": any(each["detector"] == self.acts_on for each in self.fired),
            "policy": self.policy,
            "action": self.action,
            "watched": self.watched,
            "fault": self.fault,
            "abstains": self.abstains,
            "stale": list(self.stale),
            "fired": self.fired,
            "scores": self.scores,
        }


class Usage(NamedTuple):
    """Tokens that were read and written."""

    prompt: int
    written: int
    thinking: int

    def record(self) -> dict[str, Any]:
        """Return it as clients get it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.written,
            "total_tokens": self.prompt + self.written,
            "completion_tokens_details": {"reasoning_tokens": self.thinking},
        }


@dataclass(frozen=True)
class Piece:
    """What came since the last piece."""

    thinking: str = ""
    answer: str = ""
    steps: tuple[Scored, ...] = ()
    finish: Finish | None = None  # How the answer ended, with the last piece.
    failure: Failure | None = None  # Why there is no answer, or no more of it.
    why: str = ""  # The failure in words.
    usage: Usage | None = None
    # The message that stands in place of the answer, under the policy `refuse`.
    refusal: str | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing follows."""
        return self.finish is not None or self.failure is not None


def joined(pieces: Sequence[Piece]) -> Piece:
    """Return pieces that came one behind the other as one."""
    last = pieces[-1]
    return Piece(
        "".join(piece.thinking for piece in pieces),
        "".join(piece.answer for piece in pieces),
        tuple(step for piece in pieces for step in piece.steps),
        last.finish,
        last.failure,
        last.why,
        last.usage,
        last.refusal,
    )


class Mailbox:
    """From the model's thread to the task of one client.

    What a slow client has not fetched is joined, so that it holds no more than the
    answer itself, and the thread never waits.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, whole: bool = False) -> None:
        """Begin empty.

        `whole`: Whether nothing is looked at before the last piece.
        """
        self._whole = whole
        self._loop, self._lock = loop, threading.Lock()
        self._pieces: list[Piece] = []
        self._there = asyncio.Event()
        self.is_gone = False  # Whether the client has gone.

    def put(self, piece: Piece) -> None:
        """Take a piece, in the model's thread."""
        with self._lock:
            tells = piece.is_last if self._whole else not self._pieces
            self._pieces.append(piece)
        if tells and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._there.set)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield what has come, joined, until the last."""
        while True:
            await self._there.wait()
            self._there.clear()
            with self._lock:
                waiting, self._pieces = self._pieces, []
            if not waiting:
                continue
            piece = joined(waiting)
            yield piece
            if piece.is_last:
                return


@dataclass(eq=False)
class Ask:
    """One answer that is asked for."""

    prompt: tuple[int, ...]
    sampling: Sampling  # Within the room behind the prompt.
    seed: int
    limit: int  # Most tokens to write, thinking included.
    verdict: Verdict
    box: Mailbox
    deadline: float  # On the clock of `time.monotonic`.
    began: float = field(default_factory=time.monotonic)
    n_told: int = 0  # Tokens whose scores were told.

    def fresh(self, scored: Scored) -> tuple[Scored, ...]:
        """Return the scores of a token, but none of a place that has some already.

        Where a thinking is ended again, the tokens that ended it are read twice.
        """
        known, self.n_told = self.n_told, max(self.n_told, scored.index + 1)
        return (scored,) if scored.index >= known else ()
