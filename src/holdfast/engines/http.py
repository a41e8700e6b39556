"""A patient HTTP client of a server that answers with models: it waits and asks again.

Judges and engines ask through it. The key is in no record and in no message.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from holdfast.data.served import whole
from holdfast.errors import EndpointError, SettingsError

PATIENCE = frozenset({408, 409, 425, 429})
"""Statuses below 500 that pass with time."""
LONGEST_WAIT = 60.0
"""Seconds that we wait at the most, also where a server asks for more."""
_SHOWN = 300
T = TypeVar("T")


class Stopped(EndpointError):
    """Another question failed, so this one was not asked."""


class Again(NamedTuple):
    """Why to ask once more, and how many seconds the server wants us to wait."""

    reason: str
    seconds: float = 0.0


class Reach(NamedTuple):
    """Where a server is, and how patiently it is asked."""

    url: str  # Its address, up to the version: `http://localhost:8000/v1`.
    key_env: str  # The environment variable with the key.
    concurrency: int  # Requests under way at once.
    timeout: float  # Seconds without a sign of it.
    attempts: int  # How often a question is asked.
    backoff: float = 1.0  # Seconds before the second attempt; they double.


class HttpClient:
    """A client that may be used by several threads at once."""

    def __init__(self, reach: Reach) -> None:
        """Prepare a client; nothing is asked yet."""
        self._http = _httpx()
        self.reach, self.url = reach, reach.url.rstrip("/")
        self._key = os.environ.get(reach.key_env, "")
        headers = {"Authorization": f"Bearer {self._key}".encode()} if self._key else {}
        self._client = self._http.Client(
            headers=headers,
            timeout=reach.timeout,
            limits=self._http.Limits(max_connections=reach.concurrency),
        )
        # A connection that is kept open is closed with whoever asked through it.
        weakref.finalize(self, self._client.close)
        self._stopped = threading.Event()
        self._sleep: Callable[[float], Any] = self._stopped.wait

    @property
    def is_stopped(self) -> bool:
        """Whether no further question is to be asked."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Let no further question be asked, and end all waiting."""
        self._stopped.set()

    def resume(self) -> None:
        """Let questions be asked again."""
        self._stopped.clear()

    def send(self, path: str, body: Any = None, *, base: str | None = None) -> Any:
        """Ask once: POST a body, or GET where there is none.

        `base`: Address in place of the client's own.
        Returns: The response, whatever its status says of the question; `Again` where
        the server, or the way to it, failed.
        """
        url = f"{self.url if base is None else base}{path}"
        try:
            if body is None:
                response = self._client.get(url)
            else:
                response = self._client.post(url, json=body)
        except (self._http.HTTPError, self._http.InvalidURL) as error:
            return Again(self.hide(f"{type(error).__name__}: {error}"))
        status = response.status_code
        if status >= 500 or status in PATIENCE:
            reason = f"status {status}: {self.words(response)}"
            return Again(reason, retry_after(response.headers))
        return response

    def insist(self, ask: Callable[[], T | Again], key: str, what: str, kept: str) -> T:
        """Ask until there is an answer.

        `key`: Hexadecimal name of the question, which spreads the waiting.
        `what`: What was expected; `kept`: what is said of the answers so far.

        Raises:
            EndpointError: If there is none after all attempts.
        """
        reasons, attempts = [], self.reach.attempts
        for attempt in range(attempts):
            tried = ask()
            if not isinstance(tried, Again):
                return tried
            reasons.append(tried.reason)
            if attempt + 1 < attempts:
                self._sleep(self._pause(attempt, key, tried.seconds))
        raise EndpointError(
            what,
            f"{reasons[-1]}, after {len(reasons)} attempts",
            f"See that the server is up, then run the same command again: {kept}",
        )

    def _pause(self, attempt: int, key: str, asked: float) -> float:
        # Between half and all of the step, by the question: retries of many
        # questions spread out, and the same run waits the same time.
        share = 0.5 + int(key[:8], 16) / 2**33
        wait = max(self.reach.backoff * 2.0**attempt * share, asked)
        return min(wait, LONGEST_WAIT)

    def words(self, response: Any) -> str:
        """Return what a server said, in one line and without the key."""
        return self.hide(whole(" ".join(response.text.split())))[:_SHOWN]

    def hide(self, text: str) -> str:
        """Return a text without the key."""
        return text.replace(self._key, "***") if self._key else text


def require_url(url: str, key_env: str) -> None:
    """Refuse a URL that leads nowhere or gives a secret away."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and parts.hostname
        parts.port  # noqa: B018 - reading it is the check of its range.
    except ValueError:
        usable = False
    if not usable:
        raise SettingsError(
            "a URL such as http://localhost:8000/v1", url, "Correct it."
        )
    if parts.username or parts.password or parts.query:
        raise SettingsError(
            "a URL without user, password or query, since it is recorded",
            f"one of {parts.hostname} that has them",
            f"Put the key into the variable {key_env}.",
        )


def retry_after(headers: Any) -> float:
    """Return the seconds a server asks us to wait, given as such or as a date."""
    said = headers.get("Retry-After", "").strip()
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(said)
    except ValueError:
        return 0.0
    now = datetime.fromtimestamp(time.time(), UTC)
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, (at - now).total_seconds())


def _httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise EndpointError(
            "the package httpx, to reach a server over HTTP",
            "that it is not installed",
            "Install it in the folder of Holdfast: `pip install '.[serve]'`.",
        ) from error
    return httpx
