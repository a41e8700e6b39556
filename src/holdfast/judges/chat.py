"""Ask an OpenAI-compatible chat server, patiently, within a budget, and only once."""

import json
import re
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.data.served import REASONING, whole
from holdfast.engines.http import Again, HttpClient, Reach, Stopped
from holdfast.errors import EndpointError
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


class Answer(NamedTuple):
    """What a server said, or why it would not."""

    text: str  # The reply, or the words of the refusal.
    declined: bool = False  # Whether the server would not answer this question.
    finish: str = ""  # Why the reply ended, as the server says; "" where it does not.


class ChatClient:
    """A client that may be used by several threads at once."""

    def __init__(self, settings: JudgeSettings, *, backoff: float = 1.0) -> None:
        """Prepare a client; nothing is asked yet.

        `backoff`: Seconds before the second attempt; they double with each attempt.
        """
        self.settings, self.model = settings, settings.judge_model
        self._http = HttpClient(
            Reach(
                settings.judge,
                settings.judge_api_key_env,
                settings.judge_concurrency,
                settings.judge_timeout,
                settings.judge_attempts,
                backoff,
            )
        )
        self.url = self._http.url
        cache = settings.judge_cache
        self._cache = None if cache is None else Path(cache).expanduser()
        if self._cache is not None:
            # Whoever was asked and cannot be kept has been paid for in vain.
            require_place(self._cache / "00" / "0", folder=False, flag="--judge-cache")
        self.stop, self.resume = self._http.stop, self._http.resume
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Lock] = {}
        self.requests, self.tokens = 0, 0
        self._limit = "max_tokens"
        self._answered, self._refusals = False, Counter[str]()

    @property
    def is_proven(self) -> bool:
        """Whether the server has ever answered a question of this client."""
        return self._answered

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
        def ask() -> Answer | Again:
            self._spend()
            return self._try(body)

        what = f"an answer of {self.model} at {self.url}"
        kept = "what it has answered is kept, and nothing was counted as safe."
        return self._http.insist(ask, key, what, kept)

    def _spend(self) -> None:
        with self._lock:
            if self._http.is_stopped:
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

    def _try(self, body: dict[str, Any]) -> Answer | Again:
        body = dict(body)
        limit = self._limit
        body[limit] = body.pop("max_tokens")
        response = self._http.send("/chat/completions", body)
        if isinstance(response, Again):
            return response
        status, words = response.status_code, self._http.words(response)
        if status in DECLINED:
            if limit == "max_tokens" and _wants_other_limit(response.text):
                self._limit = "max_completion_tokens"
                self._spend()
                return self._try({**body, "max_tokens": body.pop(limit)})
            return Answer(f"status {status}: {words}", declined=True)
        if status != 200:
            raise EndpointError(
                f"an answer of {self.model} at {self.url}",
                f"status {status}: {words}",
                "Check the URL, the name of the model and the key.",
            )
        return self._unpack(response, words)

    def _unpack(self, response: Any, words: str) -> Answer | Again:
        try:
            content = response.json()
            choice = content["choices"][0]
            text = _reply(choice["message"])
            finish = whole(str(choice.get("finish_reason") or ""))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            reason = f"an answer that is no chat completion: {words}"
            return Again(reason)
        with self._lock:
            self.tokens += _used(content)
        return Answer(whole(text), finish=finish)

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
