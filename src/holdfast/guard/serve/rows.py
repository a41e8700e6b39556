"""A row that a client waits for: its text as it grows, and its scores.

Text is held back as long as it may still turn out to be the end of the thinking, the
marks that end the answer, or half of a character, so that what was sent, joined, is the
text of the whole row. A token leaves with its own score: what fires is never sent.
"""

from collections import deque
from math import isnan
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.guard.serve.asks import Ask, Finish, Usage
from holdfast.models.decoding.decoder import Decoder
from holdfast.models.decoding.jobs import Job
from holdfast.models.decoding.row_state import (
    Choice,
    Chosen,
    GenerationState,
    sample_token,
)

_BROKEN = "\ufffd"


class Added(NamedTuple):
    """What one token added to the text."""

    thinking: str
    answer: str


NOTHING = Added("", "")


class LiveRow(GenerationState):
    """A row with its client, its watch, and the text that it has sent."""

    def __init__(self, job: Job, ask: Ask, before: int = 0) -> None:
        """Begin a row.

        `before`: Tokens that were written before its prompt ended, where the row goes
        on with an answer that was begun.
        """
        super().__init__(job.place, job.prompt, job.rules)
        self.job, self.ask = job, ask
        self.watch: Any = None  # What is known of it; None where nothing watches.
        self.before = before
        self.fault: str | None = None
        self.is_done = False  # Whether its client has the last piece.
        self.answered = False  # Whether any of its answer was sent.
        self.edited = False  # Whether heads are scaled in what follows the prompt.
        self._closing = False
        fmt, mark = job.rules.thinking, job.rules.answer_end
        lead = "" if fmt is None else fmt.end_template.partition(fmt.close)[0]
        space = mark[: len(mark) - len(mark.lstrip())]
        # What thinking and answer may end in.
        self._ends = (
            _from_anywhere(lead, "" if fmt is None else fmt.close),
            _from_anywhere(space, mark.strip()),
        )
        self._waiting: deque[Added] = deque()
        self.thought_text, self.answer_text = _Text(self), _Text(self)

    def push(self, choice: Choice) -> int:
        """Take the next token; where the logits are no numbers this row ends alone.

        A row that has met a limit reads its last token before it ends, so that this
        one has its score too.
        """
        if self._closing:
            self.finish = "length"
            return 0
        if isnan(choice.gap):
            self.fault = "the model's logits are no numbers"
            self.finish = "length"
            return 0
        token = super().push(choice)
        if self.finish is None and self.written >= self.ask.limit:
            self.finish = "length"
        self._waiting.append(self._added())
        if self.finish == "length" and self.watch is not None:
            self.finish, self._closing = None, True
        return token

    @property
    def written(self) -> int:
        """Tokens that were written for the client so far."""
        return self.before + self.n_written

    @property
    def usage(self) -> Usage:
        """Tokens that were read and written."""
        thinking = 0
        if self._rules.thinking is not None:
            end = len(self.token_ids) if self._template is None else self._template[0]
            thinking = end - self.n_prompt
        thinking = max(thinking, self.before)
        return Usage(self.n_prompt - self.before, self.written, thinking)

    def thought_until(self, index: int) -> tuple[tuple[int, ...], str]:
        """Return prompt and thinking up to a token, and what of its text is unsent.

        `index`: Place of the token behind the prompt.
        """
        end = self.n_prompt + index + 1
        end = end if self._template is None else min(end, self._template[0])
        unsent = sum(len(added.thinking) for added in self._waiting)
        text = self._rules.thought(self.token_ids[self.n_prompt : end])
        return tuple(self.token_ids[:end]), text[self.thought_text.told - unsent :]

    def next_added(self) -> Added:
        """Return the text of the next token that has its score."""
        added = self._waiting.popleft() if self._waiting else NOTHING
        self.answered = self.answered or bool(added.answer)
        return added

    def rest(self) -> Added:
        """Return the text that has not left yet, once the row has ended."""
        thinking = "".join(added.thinking for added in self._waiting)
        answer = "".join(added.answer for added in self._waiting)
        self._waiting.clear()
        whole = self.complete()
        return Added(
            thinking + self.thought_text.left(whole.thinking),
            answer + self.answer_text.left(whole.answer),
        )

    def ended(self) -> Finish:
        """Return how the row ended by itself."""
        return "stop" if self.finish == "stop" else "length"

    def _added(self) -> Added:
        """Return what the last token added to the text that is certain."""
        rules, thinking = self._rules, ""
        if self._template is None:
            text = self.thought_text.grown(self.n_prompt, len(self.token_ids))
            return Added(self.thought_text.sure(text, self._ends[0]), "")
        start, end = self._template
        if not self.thought_text.is_over:
            written = self.token_ids[self.n_prompt : start]
            thinking = self.thought_text.left(rules.thought(written) if written else "")
            self.thought_text.is_over = True
        if not self._settled or self.finish == "stop" or len(self.token_ids) <= end:
            return Added(thinking, "")
        text = self.answer_text.grown(end, len(self.token_ids))
        return Added(thinking, self.answer_text.sure(text, self._ends[1]))


def _from_anywhere(lead: str, mark: str) -> list[str]:
    """Return a mark behind each end of what leads to it, which a model may cut."""
    return [lead[start:] + mark for start in range(len(lead) + 1)] if mark else []


class Running(Decoder):
    """The running batch, in which each row draws in its own way."""

    def choose(self, logits: Float[Tensor, "example vocab"]) -> Chosen:
        """Choose the next token of each row, those that draw alike together."""
        # A row that reads its last token draws nothing any more, and has no number.
        uniforms = self.uniforms[:, min(self.step, self.uniforms.shape[1] - 1)]
        rows: list[Any] = self.rows
        alike: dict[tuple[float, float], list[int]] = {}
        for number, row in enumerate(rows):
            sampling = row.ask.sampling
            kind = sampling.temperature, sampling.top_p
            alike.setdefault(kind, []).append(number)
        if len(alike) == 1:
            return sample_token(logits, uniforms, rows[0].ask.sampling)
        places = [torch.tensor(own, device=logits.device) for own in alike.values()]
        parts = [
            sample_token(logits[at], uniforms[at], rows[int(at[0])].ask.sampling)
            for at in places
        ]
        order = torch.cat(places).argsort()
        columns = zip(*parts, strict=True)
        return Chosen(*(torch.cat(column)[order] for column in columns))


class _Text:
    """The text of one region: how much of it is known, and how much was told."""

    def __init__(self, row: LiveRow) -> None:
        self._row, self._known = row, ""
        self.told = 0  # Characters that were told.
        self._context = self._pending = -1
        self.is_over = False

    def grown(self, start: int, end: int) -> str:
        """Return the text of tokens from `start` up to `end`, whole characters alone.

        A token is decoded behind the last finished part, because some decoders treat
        the first token of a text in another way.
        """
        if self._context < 0:
            self._context = self._pending = start
        ids, decode = self._row.token_ids, self._row._rules.text
        before = decode(ids[self._context : self._pending], special=False)
        text = decode(ids[self._context : end], special=False)
        if not text.endswith(_BROKEN):
            self._known += text[len(before) :]
            self._context, self._pending = self._pending, end
        return self._known

    def sure(self, text: str, ends: list[str]) -> str:
        """Return what is new in a text, but for what may be the begin of an end."""
        most = max(map(len, ends), default=0)
        held = next(
            (
                n
                for n in range(min(most, len(text)), 0, -1)
                if any(mark.startswith(text[len(text) - n :]) for mark in ends)
            ),
            0,
        )
        stop = max(self.told, len(text) - held)
        new, self.told = text[self.told : stop], stop
        return new

    def left(self, whole: str) -> str:
        """Return what of the whole text was not told yet."""
        new, self.told = whole[self.told :], max(self.told, len(whole))
        return new
