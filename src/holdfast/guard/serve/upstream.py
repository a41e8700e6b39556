"""In front of another server: its answer passes through, and a model here reads along.

Each piece is read before it is let out. The model here, the sidecar, keeps the keys
and values of one stream and reads what was added, a few tokens at a time. Tokens are
those of the text so far; the last of them may become others with what follows, and are
read again then.
"""

import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import httpx
from pydantic import TypeAdapter, ValidationError

from holdfast.engines.http import HttpClient, Reach
from holdfast.engines.port import Ask as Question
from holdfast.engines.serving.wire import Speech, renders_alike, served_models
from holdfast.errors import EndpointError, HoldfastError
from holdfast.guard.monitor.monitor import Monitor
from holdfast.guard.serve.asks import Scored, Verdict
from holdfast.guard.serve.chat import Desk, Refused, error_body
from holdfast.guard.serve.settings import ServeSettings
from holdfast.guard.serve.sidecar import Sidecar
from holdfast.guard.serve.telemetry import Clock, Metrics
from holdfast.guard.serve.web.shapes import Message, Turns
from holdfast.guard.serve.wire import (
    chunks_of,
    odd_fields,
    parsed,
    sendable,
    unread,
)

CONNECT = 10.0
"""Seconds in which an upstream has to take a connection."""
SHOWN = 1 << 16
"""Bytes of an upstream's refusal that are handed on."""
_MESSAGES = TypeAdapter(list[Message])
_SHAPE = ("id", "object", "created", "model", "system_fingerprint")
"""What of a reply is no part of its answer."""
Call = Callable[[Callable[[], Any]], Awaitable[Any]]


def check_upstream(settings: ServeSettings, desk: Desk) -> str:
    """See that a server is there, and renders chats as the model here does.

    Returns: What is known of its template: `the same`, or `not compared` where the
    server has no route that tells.

    Raises:
        EndpointError: If it is not there.
        EngineError: If it renders a chat in another way.
    """
    assert settings.upstream is not None
    reach = Reach(settings.upstream, settings.upstream_key_env, 1, CONNECT, 2)
    http = HttpClient(reach)
    try:
        names = served_models(http)
    except EndpointError as error:
        # Nothing was drawn that could be kept, as where answers are collected.
        raise EndpointError(
            error.expected,
            error.found,
            "See that it is up and that --upstream names it, then start again.",
        ) from error
    if not names:
        raise EndpointError(
            f"the models of a server at {settings.upstream}",
            "none that it tells",
            "See that the URL ends in /v1, and put its key into "
            f"{settings.upstream_key_env}.",
        )
    said = ({"role": "user", "content": "Hello."},)
    alike = renders_alike(Speech(http, names[0], desk.adapter), Question((), 0, said))
    return "the same" if alike else "not compared"


class Stream:
    """One answer of an upstream on its way through."""

    def __init__(
        self,
        settings: ServeSettings,
        desk: Desk,
        metrics: Metrics,
        call: Call,
        sidecar: Sidecar | None,
        verdict: Verdict,
    ) -> None:
        """Begin before the first piece.

        `call`: Lets the model's thread do something.
        `sidecar`: None where the chat cannot be read, and answers pass unwatched.
        """
        self.settings, self.desk, self.metrics = settings, desk, metrics
        self.call, self.sidecar, self.verdict = call, sidecar, verdict
        self.fmt = desk.adapter.thinking
        self.thinking, self.answer = "", ""
        self.apart = False  # Whether thinking comes in a field of its own.
        self.is_over = False  # Whether nothing is let out any more.
        self._has_fired = False  # What fires may be read again, and is one answer.

    def regions(self, *, is_last: bool) -> list[str]:
        """Return the text so far, in regions that are tokenised apart."""
        if self.fmt is None:
            return [self.thinking + self.answer]
        if not self.apart:
            # The thinking stands in the text, with what ends it.
            text = self.answer.removeprefix(self.fmt.open_template)
            before, closed, behind = text.partition(self.fmt.end_template)
            return [before, self.fmt.end_template, behind] if closed else [text]
        thought = self.thinking.strip("\n")
        if not self.answer and not is_last:
            return [thought]
        if not self.answer:
            return [self.thinking.lstrip("\n")]
        return [thought, self.fmt.end_template, self.answer.lstrip("\n")]

    async def watch(self, delta: dict[str, Any], *, is_last: bool) -> list[Scored]:
        """Take what a chunk adds; return the tokens that were read for good."""
        thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
        said = delta.get("content") or ""
        if self.sidecar is None:
            return []
        if odd := unread(delta):
            self._fault(f"a part that is not read along: {', '.join(odd)}")
            return []
        self.apart = self.apart or bool(thought)
        self.thinking += thought
        self.answer += said
        if not (thought or said or is_last) or not (self.thinking or self.answer):
            return []
        regions = self.regions(is_last=is_last)
        clock, sidecar = Clock(), self.sidecar
        try:
            read = await self.call(lambda: sidecar.read(regions, is_last=is_last))
        except Exception as error:  # Whatever it is, the answer was not watched.
            self._fault(str(error))
            return []
        self.metrics.chunk.observe(clock.seconds())
        self.metrics.tokens.labels("read").inc(len(read.steps))
        for step in read.steps:
            self.verdict.take(step)
        if read.last is not None and read.last not in read.steps:
            self.verdict.take(read.last)
        if read.fired is not None:
            self._fire(read.fired)
        return list(read.steps[read.n_again :])

    def _fire(self, scored: Scored) -> None:
        """Do what the policy says."""
        policy = self.settings.policy
        if self._has_fired:
            return
        self._has_fired = True
        self.metrics.fired.labels(policy, scored.channel).inc()
        if policy == "observe":
            return
        self.verdict.action = "refused" if policy == "refuse" else "stopped"
        self.is_over = True

    def _fault(self, why: str) -> None:
        """Deal with an answer that cannot be watched."""
        self.verdict.watched, self.verdict.fault = False, why
        self.metrics.faults.labels(self.settings.on_fault).inc()
        self.sidecar = None
        if self.settings.on_fault == "closed":
            self.verdict.action, self.is_over = "stopped", True


class Passage:
    """The way through to an upstream."""

    def __init__(
        self,
        settings: ServeSettings,
        desk: Desk,
        monitor: Monitor,
        metrics: Metrics,
        stale: tuple[str, ...],
    ) -> None:
        """Prepare the way; nothing is asked yet."""
        self.settings, self.desk, self.monitor = settings, desk, monitor
        self.metrics, self.stale = metrics, stale
        key = os.environ.get(settings.upstream_key_env, "")
        self.client = httpx.AsyncClient(
            base_url=str(settings.upstream).rstrip("/"),
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(settings.timeout, connect=CONNECT),
            limits=httpx.Limits(max_connections=None),
        )

    async def models(self) -> dict[str, Any]:
        """Return the models of the upstream.

        Raises:
            Refused: If it cannot be reached, or says no.
        """
        request = self.client.build_request("GET", "/models")
        response = await self._send(request)
        try:
            return dict(parsed(await response.aread()))
        except (httpx.HTTPError, ValueError, TypeError) as error:
            raise Refused(502, "the upstream told no models", "upstream") from error
        finally:
            await response.aclose()

    async def open(
        self, body: dict[str, Any], call: Call
    ) -> tuple[httpx.Response, Stream]:
        """Ask an upstream for an answer that is watched.

        Raises:
            Refused: If the chat cannot be read here, and answers that cannot be
                watched are not let through; or the upstream says no.
        """
        if not isinstance(body.get("stream"), bool | None) or not sendable(body):
            why = "expected JSON with `stream` true or false, and text and numbers"
            raise Refused(400, f"{why} that are some", "invalid_request")
        acts_on = self.monitor.bundle.acts_on
        verdict = Verdict(self.settings.policy, True, stale=self.stale, acts_on=acts_on)
        sidecar = await self._sidecar(body, verdict)
        request = self.client.build_request("POST", "/chat/completions", json=body)
        response = await self._send(request)
        settings, metrics = self.settings, self.metrics
        return response, Stream(settings, self.desk, metrics, call, sidecar, verdict)

    async def _sidecar(self, body: dict[str, Any], verdict: Verdict) -> Sidecar | None:
        """Return who reads along behind the chat of a request."""
        try:
            if body.get("n") not in (None, 1):
                why = "expected one answer to watch; found another `n`. Ask for one."
                raise Refused(400, why, "not_watched")
            if odd := odd_fields(body):
                why = (
                    "expected a chat as it is, which the model here can read along; "
                    f"found {', '.join(odd)}. Leave it out."
                )
                raise Refused(400, why, "not_watched")
            given = _MESSAGES.validate_python(body.get("messages"))
            turns, texts = Turns(given), [each.text for each in given]
            if turns.answer is not None:
                raise Refused(400, "expected a chat that ends with the user", "order")
            desk, rows = self.desk, body["messages"]
            if not await desk.run(lambda: desk.leaves_out(rows, texts)):
                why = (
                    "expected messages of which a template takes role and text alone; "
                    "found more that it takes. Leave it out."
                )
                raise Refused(400, why, "not_watched")
            prompt = await desk.run(lambda: desk.prompt(turns))
            most = desk.adapter.max_positions - 1
            if len(prompt) > most:
                why = (
                    f"expected a chat of up to {most} tokens, which the model here "
                    f"reads; found {len(prompt)}. Shorten it."
                )
                raise Refused(400, why, "not_watched")
        except (Refused, ValidationError, HoldfastError) as error:
            if self.settings.on_fault == "closed":
                if isinstance(error, Refused):
                    raise
                why = "expected messages of text, of user and assistant in turn"
                raise Refused(400, why, "not_watched") from error
            verdict.watched, verdict.fault = False, "the chat cannot be read here"
            self.metrics.faults.labels("open").inc()
            return None
        return Sidecar(self.monitor, prompt, self.desk)

    async def _send(self, request: httpx.Request) -> httpx.Response:
        """Send a request; return the response, which is read then."""
        try:
            response = await self.client.send(request, stream=True)
        except httpx.HTTPError as error:
            self.metrics.upstream.labels("unreachable").inc()
            why = f"the upstream cannot be reached: {type(error).__name__}"
            raise Refused(502, why, "upstream") from error
        if response.status_code == 200:
            return response
        self.metrics.upstream.labels(str(response.status_code)).inc()
        try:
            said = (await response.aread())[:SHOWN].decode("utf-8", "replace")
        except httpx.HTTPError:
            said = ""
        finally:
            await response.aclose()
        status = response.status_code if response.status_code >= 400 else 502
        raise Refused(status, f"the upstream said: {_words(said)}", "upstream")


def _words(said: str) -> str:
    """Return the words of an upstream's error, out of the JSON that they come in."""
    try:
        return str(parsed(said.encode())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return said


async def passed_through(
    response: httpx.Response, stream: Stream
) -> AsyncGenerator[dict[str, Any] | None]:
    """Yield the chunks of an upstream, each once it has been read along.

    A stream that is stopped closes the upstream's connection, so that it writes no
    further.
    """
    ended, shape = False, dict[str, Any]()
    try:
        async for chunk in chunks_of(response):
            choices = chunk.get("choices") if chunk else None
            if chunk is not None and chunk.get("error"):
                stream.metrics.upstream.labels("error").inc()
                told = {"verdict": stream.verdict.record()}
                yield {"error": chunk["error"], "holdfast": told}
                return
            if chunk is None or not choices:
                yield chunk
                continue
            [choice] = choices
            if choice.get("index", 0) != 0:
                raise ValueError("not one answer")
            shape, finish = chunk, choice.get("finish_reason")
            ended = ended or finish is not None
            delta = choice.get("delta") or {}
            steps = await stream.watch(delta, is_last=finish is not None)
            if stream.is_over:
                break
            said: dict[str, Any] = {"steps": [step.record() for step in steps]}
            if finish is not None:
                said["verdict"] = stream.verdict.record()
            yield chunk | {"holdfast": said}
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield _broken(stream, f"the upstream broke off: {type(error).__name__}")
        return
    finally:
        await response.aclose()
    if stream.is_over:
        yield _final(shape, stream)
    elif not ended:
        yield _broken(stream, "the upstream ended without saying how")


def _broken(stream: Stream, why: str) -> dict[str, Any]:
    stream.metrics.upstream.labels("broke off").inc()
    verdict = stream.verdict.record()
    return error_body(502, why, "upstream") | {"holdfast": {"verdict": verdict}}


def _final(shape: dict[str, Any], stream: Stream) -> dict[str, Any]:
    """Return the last chunk of an answer that was stopped."""
    delta = {}
    if stream.verdict.action == "refused":
        gap = "\n\n" if stream.answer else ""
        delta = {"content": gap + stream.settings.refusal}
    choice = {"index": 0, "delta": delta, "finish_reason": "content_filter"}
    said = {"holdfast": {"verdict": stream.verdict.record()}}
    # What else the chunk that fired has may spell out its text.
    return {name: shape[name] for name in _SHAPE if name in shape} | {
        "choices": [choice],
        **said,
    }


async def whole_answer(response: httpx.Response, stream: Stream) -> dict[str, Any]:
    """Return an answer that an upstream sent whole, read along and cut where it fired.

    Raises:
        Refused: If it broke off.
    """
    try:
        body = parsed(await response.aread())
        choice = body["choices"][0]
        message = choice["message"]
        if len(body["choices"]) != 1 or not isinstance(message, dict):
            raise ValueError("not one answer")
    except (httpx.HTTPError, ValueError, KeyError, TypeError, IndexError) as error:
        stream.metrics.upstream.labels("broke off").inc()
        why = f"the upstream broke off: {type(error).__name__}"
        raise Refused(502, why, "upstream") from error
    finally:
        await response.aclose()
    steps = await stream.watch(message, is_last=True)
    if stream.is_over:
        refused = stream.verdict.action == "refused"
        said = stream.settings.refusal if refused else ""
        # Nothing of it was let out yet, and nothing is: not what is beside the text
        # either, since probabilities of tokens spell it out.
        message = {"role": "assistant", "content": said}
        choice = {"index": 0, "message": message, "finish_reason": "content_filter"}
        body = {name: body[name] for name in _SHAPE if name in body}
        body["choices"] = [choice]
    verdict = stream.verdict.record()
    steps = [] if stream.is_over else steps
    return dict(body) | {
        "holdfast": {"verdict": verdict, "steps": [step.record() for step in steps]}
    }
