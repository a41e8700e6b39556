"""Ask an OpenAI-compatible chat server, patiently, within a budget, and only once."""

import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.data.served import REASONING
from holdfast.errors import EndpointError
from holdfast.judges.base import whole
from holdfast.judges.settings import JudgeSettings
from holdfast.study import atomic_write_json, fingerprint, require_place

Messages = Sequence[dict[str, str]]
DECLINED = frozenset({400, 413, 422})
"""Statuses that are about one question: too long, or against the server's policy."""
ABOUT_QUESTION = re.compile(
    r"status 413|content[ _-]?(filter|policy|management)|safety|moderat"
    r"|context[ _](length|window)|too long|input tokens",
    re.IGNORECASE,
)
"""Words of a refusal that is about what was asked, not about how."""
SEVERAL = 3
"""Questions in a row that are refused in the same words, after which we give up."""
PATIENCE = frozenset({408, 409, 425, 429})
"""Statuses below 500 that pass with time."""


LONGEST_WAIT = 60.0
"""Seconds that we wait at the most, also where a server asks for more."""
_SHOWN = 300


class Stopped(EndpointError):
    """Another question failed, so this one was not asked."""


class Answer(NamedTuple):
    """What a server said, or why it would not."""

    text: str  # The reply, or the words of the refusal.
    declined: bool = False  # Whether the server would not answer this question.
    finish: str = ""  # Why the reply ended, as the server says; "" where it does not.


class _Again(NamedTuple):
    """Why to ask once more, and how many seconds the server wants us to wait."""

    reason: str
    seconds: float = 0.0


class ChatClient:
    """A client that may be used by several threads at once."""

    def __init__(self, settings: JudgeSettings, *, backoff: float = 1.0) -> None:
        """Prepare a client; nothing is asked yet.

        `backoff`: Seconds before the second attempt; they double with each attempt.
        """
        self._http = _httpx()
        self.settings, self._backoff = settings, backoff
        self.url, self.model = settings.judge.rstrip("/"), settings.judge_model
        # The key itself is in no record and in no message.
        self._key = os.environ.get(settings.judge_api_key_env, "")
        headers = {"Authorization": f"Bearer {self._key}".encode()} if self._key else {}
        self._client = self._http.Client(
            headers=headers,
            timeout=settings.judge_timeout,
            limits=self._http.Limits(max_connections=settings.judge_concurrency),
        )
        cache = settings.judge_cache
        self._cache = None if cache is None else Path(cache).expanduser()
        if self._cache is not None:
            # Whoever was asked and cannot be kept has been paid for in vain.
            require_place(self._cache / "00" / "0", folder=False, flag="--judge-cache")
        self._stopped = threading.Event()
        self._sleep: Callable[[float], Any] = self._stopped.wait
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Lock] = {}
        self.requests, self.tokens = 0, 0
        self._limit = "max_tokens"
        self._answered, self._refusals = False, Counter[str]()

    @property
    def is_proven(self) -> bool:
        """Whether the server has ever answered a question of this client."""
        return self._answered

    def stop(self) -> None:
        """Let no further question be asked, and end all waiting."""
        self._stopped.set()

    def resume(self) -> None:
        """Let questions be asked again."""
        self._stopped.clear()

    def ask(self, messages: Messages) -> Answer:
        """Return the answer to a chat, from the cache if it was asked before."""
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": self.settings.judge_temperature or 0,
            "max_tokens": self.settings.judge_reply_tokens,
        }
        key = fingerprint({"url": self.url, **body})
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        # Whoever asks the same at the same time waits, and then reads the cache.
        with turn:
            known = self._known(key)
            if known is not None:
                self._answered = True
                return known
            try:
                answer = self._insist(body, key)
                self._consider(answer)
            except EndpointError:
                # A server that failed one question is not asked the next.
                self.stop()
                raise
            path = self._path(key)
            # The server may think better of what it declined.
            if path is not None and not answer.declined:
                atomic_write_json(path, answer._asdict())
        return answer

    def _consider(self, answer: Answer) -> None:
        """Give up on a server that refuses what we ask, whatever we ask."""
        with self._lock:
            if not answer.declined:
                self._answered = True
                self._refusals.clear()
                return
            words = re.sub(r"\d+", "0", answer.text)
            self._refusals[words] += 1
            own = ABOUT_QUESTION.search(answer.text) is not None
            first = not self._answered and not own
            again = self._refusals[words] >= SEVERAL and not (own and self._answered)
        if first or again:
            raise EndpointError(
                f"an answer of {self.model} at {self.url}",
                f"{answer.text}",
                "Read the server's words above; the limit of a reply is set by "
                "--judge-reply-tokens, the temperature by --judge-temperature. Nothing "
                "was counted.",
            )

    def _insist(self, body: dict[str, Any], key: str) -> Answer:
        reasons = []
        for attempt in range(self.settings.judge_attempts):
            self._spend()
            tried = self._try(body)
            if isinstance(tried, Answer):
                return tried
            reasons.append(tried.reason)
            if attempt + 1 < self.settings.judge_attempts:
                self._sleep(self._pause(attempt, key, tried.seconds))
        raise EndpointError(
            f"an answer of {self.model} at {self.url}",
            f"{reasons[-1]}, after {len(reasons)} attempts",
            "See that the server is up, then run the same command again: what it has "
            "answered is kept, and nothing was counted as safe.",
        )

    def _pause(self, attempt: int, key: str, asked: float) -> float:
        # Between half and all of the step, by the question: retries of many
        # questions spread out, and the same run waits the same time.
        share = 0.5 + int(key[:8], 16) / 2**33
        wait = max(self._backoff * 2.0**attempt * share, asked)
        return min(wait, LONGEST_WAIT)

    def _spend(self) -> None:
        with self._lock:
            if self._stopped.is_set():
                raise Stopped(
                    "a run that goes on", "one that was stopped", "Run it again."
                )
            most, spent = self.settings.judge_max_requests, self.requests
            if most is not None and spent >= most:
                raise _budget(f"{most} requests", "--judge-max-requests")
            most, spent = self.settings.judge_max_tokens, self.tokens
            if most is not None and spent >= most:
                raise _budget(f"{most} tokens ({spent} used)", "--judge-max-tokens")
            self.requests += 1

    def _try(self, body: dict[str, Any]) -> Answer | _Again:
        body = dict(body)
        limit = self._limit
        body[limit] = body.pop("max_tokens")
        try:
            response = self._client.post(f"{self.url}/chat/completions", json=body)
        except (self._http.HTTPError, self._http.InvalidURL) as error:
            return _Again(self._hide(f"{type(error).__name__}: {error}"))
        status = response.status_code
        if status in DECLINED:
            if limit == "max_tokens" and _wants_other_limit(response.text):
                self._limit = "max_completion_tokens"
                self._spend()
                return self._try({**body, "max_tokens": body.pop(limit)})
            return Answer(f"status {status}: {self._words(response)}", declined=True)
        if status >= 500 or status in PATIENCE:
            reason = f"status {status}: {self._words(response)}"
            return _Again(reason, _retry_after(response.headers))
        if status != 200:
            raise EndpointError(
                f"an answer of {self.model} at {self.url}",
                f"status {status}: {self._words(response)}",
                "Check the URL, the name of the model and the key.",
            )
        return self._unpack(response)

    def _unpack(self, response: Any) -> Answer | _Again:
        try:
            content = response.json()
            choice = content["choices"][0]
            text = _reply(choice["message"])
            finish = whole(str(choice.get("finish_reason") or ""))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            reason = f"an answer that is no chat completion: {self._words(response)}"
            return _Again(reason)
        with self._lock:
            self.tokens += _used(content)
        return Answer(whole(text), finish=finish)

    def _words(self, response: Any) -> str:
        """Return what a server said, in one line and without the key."""
        return self._hide(whole(" ".join(response.text.split())))[:_SHOWN]

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _path(self, key: str) -> Path | None:
        return self._cache and self._cache / key[:2] / f"{key}.json"

    def _known(self, key: str) -> Answer | None:
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            return Answer(*(kept[name] for name in Answer._fields))
        except (OSError, ValueError, TypeError, LookupError):
            # A damaged entry, or one that does not say whether the reply was cut, is
            # asked for again and replaced.
            return None


def _reply(message: dict[str, Any]) -> str:
    """Return what a message says, be it that all of it was taken for thinking."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(
            part["text"] for part in content if part.get("type", "text") == "text"
        )
    said = [content, message.get("refusal"), *map(message.get, REASONING)]
    text = next((text for text in said if str(text or "").strip()), "")
    if not isinstance(text, str):
        raise TypeError("a reply that is no text")
    return text


def _used(content: dict[str, Any]) -> int:
    """Return the tokens that a server counted, 0 where it counts none."""
    try:
        return max(0, int((content.get("usage") or {}).get("total_tokens") or 0))
    except (ValueError, TypeError, AttributeError, OverflowError):
        return 0


def _wants_other_limit(refusal: str) -> bool:
    """Return whether a server refuses the old name for the limit of a reply."""
    if "max_tokens" not in refusal:
        return False
    strange = re.search(
        r"unsupported|not supported|unrecogni[sz]ed|unknown|unexpected|not permitted|"
        r"extra|use 'max_completion_tokens'|instead",
        refusal,
        re.IGNORECASE,
    )
    return strange is not None


def _budget(found: str, option: str) -> EndpointError:
    return EndpointError(
        "questions within the budget",
        f"{found}, all spent",
        f"Raise {option} and run the same command again: what was answered is kept.",
    )


def _retry_after(headers: Any) -> float:
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
            "the package httpx, to reach a judge over HTTP",
            "that it is not installed",
            "Install it in the folder of Holdfast: `pip install '.[serve]'`.",
        ) from error
    return httpx
