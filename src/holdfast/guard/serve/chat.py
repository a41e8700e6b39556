"""`/v1/chat/completions`: from a request to an ask, and from pieces to a reply."""

import asyncio
import copy
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from prometheus_client import Histogram

from holdfast.data.chat.rendering import render
from holdfast.data.chat.template import prompt_token_ids
from holdfast.errors import HoldfastError, InputError
from holdfast.guard.monitor.bundle import require_match, serving_of
from holdfast.guard.monitor.monitor import Monitor
from holdfast.guard.serve.asks import Ask, Failure, Mailbox, Piece, Verdict
from holdfast.guard.serve.settings import ServeSettings
from holdfast.guard.serve.web.shapes import ChatRequest, Extension, Turns
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.model import Adapter

T = TypeVar("T")
SEEDS = 1 << 63
ALIVE = 10.0
"""Seconds of silence after which a stream says that it is still there."""
STATUS: dict[Failure, int] = {
    "timeout": 504,
    "shutdown": 503,
    "memory": 503,
    "fault": 500,
}


class Refused(Exception):
    """A request that gets an error in place of an answer."""

    def __init__(
        self, status: int, message: str, code: str, after: int | None = None
    ) -> None:
        """Keep what the reply says; `after`: seconds after which to ask again."""
        super().__init__(message)
        self.status, self.code, self.after = status, code, after

    def body(self) -> dict[str, Any]:
        """Return the body of the reply, as OpenAI's clients read it."""
        return error_body(self.status, str(self), self.code)


def error_body(status: int, message: str, code: str) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    usual = "invalid_request_error" if status < 500 else "server_error"
    kind = kinds.get(status, usual)
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def refused_by(error: HoldfastError) -> Refused:
    """Return the reply to a request that cannot be met."""
    known = isinstance(error, InputError)
    return Refused(400 if known else 500, str(error), "invalid_request")


class Desk:
    """Where requests become tokens, beside the model's thread.

    It has a tokenizer of its own, since one that two threads use may fail in both.
    """

    def __init__(
        self, adapter: Adapter, monitor: Monitor | None, settings: ServeSettings
    ) -> None:
        """Take what every request needs."""
        self.adapter, self.monitor, self.settings = adapter, monitor, settings
        self.tokenizer = copy.deepcopy(adapter.tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="desk")
        fmt = adapter.thinking
        template = "" if fmt is None else fmt.end_template
        self.n_template = len(
            self.tokenizer(template, add_special_tokens=False)["input_ids"]
            if template
            else ()
        )
        serving = None if monitor is None else monitor.bundle.serving
        self.temperature = serving.temperature if serving else 0.0
        self.top_p = serving.top_p if serving else 1.0

    async def run(self, work: Callable[[], T]) -> T:
        """Do work of the tokenizer, off the event loop.

        Raises:
            Refused: If a request cannot be met.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, work)
        except HoldfastError as error:
            raise refused_by(error) from error

    def prompt(self, turns: Turns) -> tuple[int, ...]:
        """Return the tokens of a chat up to where the model goes on."""
        return prompt_token_ids(
            self.tokenizer,
            turns.asked,
            system_prompt=turns.system,
            thinking=self.adapter.thinking,
            earlier=turns.earlier,
        )

    def leaves_out(self, messages: Sequence[dict[str, Any]], texts: list[str]) -> bool:
        """Return whether the template takes nothing of messages but role and text.

        `texts`: The text of each.
        """
        pairs = list(zip(messages, texts, strict=True))
        whole = [{**message, "content": text} for message, text in pairs]
        plain = [{"role": each["role"], "content": text} for each, text in pairs]
        if whole == plain:
            return True
        return render(self.tokenizer, whole) == render(self.tokenizer, plain)

    def ask(self, request: ChatRequest, box: Mailbox, stale: tuple[str, ...]) -> Ask:
        """Return what a request asks for.

        Raises:
            Refused: If the chat leaves no room for an answer.
            InputError: If the template does not take it.
        """
        turns = Turns(request.messages)
        if turns.answer is not None:
            raise InputError(
                "a chat that ends with the user",
                "one that ends with the assistant",
                "Leave the last message out; answers are not gone on with.",
            )
        prompt = self.prompt(turns)
        wanted = request.holdfast or Extension()
        sampling = self._sampling(request, wanted, len(prompt))
        room = self.adapter.max_positions - len(prompt)
        seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed
        settings = self.settings
        return Ask(
            prompt,
            sampling,
            seed,
            min(request.limit or room, room),
            Verdict(
                settings.policy if self.monitor is not None else None,
                self.monitor is not None,
                stale=(*stale, *self._stale(sampling)),
                acts_on=None if self.monitor is None else self.monitor.bundle.acts_on,
            ),
            box,
            time.monotonic() + settings.timeout,
        )

    def _stale(self, sampling: Sampling) -> list[str]:
        """Return what of a request thresholds were not set on."""
        if self.monitor is None:
            return []
        drawn = float(sampling.temperature), float(sampling.top_p)
        if drawn == (self.temperature, self.top_p):
            return []
        own = serving_of(self.adapter, *drawn)
        usual = serving_of(self.adapter, self.temperature, self.top_p)
        bundle = self.monitor.bundle
        known = require_match(bundle, self.adapter, usual)
        found = require_match(bundle, self.adapter, own)
        return [each for each in found if each not in known]

    def _sampling(
        self, request: ChatRequest, wanted: Extension, n_prompt: int
    ) -> Sampling:
        """Return how a request is drawn, within the room behind its prompt.

        Where thinking and answer do not both fit, the answer has half of the room.
        """
        room = self.adapter.max_positions - n_prompt - self.n_template
        thinks = self.adapter.thinking is not None
        if room < 1 + thinks:
            most = self.adapter.max_positions - self.n_template - 1 - thinks
            raise Refused(
                400,
                f"expected a chat of up to {most} tokens, which leaves room for an "
                f"answer; found {n_prompt}. Shorten it.",
                "context_length_exceeded",
            )
        limits = self.settings
        answer = min(limits.max_answer, max(1, room // 2) if thinks else room)
        thinking = limits.max_thinking
        if wanted.max_thinking is not None:
            thinking = min(thinking, wanted.max_thinking)
        heat, top_p = request.temperature, request.top_p
        return Sampling(
            temperature=self.temperature if heat is None else heat,
            top_p=self.top_p if top_p is None else top_p,
            max_thinking=min(thinking, room - answer) if thinks else 0,
            max_answer=answer,
        )


class Heading(NamedTuple):
    """What every part of one reply begins with."""

    name: str  # Name of the model.
    thinks: bool  # Whether it has a thinking to tell.
    steps: bool  # Whether scores of tokens are told.
    id: str
    created: int

    @classmethod
    def new(cls, name: str, *, thinks: bool, steps: bool) -> "Heading":
        """Return the heading of a new reply."""
        own = f"chatcmpl-{secrets.token_hex(12)}"
        return cls(name, thinks, steps, own, int(time.time()))

    def chunk(
        self, delta: dict[str, Any], finish: str | None = None, **more: Any
    ) -> dict[str, Any]:
        """Return one chunk of a stream."""
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.name,
            "choices": [
                {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
            ],
            **more,
        }


def completion(heading: Heading, ask: Ask, whole: Piece) -> dict[str, Any]:
    """Return the reply to a request that did not ask for a stream."""
    answer = whole.answer if whole.refusal is None else whole.refusal
    message: dict[str, Any] = {"role": "assistant", "content": answer}
    message["refusal"] = whole.refusal
    if heading.thinks:
        message |= {"reasoning_content": whole.thinking, "reasoning": whole.thinking}
    said: dict[str, Any] = {"verdict": ask.verdict.record(), "seed": ask.seed}
    if heading.steps:
        said["steps"] = [each.record() for each in whole.steps]
    return {
        "id": heading.id,
        "object": "chat.completion",
        "created": heading.created,
        "model": heading.name,
        "choices": [
            {
                "index": 0,
                "message": message,
                "finish_reason": whole.finish,
                "logprobs": None,
            }
        ],
        "usage": whole.usage.record() if whole.usage else None,
        "holdfast": said,
    }


async def events(
    heading: Heading, ask: Ask, *, usage: bool, first: Histogram
) -> AsyncGenerator[dict[str, Any] | None]:
    """Yield the chunks of a stream; None where it only says that it is there.

    `first`: Told of the seconds to the first piece.
    """
    yield heading.chunk({"role": "assistant", "content": ""})
    pieces = ask.box.pieces()
    following = asyncio.ensure_future(anext(pieces))
    begun = sent = False
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=ALIVE)
            if not done:
                yield None
                continue
            piece = following.result()
            if not begun:
                first.observe(time.monotonic() - ask.began)
                begun = True
            for chunk in _chunks(heading, ask, piece, sent=sent):
                yield chunk
            sent = sent or bool(piece.answer)
            if piece.is_last:
                break
            following = asyncio.ensure_future(anext(pieces))
    finally:
        following.cancel()
    if usage and piece.usage is not None and piece.failure is None:
        yield heading.chunk({}, usage=piece.usage.record()) | {"choices": []}


def _chunks(
    heading: Heading, ask: Ask, piece: Piece, *, sent: bool
) -> list[dict[str, Any]]:
    """Return the chunks of a piece: what was thought, what was said, how it ended.

    `sent`: Whether some of the answer was sent before.
    """
    delta: dict[str, Any] = {}
    if piece.thinking and heading.thinks:
        delta |= {"reasoning_content": piece.thinking, "reasoning": piece.thinking}
    answer = piece.answer
    if piece.refusal is not None:
        answer += ("\n\n" if sent or answer else "") + piece.refusal
    if answer:
        delta["content"] = answer
    steps = [each.record() for each in piece.steps] if heading.steps else []
    chunks = []
    if delta or steps:
        more: dict[str, Any] = {"holdfast": {"steps": steps}} if steps else {}
        chunks.append(heading.chunk(delta) | more)
    if piece.failure is not None:
        status = STATUS[piece.failure]
        told = error_body(status, piece.why, piece.failure)
        chunks.append(told | {"holdfast": {"verdict": ask.verdict.record()}})
    elif piece.finish is not None:
        said = {"verdict": ask.verdict.record(), "seed": ask.seed}
        chunks.append(heading.chunk({}, piece.finish, holdfast=said))
    return chunks


def encoded(chunk: dict[str, Any] | None) -> bytes:
    """Return a chunk as a server-sent event."""
    if chunk is None:
        return b": still here\n\n"
    return f"data: {json.dumps(chunk, allow_nan=False)}\n\n".encode()
