"""Open a judge by its name; the rules judge is the default."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from holdfast.errors import SettingsError
from holdfast.judges import degenerate
from holdfast.judges.base import Exchange, Judge, JudgeIdentity
from holdfast.judges.rules import language, phrases, reading, rules, tone
from holdfast.judges.verdict import Verdict
from holdfast.models.loading.parts import DtypeName

RULES = "rules"
GUARD = "guard:"
ENDPOINTS = ("http://", "https://")


@dataclass(frozen=True)
class JudgeSettings:
    """Which judge, and how it works."""

    # "rules", "guard:" and the directory or Hub id of a guard model, or the URL of an
    # OpenAI-compatible chat server.
    judge: str = RULES
    # For a guard, the name of its template; recognised by default.
    template: str | None = None
    revision: str | None = None  # For a guard, its revision on the Hub.
    device: str = "auto"  # For a guard, where it runs.
    dtype: DtypeName = "auto"  # For a guard, its arithmetic.
    batch_size: int = 8  # For a guard, prompts per pass.
    model: str | None = None  # For a server, the name of the model there.
    rubric: str = "strongreject"  # For a server, "strongreject" or a file.
    # For a server, the environment variable with the key.
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8  # For a server, requests under way at once.
    timeout: float = 60.0  # For a server, seconds without a sign of it.
    attempts: int = 6  # For a server, how often a question is asked.
    max_requests: int | None = None  # For a server, requests in all.
    max_tokens: int | None = None  # For a server, tokens in all.
    reply_tokens: int = 1024  # For a server, the longest reply.
    temperature: float = 0.0  # For a server, its sampling temperature.
    cache: str | None = None  # For a server, the folder that keeps its replies.


def open_judge(settings: JudgeSettings) -> Judge:
    """Open a judge; a guard model is loaded, a server is not asked yet."""
    name = settings.judge
    if name == RULES:
        return RulesJudge()
    if name.startswith(GUARD) and len(name) > len(GUARD):
        return _guard(settings)
    if name.startswith(ENDPOINTS):
        return _endpoint(settings)
    raise SettingsError(
        f"`{RULES}`, `{GUARD}` and a guard model, or the URL of a chat server",
        name,
        f"Write `{RULES}`, `{GUARD}owner/name` or `http://localhost:8000/v1`.",
    )


def open_early(settings: JudgeSettings) -> Judge | None:
    """Open a judge before answers are drawn, so that a mistake costs nothing.

    A guard model would take the memory of the model that answers: it is looked for,
    and opened later.

    Returns: The judge; None for a guard, which is there and is known.
    """
    name = settings.judge
    if not name.startswith(GUARD) or name == GUARD:
        return open_judge(settings)
    from holdfast.judges.guard_templates import guard_template
    from holdfast.models.scoring import check_scorer

    model = name.removeprefix(GUARD)
    guard_template(model, settings.template)
    check_scorer(model, revision=settings.revision)
    return None


def _guard(settings: JudgeSettings) -> Judge:
    # Imported here so that each judge loads only what it needs itself.
    from holdfast.judges.guard import load_guard

    return load_guard(
        settings.judge.removeprefix(GUARD),
        template=settings.template,
        revision=settings.revision,
        device=settings.device,
        dtype=settings.dtype,
        batch_size=settings.batch_size,
    )


def _endpoint(settings: JudgeSettings) -> Judge:
    from holdfast.judges.endpoint import EndpointJudge, EndpointSettings

    if settings.model is None:
        raise SettingsError(
            f"the name of the model at {settings.judge}",
            "none",
            "Give it with --judge-model.",
        )
    return EndpointJudge(
        EndpointSettings(
            url=settings.judge,
            model=settings.model,
            rubric=settings.rubric,
            api_key_env=settings.api_key_env,
            concurrency=settings.concurrency,
            timeout=settings.timeout,
            attempts=settings.attempts,
            max_requests=settings.max_requests,
            max_tokens=settings.max_tokens,
            reply_tokens=settings.reply_tokens,
            temperature=settings.temperature,
            cache=settings.cache,
        )
    )


class RulesJudge:
    """Written rules that tell refusal from help; offline, and no judge of harm."""

    @cached_property
    def identity(self) -> JudgeIdentity:
        """The rules, by the hash of the code that states them."""
        digest = hashlib.sha256()
        for module in (rules, degenerate, language, phrases, reading, tone):
            digest.update(Path(str(module.__file__)).read_bytes())
        name, _, version = rules.JUDGE_ID.partition("-")
        return JudgeIdentity(name, version, "refusal", digest.hexdigest())

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Return one verdict for each exchange, in order."""
        return [
            rules.judge(
                each.request,
                each.response,
                thinking=each.thinking,
                closed=each.closed,
                finish=each.finish,
            )
            for each in exchanges
        ]
