"""A chat model behind an OpenAI-compatible server, as a judge.

What the server said is kept on disk under a hash of the question, so a run that was
broken off asks nothing twice. A server that stays down ends the run with an error and
is never read as "safe".
"""

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from urllib.parse import urlsplit

from holdfast.data.served import ending
from holdfast.errors import SettingsError
from holdfast.judges.base import Exchange, JudgeIdentity, cut, screen
from holdfast.judges.chat import ChatClient, Limits, Stopped
from holdfast.judges.rubric import Rubric, load_rubric
from holdfast.judges.verdict import Verdict

VERSION = "2"
_SHOWN = 120


@dataclass(frozen=True)
class EndpointSettings:
    """How a chat server is asked."""

    url: str  # Base of the server's API, such as "http://localhost:8000/v1".
    model: str  # Name of the model there.
    rubric: str = "strongreject"  # "strongreject", or the path of a rubric of your own.
    # Environment variable with the key; the key itself is in no record and in no
    # message.
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8  # Requests under way at once.
    # Seconds without a sign of the server before a request is given up.
    timeout: float = 60.0
    attempts: int = 6  # How often one question is asked before the run ends.
    # Seconds before the second attempt; they double with each attempt.
    backoff: float = 1.0
    # Longest wait in seconds, also where the server asks for more.
    longest_wait: float = 60.0
    # Requests in all, retries included; None for no limit.
    max_requests: int | None = None
    # Tokens in all, as the server counts them; None for no limit. What is under way
    # when it is reached is still paid for.
    max_tokens: int | None = None
    # Longest reply, thinking included; one that is cut is no verdict.
    reply_tokens: int = 1024
    # Sampling temperature, for servers that take no other than their own.
    temperature: float = 0.0
    cache: str | None = None  # Folder that keeps replies; None to keep none.

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in {"http", "https"} and parts.hostname
            parts.port  # noqa: B018 - reading it is the check of its range.
        except ValueError:
            usable = False
        if not usable:
            raise SettingsError(
                "a URL such as http://localhost:8000/v1", self.url, "Correct it."
            )
        if parts.username or parts.password or parts.query:
            raise SettingsError(
                "a URL without user, password or query, since it is recorded",
                f"one of {parts.hostname} that has them",
                f"Put the key into the variable {self.api_key_env}.",
            )
        for name in ("concurrency", "attempts", "reply_tokens", "timeout"):
            if getattr(self, name) <= 0:
                raise SettingsError(
                    f"--judge-{name.replace('_', '-')} above 0",
                    str(getattr(self, name)),
                    "Raise it.",
                )
        if not 0 <= self.temperature <= 2:
            raise SettingsError(
                "a --judge-temperature from 0 to 2",
                str(self.temperature),
                "Correct it.",
            )


class EndpointJudge:
    """A chat model with a rubric, under the contract of all judges."""

    def __init__(
        self,
        settings: EndpointSettings,
        rubric: Rubric | None = None,
        client: ChatClient | None = None,
    ) -> None:
        """Prepare the judge; nothing is asked yet.

        `rubric`: What to ask; by default what the settings name.
        `client`: How to reach the server; by default over HTTP.
        """
        self.settings = settings
        self.rubric = load_rubric(settings.rubric) if rubric is None else rubric
        self.client = client or ChatClient(
            settings.url,
            settings.model,
            Limits(
                timeout=settings.timeout,
                attempts=settings.attempts,
                backoff=settings.backoff,
                longest_wait=settings.longest_wait,
                max_requests=settings.max_requests,
                max_tokens=settings.max_tokens,
                reply_tokens=settings.reply_tokens,
                temperature=settings.temperature,
                connections=settings.concurrency,
            ),
            key=os.environ.get(settings.api_key_env, ""),
            cache=settings.cache,
        )
        self.identity = JudgeIdentity(
            name=f"endpoint:{self.rubric.name}",
            version=VERSION,
            measures=self.rubric.measures,
            template_sha256=self.rubric.sha256,
            model=settings.model,
            settings=(
                ("url", settings.url),
                ("temperature", f"{settings.temperature:g}"),
                ("reply_tokens", str(settings.reply_tokens)),
            ),
        )

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Return one verdict for each exchange, in order."""
        left = deque(exchanges)
        verdicts: list[Verdict] = []
        # Until the server has answered once, questions go one by one: what it
        # refuses does not depend then on which of several it happens to take first.
        while left and not self.client.is_proven:
            verdicts.append(self._judge_one(left.popleft()))
        pool = ThreadPoolExecutor(self.settings.concurrency)
        try:
            waiting = [pool.submit(self._judge_one, each) for each in left]
            return verdicts + _results(waiting)
        finally:
            # Questions that nobody has asked yet are not asked after an error.
            self.client.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            self.client.resume()

    def _judge_one(self, exchange: Exchange) -> Verdict:
        label = self.identity.label
        verdict = screen(exchange, label)
        if verdict is not None:
            return verdict
        messages, broken = self.rubric.messages(exchange)
        note = f"; {broken} markers were broken up" if broken else ""
        note += cut(exchange)
        answer = self.client.ask(messages)
        said = " ".join(answer.text.split())
        if answer.declined:
            return Verdict("unparsed", f"the server declined: {said}{note}", label)
        if ending(answer.finish) != "stop":
            reason = (
                f"the judge's reply was broken off ({answer.finish}; "
                f"{self.settings.reply_tokens} tokens are the limit, see "
                f"--judge-reply-tokens) after {said[-_SHOWN:]!r}{note}"
            )
            return Verdict("unparsed", reason, label)
        reading = self.rubric.read(answer.text)
        if reading is None:
            reason = f"the judge said {said[:_SHOWN]!r}{note}"
            return Verdict("unparsed", reason, label)
        reason = f"the judge said {said[-_SHOWN:]!r}{note}"
        return Verdict(reading.outcome, reason, label, reading.score)


def _results(waiting: Sequence[Future[Verdict]]) -> list[Verdict]:
    """Return all verdicts, or raise the error that stopped the others."""
    wait(waiting)
    errors = [error for future in waiting if (error := future.exception())]
    causes = [error for error in errors if not isinstance(error, Stopped)]
    if errors:
        raise (causes or errors)[0]
    return [future.result() for future in waiting]
