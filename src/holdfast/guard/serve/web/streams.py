"""Replies on their way to a client that may be slow, or leave."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from holdfast.guard.serve.asks import Ask, Piece, joined
from holdfast.guard.serve.chat import STATUS, Refused, encoded
from holdfast.guard.serve.telemetry import log

LOG = logging.getLogger("holdfast.serve")

Chunks = AsyncGenerator[dict[str, Any] | None]
"""What a stream consists of; None where it only says that it is there."""


class Json(Response):
    """A JSON body in ASCII, which half of a surrogate pair fits in as well."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json.dumps(content, allow_nan=False).encode()


class EventStream(Response):
    """A stream of events, until it ends, its client goes, or takes too long."""

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: Chunks,
        gone: Callable[[], None],
        patience: float,
    ) -> None:
        """Prepare the stream.

        `gone`: Called when nobody takes what comes any more.
        `patience`: Seconds that a client may take to take one chunk.
        """
        super().__init__()
        del self.headers["content-length"]
        self.chunks, self.gone, self.patience = chunks, gone, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(left(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.gone()
            for task in (writing, leaving):
                task.cancel()
            [failed, _] = await asyncio.gather(writing, leaving, return_exceptions=True)
        if isinstance(failed, TimeoutError):
            log(LOG, "slow_client", seconds=self.patience)
        elif isinstance(failed, Exception):
            LOG.error("a stream failed", exc_info=failed, extra={"event": "stream"})

    async def _write(self, send: Send) -> None:
        headers = [*self.raw_headers, (b"x-accel-buffering", b"no")]
        start = {"type": "http.response.start", "status": 200, "headers": headers}
        await send(start)
        done = False
        # Closed at once, since whoever is behind it waits for that.
        async with aclosing(self.chunks) as chunks:
            async for chunk in chunks:
                done = done or bool(chunk and chunk.get("error"))
                await self._put(send, encoded(chunk), more=True)
        end = b"" if done else b"data: [DONE]\n\n"
        await self._put(send, end, more=False)

    async def _put(self, send: Send, body: bytes, *, more: bool) -> None:
        message = {"type": "http.response.body", "body": body, "more_body": more}
        async with asyncio.timeout(self.patience):
            await send(message)


async def listened(chunks: Chunks, tell: Callable[[str, str], None]) -> Chunks:
    """Pass chunks on, and tell at the end what was thought and said in them."""
    thinking, answer = [], []
    async with aclosing(chunks) as passing:
        try:
            async for chunk in passing:
                for choice in (chunk or {}).get("choices", ()):
                    delta = choice.get("delta") or {}
                    thought = delta.get("reasoning_content") or delta.get("reasoning")
                    thinking.append(thought or "")
                    answer.append(delta.get("content") or "")
                yield chunk
        finally:
            tell("".join(thinking), "".join(answer))


async def left(receive: Receive) -> None:
    """Return once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def collected(ask: Ask, receive: Receive, limit: float) -> Piece:
    """Return all pieces of an answer as one.

    Raises:
        Refused: If the client has gone, or there is no answer.
    """

    async def collect() -> Piece:
        return joined([piece async for piece in ask.box.pieces()])

    reading = asyncio.ensure_future(collect())
    leaving = asyncio.ensure_future(left(receive))
    try:
        await asyncio.wait(
            {reading, leaving}, timeout=limit, return_when=asyncio.FIRST_COMPLETED
        )
        if not reading.done():
            gone = leaving.done()
            raise Refused(
                499 if gone else 504,
                "the client left" if gone else "the answer took too long",
                "gone" if gone else "timeout",
            )
        whole = reading.result()
    finally:
        ask.box.is_gone = True
        reading.cancel()
        leaving.cancel()
    if whole.failure is not None:
        raise Refused(STATUS[whole.failure], whole.why, whole.failure)
    return whole
