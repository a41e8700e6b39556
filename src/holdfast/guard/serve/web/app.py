"""The routes of the server."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from holdfast.errors import HoldfastError
from holdfast.guard.monitor.monitor import NOT_FINITE, Monitor
from holdfast.guard.serve.asks import Ask, Busy, Mailbox, Verdict
from holdfast.guard.serve.batch import Batcher
from holdfast.guard.serve.chat import (
    Desk,
    Heading,
    Refused,
    completion,
    error_body,
    events,
    refused_by,
)
from holdfast.guard.serve.moderation import (
    AT_ONCE,
    Item,
    Remembered,
    Scores,
    guardrail,
    items,
    moderation,
    result,
)
from holdfast.guard.serve.settings import ServeSettings
from holdfast.guard.serve.telemetry import Metrics, log
from holdfast.guard.serve.upstream import Passage, passed_through, whole_answer
from holdfast.guard.serve.web.gate import Gate
from holdfast.guard.serve.web.shapes import (
    ChatRequest,
    Extension,
    GuardrailRequest,
    ModerationRequest,
    unread,
)
from holdfast.guard.serve.web.streams import (
    Chunks,
    EventStream,
    Json,
    collected,
    listened,
)

LOG = logging.getLogger("holdfast.serve")
GUARDRAIL = "/beta/litellm_basic_guardrail_api"
LATE = 30.0
"""Seconds beyond the timeout after which nobody waits for the model's thread."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}
KINDS = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": words}
    for status, words in {
        400: "What was sent cannot be read, or not be met.",
        401: "No key of this server.",
        413: "The body is too large.",
        415: "The body is no JSON by its type.",
        421: "Another host than this machine was named.",
        429: "No room to wait in, or too many requests in a minute.",
        500: "The model failed at this answer.",
        503: "The server is going down, or its memory does not suffice.",
        504: "The answer took too long.",
    }.items()
}


@dataclass
class Server:
    """What routes share."""

    settings: ServeSettings
    name: str  # Name of the model for clients.
    keys: tuple[bytes, ...]
    desk: Desk
    batcher: Batcher
    monitor: Monitor | None
    metrics: Metrics
    stale: tuple[str, ...] = ()  # What thresholds were not set on.
    passage: Passage | None = None  # The way to an upstream that writes.
    created: int = field(default_factory=lambda: int(time.time()))
    is_ready: bool = False
    n_passing: int = 0  # Answers of an upstream that are on their way.
    remembered: Remembered = field(default_factory=Remembered)

    @property
    def thinks(self) -> bool:
        """Whether the model has a thinking to tell."""
        return self.desk.adapter.thinking is not None

    def require_model(self, asked: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            Refused: If it names one.
        """
        if asked is not None and asked != self.name:
            raise Refused(
                404,
                f"expected the model `{self.name}`; found another. Ask /v1/models.",
                "model_not_found",
            )

    def require_up(self) -> None:
        """Refuse a request that comes when the server goes down.

        Raises:
            Refused: If it does.
        """
        if not (self.is_ready and self.batcher.is_alive):
            raise Refused(503, "the server is going down", "shutdown", 1)

    def watching(self) -> Monitor:
        """Return the monitor.

        Raises:
            Refused: If there is none.
        """
        if self.monitor is None:
            raise Refused(
                400, "expected a server with --guard; this one has none", "no_guard"
            )
        return self.monitor

    def guard_record(self) -> dict[str, Any]:
        """Return what watches: thresholds by detector, and what follows."""
        if self.monitor is None:
            return {"acts_on": None}
        return {
            "acts_on": self.monitor.bundle.acts_on,
            "thresholds": self.monitor.limits,
            "rate": self.monitor.rate,
            "policy": self.settings.policy,
            "on_fault": self.settings.on_fault,
            "stale": list(self.stale),
        }

    async def chat(self, request: ChatRequest) -> Ask:
        """Let an answer be written."""
        self.require_up()
        self.require_model(request.model)
        loop = asyncio.get_running_loop()
        box = Mailbox(loop, whole=not request.stream)
        ask = await self.desk.run(lambda: self.desk.ask(request, box, self.stale))
        try:
            self.batcher.submit(ask)
        except Busy as error:
            raise Refused(429, str(error), "queue_full", 1) from error
        return ask

    def log_text(self, asked: Any, thinking: str, answer: str) -> None:
        """Write what was asked and answered into the log, if that is wanted."""
        if self.settings.log_text:
            log(LOG, "text", messages=asked, thinking=thinking, answer=answer)

    def stream(
        self, chunks: Chunks, asked: Any, ended: Callable[[], None]
    ) -> EventStream:
        """Return the reply to a request for a stream."""
        if self.settings.log_text:
            chunks = listened(chunks, lambda *said: self.log_text(asked, *said))
        return EventStream(chunks, ended, self.settings.client_timeout)

    async def score(self, given: Sequence[Item]) -> list[Scores]:
        """Score answers, a few at a time between steps of the batch."""
        self.require_up()
        monitor, found = self.watching(), []
        for start in range(0, len(given), AT_ONCE):
            part = given[start : start + AT_ONCE]
            read = await self.call(lambda part=part: _scored(monitor, part))  # type: ignore[misc]
            found += read
        faults = sum(each.abstains == NOT_FINITE for each in found)
        if faults:
            on_fault = self.settings.on_fault
            self.metrics.faults.labels(on_fault).inc(faults)
            if on_fault == "closed":
                why = "states of the model are no numbers: an answer was not watched"
                raise Refused(500, why, "fault")
        return found

    async def call(self, reading: Callable[[], Any]) -> Any:
        """Let the model's thread read something, and wait for it.

        Answers that are under way when the server goes down are read to their end.
        """
        try:
            future = asyncio.wrap_future(self.batcher.call(reading))
            async with asyncio.timeout(self.settings.timeout):
                return await future
        except Busy as error:
            raise Refused(429, str(error), "queue_full", 1) from error
        except TimeoutError as error:
            raise Refused(504, "the reading took too long", "timeout") from error
        except HoldfastError as error:
            raise refused_by(error) from error


def _scored(monitor: Monitor, part: Sequence[Item]) -> list[Scores]:
    said = [item for item in part if item.written]
    found = iter(monitor.score_texts([(item.prompt, item.written) for item in said]))
    return [
        Scores.of(next(found) if item.written else [], item.abstains) for item in part
    ]


def build(server: Server) -> ASGIApp:
    """Return the application."""
    app = FastAPI(title="Holdfast guard", version="1", docs_url=None, redoc_url=None)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _failed)
    if server.passage is None:
        _add_answers(app, server)
    else:
        _add_passage(app, server, server.passage)
    _add_scores(app, server)
    _add_state(app, server)
    routes = {getattr(route, "path", "") for route in app.routes}
    return Gate(
        app, server.settings, server.keys, server.metrics, frozenset(routes - {""})
    )


def _add_answers(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions", responses=ERRORS)
    async def chat_completions(
        body: Annotated[ChatRequest, Body()], request: Request
    ) -> Response:
        """Answer a chat, under watch."""
        wanted = body.holdfast or Extension()
        heading = Heading.new(server.name, thinks=server.thinks, steps=wanted.steps)
        ask = await server.chat(body)
        fields = request.scope["state"]["fields"]
        fields |= {"reply": heading.id, "prompt_tokens": len(ask.prompt)}

        asked = [[each.role, each.text] for each in body.messages]

        def ended() -> None:
            ask.box.is_gone = True
            fields.update(_fields(ask.verdict))

        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            first = server.metrics.first
            chunks = events(heading, ask, usage=usage, first=first)
            return server.stream(chunks, asked, ended)
        limit = server.settings.timeout + LATE
        try:
            whole = await collected(ask, request.receive, limit)
        finally:
            ended()
        server.log_text(asked, whole.thinking, whole.answer)
        return Json(completion(heading, ask, whole))


def _add_passage(app: FastAPI, server: Server, passage: Passage) -> None:
    @app.post("/v1/chat/completions", responses=ERRORS)
    async def chat_completions(
        body: Annotated[dict[str, Any], Body()], request: Request
    ) -> Response:
        """Let an upstream answer a chat, under watch."""
        server.require_up()
        most = server.settings.queue + server.batcher.width
        if server.n_passing >= most:
            raise Refused(429, f"{most} answers pass already", "queue_full", 1)
        fields = request.scope["state"]["fields"]
        server.n_passing += 1
        try:
            response, stream = await passage.open(body, server.call)
        except BaseException:
            server.n_passing -= 1
            raise

        def ended() -> None:
            server.n_passing -= 1
            fields.update(_fields(stream.verdict))

        if body.get("stream") is True:
            chunks = passed_through(response, stream)
            return server.stream(chunks, body.get("messages"), ended)
        try:
            whole = await whole_answer(response, stream)
            server.log_text(body.get("messages"), stream.thinking, stream.answer)
            return Json(whole)
        finally:
            ended()


def _fields(verdict: Verdict) -> dict[str, Any]:
    """Return what the log tells of an answer."""
    return {
        "fired": [each["detector"] for each in verdict.fired],
        "action": verdict.action,
        "watched": verdict.watched,
    }


def _add_scores(app: FastAPI, server: Server) -> None:
    @app.post("/v1/moderations", responses=ERRORS)
    async def moderations(body: Annotated[ModerationRequest, Body()]) -> Response:
        """Score answers of anybody."""
        monitor = server.watching()
        given = await server.desk.run(lambda: items(server.desk, body))
        found = await server.score(given)
        results = [result(monitor, each, server.stale) for each in found]
        return Json(moderation(server.name, results))

    @app.post(GUARDRAIL, responses=ERRORS)
    async def litellm_guardrail(
        body: Annotated[GuardrailRequest, Body()],
    ) -> Response:
        """Say what a gateway of LiteLLM is to do with an answer."""
        monitor = server.watching()
        if body.input_type == "request":
            server.remembered.keep(body)
            return Json({"action": "NONE"})
        chats, desk = server.remembered, server.desk
        given = await desk.run(lambda: chats.items(desk, body))
        found = await server.score(given)
        blocks = server.settings.policy != "observe"
        reply = guardrail(monitor, found, blocks=blocks)
        reply["holdfast"]["stale"] = list(server.stale)
        return Json(reply)


def _add_state(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models", responses=ERRORS)
    async def models() -> Response:
        """Name the model, and tell what watches it."""
        told = {"holdfast": server.guard_record()}
        if server.passage is not None:
            return Json(await server.passage.models() | told)
        row = {"id": server.name, "object": "model", "created": server.created}
        listed = {"object": "list", "data": [row | {"owned_by": "holdfast"}]}
        return Json(listed | told)

    @app.get("/healthz")
    async def healthz() -> Response:
        """Say that the process lives."""
        return Json({"status": "ok"})

    @app.get("/readyz", responses={503: {"description": "Not, or no longer."}})
    async def readyz() -> Response:
        """Say whether answers can be asked for."""
        ready = server.is_ready and server.batcher.is_alive
        return Json({"ready": ready}, status_code=200 if ready else 503)

    @app.get("/metrics", responses=ERRORS)
    async def metrics() -> Response:
        """Tell Prometheus."""
        server.metrics.running.set(server.batcher.n_running)
        server.metrics.waiting.set(server.batcher.n_waiting)
        text = generate_latest(server.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    for path, name in PAGE.items():
        app.add_api_route(path, _page(name), include_in_schema=False)


def _page(name: str) -> Callable[[], Any]:
    text = resources.files(__package__).joinpath("page", name).read_bytes()
    if name == "page.css":
        # The look of the report, and the colours of its scale.
        own = resources.files("holdfast.report").joinpath("templates", "style.css")
        text = own.read_bytes() + text
    kind = KINDS[name.rpartition(".")[2]]
    headers = {"content-security-policy": POLICY}

    async def page() -> Response:
        return Response(text, media_type=kind, headers=headers)

    return page


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = unread(error.errors())
    message = "The request cannot be read: " + "; ".join(faults[:8])
    return Json(error_body(400, message, "invalid_request"), status_code=400)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {} if error.after is None else {"retry-after": str(error.after)}
    status = 400 if error.status == 499 else error.status
    return Json(error.body(), status_code=status, headers=headers)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    why = str(error.detail)
    if error.status_code in (404, 405):
        asked = f"{request.method} {request.url.path}"[:200]
        why = f"expected a route of this server; found {asked}. Ask /openapi.json."
    body = error_body(error.status_code, why, "http")
    return Json(body, status_code=error.status_code, headers=error.headers)


async def _failed(_: Request, error: Exception) -> Response:
    LOG.error("a route failed", exc_info=error, extra={"event": "route_failed"})
    body = error_body(500, "the server failed; its log says why", "server_error")
    return Json(body, status_code=500)
