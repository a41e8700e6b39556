"""The model that reads an upstream's stream along, and has its own cache of it."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

from holdfast.engines.serving.replies import encode
from holdfast.guard.monitor.monitor import Monitor, TokenScore, Watch
from holdfast.guard.serve.asks import Scored, is_sound
from holdfast.guard.serve.chat import Desk
from holdfast.models.decoding.reader import Reader

OPEN = 2
"""Last tokens of a text that may become others with what follows."""


class Read(NamedTuple):
    """What the sidecar says of a piece."""

    steps: tuple[Scored, ...]  # Tokens that can change no more.
    n_again: int  # Of these, the first were told before, and have become others since.
    last: Scored | None  # The last token so far.
    fired: Scored | None  # The first on which the guard acts.


class Sidecar:
    """The sidecar's view of one stream; used in the model's thread alone."""

    def __init__(self, monitor: Monitor, prompt: Sequence[int], desk: Desk) -> None:
        """Begin behind a prompt, which is read with the first piece."""
        self.monitor, self.prompt = monitor, tuple(prompt)
        self.desk = desk
        self._reader: Reader | None = None
        self._watch: Watch = monitor.open(self.prompt)
        self._ids: tuple[int, ...] = ()  # Tokens that were read for good.
        self._told = 0  # Tokens that clients have scores of.

    def read(self, regions: Sequence[str], *, is_last: bool) -> Read:
        """Read what was added to the text.

        `regions`: The text in regions that are tokenised apart; of all but the last
        one, all is known.
        """
        tokenizer = self.desk.adapter.tokenizer
        done = [token for text in regions[:-1] for token in encode(tokenizer, text)]
        ids = (*done, *encode(tokenizer, regions[-1]))
        reader = self._begun(ids)
        sure = len(ids) if is_last else max(len(done), len(ids) - OPEN)
        sure = max(sure, len(self._ids))
        fresh = ids[len(self._ids) :]
        if not fresh:
            return Read((), 0, None, None)
        if len(self.prompt) + len(ids) > self.desk.adapter.max_positions:
            raise ValueError("the stream is longer than the model here is sound for")
        states = reader.read(fresh)
        if not bool(states.isfinite().all()):
            raise ValueError("states that are no numbers")
        n_sure = sure - len(self._ids)
        read = self.monitor.read_many
        steps = read(self._watch, states[:n_sure], fresh[:n_sure])
        # The tokenizer and rules in it are shared: only what it has counted is copied.
        shared = {id(self.monitor.rules): self.monitor.rules}
        ahead = copy.deepcopy(self._watch, shared)
        more = read(ahead, states[n_sure:], fresh[n_sure:])
        reader.forget_behind(len(self.prompt) + sure)
        n_again = max(0, min(self._told, sure) - len(self._ids))
        self._ids, self._told = ids[:sure], max(self._told, sure)
        every = [_scored(score) for score in (*steps, *more)]
        fired = next((score for score in every if score.acts), None)
        return Read(tuple(every[:n_sure]), n_again, every[-1], fired)

    def _begun(self, ids: Sequence[int]) -> Reader:
        """Return the reader, which has read the prompt and the tokens that are sure."""
        if self._reader is None:
            self._reader = Reader(self.desk.adapter)
            state = self._reader.read(self.prompt)[-1:]
            self.monitor.begin([self._watch], state)
        elif tuple(ids[: len(self._ids)]) != self._ids:
            # What was taken for sure has become other tokens: read again from the
            # prompt on.
            self._reader.forget_behind(len(self.prompt) - 1)
            state = self._reader.read(self.prompt[-1:])
            self._watch, self._ids = self.monitor.open(self.prompt), ()
            self.monitor.begin([self._watch], state)
        return self._reader


def _scored(score: TokenScore) -> Scored:
    if not is_sound(score):
        raise ValueError("scores that are no numbers")
    return Scored(*score)
