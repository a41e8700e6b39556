"""A chat model behind an OpenAI-compatible server, as a judge.

What the server said is kept on disk under a hash of the question, so a run that was
broken off asks nothing twice. A server that stays down ends the run with an error and
is never read as "safe".
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from urllib.parse import urlsplit

from holdfast.data.served import ending
from holdfast.errors import SettingsError
from holdfast.judges.base import Exchange, JudgeIdentity, cut, screen
from holdfast.judges.chat import ChatClient, Stopped
from holdfast.judges.rubric import Rubric, load_rubric
from holdfast.judges.settings import JudgeSettings
from holdfast.judges.verdict import Verdict

VERSION = "2"
_SHOWN = 120


class EndpointJudge:
    """A chat model with a rubric, under the contract of all judges."""

    def __init__(
        self,
        settings: JudgeSettings,
        rubric: Rubric | None = None,
        *,
        backoff: float = 1.0,
    ) -> None:
        """Prepare the judge; nothing is asked yet.

        `rubric`: What to ask; by default what the settings name.
        `backoff`: Seconds before the second attempt; they double with each attempt.
        """
        require_url(settings)
        self.settings = settings
        self.rubric = rubric or load_rubric(settings.judge_rubric)
        self.client = ChatClient(settings, backoff=backoff)
        self.identity = JudgeIdentity(
            name=f"endpoint:{self.rubric.name}",
            version=VERSION,
            measures=self.rubric.measures,
            template_sha256=self.rubric.sha256,
            model=settings.judge_model,
            settings=(
                ("url", settings.judge),
                ("temperature", f"{settings.judge_temperature:g}"),
                ("reply_tokens", str(settings.judge_reply_tokens)),
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
        pool = ThreadPoolExecutor(self.settings.judge_concurrency)
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
                f"{self.settings.judge_reply_tokens} tokens are the limit, see "
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


def require_url(settings: JudgeSettings) -> None:
    """Refuse a URL that leads nowhere or gives a secret away, and one without model."""
    url = settings.judge
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
            f"Put the key into the variable {settings.judge_api_key_env}.",
        )
    if settings.judge_model is None:
        raise SettingsError(
            f"the name of the model at {url}", "none", "Give it with --judge-model."
        )
