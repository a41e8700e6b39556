"""What every request passes before it is read: who asks, how much, how often.

A body is taken in whole and within its limit, then handed on, so that nothing behind
this has to count bytes.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holdfast.errors import InputError, SettingsError
from holdfast.guard.serve.chat import Refused
from holdfast.guard.serve.settings import KEYS_ENV, ServeSettings
from holdfast.guard.serve.telemetry import Clock, Metrics, log

LOG = logging.getLogger("holdfast.serve")
OPEN = ("/healthz", "/readyz", "/", "/page.js", "/page.css")
"""Routes without a key: they tell nothing but that the server is there."""
DRAINED = 1 << 25
"""Bytes of a body that is too large that are still taken in, so that its sender reads
why; beyond that the connection is closed."""
KNOWN = 10_000
"""Askers whose rate is remembered."""
LEAST_KEY = 16


def read_keys(settings: ServeSettings) -> tuple[bytes, ...]:
    """Return the hashes of the API keys, and refuse to be reached without any.

    Raises:
        InputError: If the file cannot be read, or a key is too short to be one.
        SettingsError: If others than this machine would reach the server without.
    """
    said = os.environ.get(KEYS_ENV, "")
    if settings.key_file is not None:
        said += "\n" + _file(settings.key_file)
    keys = [key for key in re.split(r"[\s,]+", said) if key]
    for key in keys:
        if len(key) < LEAST_KEY or not key.isascii():
            raise InputError(
                f"API keys of {LEAST_KEY} ASCII characters or more",
                f"one of {len(key)}",
                'Make one with `python -c "import secrets; '
                'print(secrets.token_urlsafe(32))"`.',
            )
    if not keys and not settings.is_local:
        raise SettingsError(
            "API keys, since others than this machine reach the server",
            f"none for --host {settings.host}",
            f"Put them into the variable {KEYS_ENV} or a --key-file, or leave --host "
            "out to listen on loopback alone.",
        )
    return tuple(map(_hash, keys))


def _file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(
            f"a file of API keys at {path}", str(error), "Check --key-file."
        ) from error


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Gate:
    """The first of the server to see a request, and the last to see its reply."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServeSettings,
        keys: tuple[bytes, ...],
        metrics: Metrics,
        routes: frozenset[str],
    ) -> None:
        """Stand before an application; `routes` are those that metrics name."""
        self.app, self.settings, self.keys = app, settings, keys
        self.metrics, self.routes = metrics, routes
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or say why not."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        clock, own = Clock(), _Reply(send, f"req-{secrets.token_hex(8)}")
        scope.setdefault("state", {})["fields"] = own.fields
        path = scope["path"] if scope["path"] in self.routes else "other"
        try:
            self._check(scope, own)
            body = await self._body(scope, receive)
            await self.app(scope, _replayed(body, receive), own.send)
        except Refused as error:
            self.metrics.refused.labels(error.code).inc()
            await own.refuse(error)
        finally:
            seconds = clock.seconds()
            self.metrics.requests.labels(path, own.status or "none").inc()
            self.metrics.latency.labels(path).observe(seconds)
            log(
                LOG,
                "request",
                id=own.id,
                method=scope["method"],
                path=path,
                status=own.status,
                ms=round(1000 * seconds, 2),
                **own.fields,
            )

    def _check(self, scope: Scope, own: "_Reply") -> None:
        headers = {
            name.lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        asker = scope["client"][0] if scope.get("client") else "local"
        if not self.keys and not _is_loopback(headers.get(b"host", "")):
            # A page that gives its own name this address would speak as its reader.
            raise Refused(
                421,
                "expected this machine's own name as host, such as localhost; found "
                "another. Ask for that, or start the server with API keys.",
                "host",
            )
        if scope["path"] in OPEN:
            return
        if self.keys:
            asker = self._key(headers)
            own.fields["key"] = asker
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                # No other page in a browser may send this without being asked first.
                raise Refused(
                    415,
                    "expected a body of the type application/json; found "
                    f"{kind[:80] or 'none'}. Send `Content-Type: application/json`.",
                    "content_type",
                )
        self._limit(asker)

    def _key(self, headers: dict[bytes, str]) -> str:
        """Return the name of the key that was sent: the begin of its hash."""
        bearer = headers.get(b"authorization", "")
        sent = bearer[7:] if bearer[:7].lower() == "bearer " else ""
        own = _hash(sent.strip() or headers.get(b"x-api-key", ""))
        # All are compared, each in constant time, so that time tells nothing.
        fits = [hmac.compare_digest(own, key) for key in self.keys]
        if not any(fits):
            raise Refused(
                401,
                "expected an API key of this server; found "
                f"{'another' if sent or b'x-api-key' in headers else 'none'}. Send it "
                "as `Authorization: Bearer KEY`.",
                "invalid_api_key",
            )
        return own.hex()[:8]

    def _limit(self, asker: str) -> None:
        """Take one from the bucket of whoever asks."""
        most = self.settings.requests_per_minute
        if not most:
            return
        now = time.monotonic()
        left, then = self._buckets.pop(asker, (float(most), now))
        left = min(float(most), left + (now - then) * most / 60)
        # Rounding must not keep out who comes at the time that was told.
        let_in = left > 1 - 1e-9
        self._buckets[asker] = (left - let_in, now)
        while len(self._buckets) > KNOWN:
            self._buckets.popitem(last=False)
        if not let_in:
            seconds = math.ceil((1 - left) * 60 / most)
            raise Refused(
                429,
                f"expected at most {most} requests in a minute; found more. Wait "
                f"{seconds} s.",
                "rate_limit",
                seconds,
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Take in the whole body, or refuse it."""
        most, parts, size = self.settings.max_body, [], 0
        try:
            async with asyncio.timeout(self.settings.client_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the client left", "gone")
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= most:
                        parts.append(part)
                    if not message.get("more_body") or size > DRAINED:
                        break
        except TimeoutError as error:
            raise Refused(408, "the body did not come in time", "timeout") from error
        if size > most:
            raise Refused(
                413,
                f"expected a body of up to {most} bytes; found more. Shorten it, or "
                "start the server with a higher --max-body.",
                "too_large",
            )
        return b"".join(parts)


def _is_loopback(host: str) -> bool:
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    name = name.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return what hands a body on once, and then what the client does."""
    handed = False

    async def replay() -> Message:
        nonlocal handed
        if handed:
            return await receive()
        handed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class _Reply:
    """A reply on its way: its status, and headers that every one has."""

    def __init__(self, send: Send, own: str) -> None:
        self._send, self.id, self.status = send, own, 0
        self.fields: dict[str, Any] = {}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = ((b"x-request-id", self.id.encode()), *HEADERS)
            message = {**message, "headers": [*message.get("headers", ()), *own]}
        await self._send(message)

    async def refuse(self, error: Refused) -> None:
        if self.status:
            return
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if error.after is not None:
            headers.append((b"retry-after", str(error.after).encode()))
        start = {"type": "http.response.start", "status": error.status}
        await self.send({**start, "headers": headers})
        body = json.dumps(error.body()).encode()
        await self.send({"type": "http.response.body", "body": body})


HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
)
