"""Rows on their way to a server and back: in rounds, or once as a chat."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from holdfast.data.served import Served
from holdfast.engines.port import Ask
from holdfast.engines.rounds import SEEDS, AskedRow, Round, Said
from holdfast.engines.serving.replies import (
    Sent,
    UnansweredError,
    completion_of_text,
    is_text_of,
    survives,
    tokenised,
    understood,
    within_limits,
)
from holdfast.engines.serving.wire import (
    Speech,
    Wire,
    other_prompt,
)
from holdfast.errors import EngineError
from holdfast.models.decoding.row_state import Completion, Sampling


class Posted(NamedTuple):
    """A question as it is sent."""

    path: str
    body: dict[str, Any]


@dataclass
class CompletedRow:
    """A row that is asked for in rounds, as prompts that go on."""

    speech: Speech
    wire: Wire
    ask: Ask
    row: AskedRow
    sampling: Sampling
    index: int
    apart: bool  # Whether a text is tokenised again region by region.
    asked: Round | None = None

    def next(self) -> Posted | None:
        """Return the next round."""
        self.asked = self.row.next()
        if self.asked is None:
            return None
        sent = self.speech.completion(
            self.wire, self.asked, self.sampling, self.ask.condition
        )
        return Posted(*sent)

    def take(self, sent: Sent) -> None:
        """Replay what was drawn."""
        asked, tokenizer = self.asked, self.speech.adapter.tokenizer
        assert asked is not None
        why = other_prompt(self.speech, self.wire, self.ask, sent, asked)
        if why is not None:
            raise UnansweredError(why)
        text, ids = sent.text or "", sent.token_ids
        if ids is None:
            fmt = self.speech.adapter.thinking
            ids = tokenised(tokenizer, fmt, text, apart=self.apart)
            whole = self.row.tokens != "lost" and survives(tokenizer, text)
            self.row.tokens = "text" if whole else "lost"
        elif not is_text_of(tokenizer, ids, text, asked.stop):
            raise UnansweredError("token ids of another vocabulary than its text")
        finish = sent.finish or ("length" if len(ids) >= asked.limit else "stop")
        try:
            self.row.take(Said(ids, finish))
        except EngineError as error:
            raise UnansweredError(error.found) from error

    def complete(self) -> Completion:
        """Return the row."""
        return self.row.complete()


@dataclass
class ChatRow:
    """A row that is asked for once, as a chat that the server renders itself."""

    speech: Speech
    wire: Wire
    ask: Ask
    sampling: Sampling
    limit: int
    index: int
    apart: bool
    sent: Sent | None = None

    def next(self) -> Posted | None:
        """Return the one question."""
        if self.sent is not None:
            return None
        seed = self.ask.seed % SEEDS
        return Posted(
            *self.speech.chat(self.wire, self.ask, self.sampling, self.limit, seed)
        )

    def take(self, sent: Sent) -> None:
        """Keep what was sent, if it answers the prompt that was meant."""
        adapter = self.speech.adapter
        why = other_prompt(self.speech, self.wire, self.ask, sent)
        if why is not None:
            raise UnansweredError(why)
        if adapter.thinking is None and sent.reasoning:
            raise UnansweredError(
                f"thinking in `{sent.field}`, though the model does not think here"
            )
        self.sent = sent

    def complete(self) -> Completion:
        """Return the row, whose texts are tokenised again."""
        sent, adapter = self.sent, self.speech.adapter
        assert sent is not None
        tokenizer, thinking = adapter.tokenizer, adapter.thinking
        text = understood(
            Served(sent.text, sent.reasoning, sent.field, sent.finish),
            thinking,
            # Thinking that was cut may stand where an answer would: how it ended tells.
            bare_answers=thinking is None or sent.finish != "length",
            place=f"row {self.index}",
        )
        limits = self.sampling.max_thinking, self.sampling.max_answer
        ids = self.ask.token_ids
        whole, text = within_limits(
            text, tokenizer, thinking, ids, limits, apart=self.apart
        )
        return completion_of_text(tokenizer, thinking, whole, text, self.index)


ServedRow = CompletedRow | ChatRow
"""A row on its way: `next` is what to send, `take` takes what came."""
