"""The flags of a judge; this module loads no tensors."""

from dataclasses import dataclass
from typing import Literal

from holdfast.errors import SettingsError
from holdfast.ranges import at_least, flag_of, require_numbers

RULES = "rules"
GUARD = "guard:"
ENDPOINTS = ("http://", "https://")
COUNTS = (
    "judge_batch_size",
    "judge_concurrency",
    "judge_attempts",
    "judge_max_requests",
    "judge_max_tokens",
)


@dataclass(frozen=True)
class JudgeSettings:
    """Which judge, and how it works."""

    judge: str = RULES
    """rules, guard: and a guard model's directory or Hub id, or the URL of an
    OpenAI-compatible chat server."""

    judge_template: str | None = None
    """For a guard, the name of its template; recognised by default."""

    judge_revision: str | None = None
    """For a guard, its revision on the Hub."""

    judge_device: str = "auto"
    """For a guard, where it runs."""

    judge_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """For a guard, its arithmetic."""

    judge_batch_size: int = 8
    """For a guard, prompts per pass."""

    judge_model: str | None = None
    """For a server, the name of the model there."""

    judge_rubric: str = "strongreject"
    """For a server, strongreject or a file."""

    judge_api_key_env: str = "OPENAI_API_KEY"
    """For a server, the environment variable with the key."""

    judge_concurrency: int = 8
    """For a server, requests under way at once."""

    judge_timeout: float = 60.0
    """For a server, seconds without a sign of it."""

    judge_attempts: int = 6
    """For a server, how often a question is asked."""

    judge_max_requests: int | None = None
    """For a server, requests in all."""

    judge_max_tokens: int | None = None
    """For a server, tokens in all."""

    judge_reply_tokens: int = 1024
    """For a server, tokens of its longest reply, thinking included; a reply that is
    cut there is no verdict."""

    judge_temperature: float = 0.0
    """For a server, its sampling temperature."""

    judge_cache: str | None = None
    """For a server, the folder that keeps its replies."""

    judge_thinking: bool = False
    """Judge the thinking as well, in columns of its own."""

    judge_cascade: bool = False
    """Ask the judge only where the written rules are not sure what it would say, by
    its record in --calibrations."""

    judge_cascade_error: float = 0.02
    """For a cascade, the largest share of the answers that the rules are sure of on
    which the judge may differ in the record, by the upper end of its interval."""

    judge_cascade_check: float = 0.1
    """For a cascade, the share of the answers that the rules are sure of that goes to
    the judge all the same, to measure the error."""

    calibrations: str = "calibrations"
    """Folder with the records of `holdfast judge calibrate`."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self)
        for name in COUNTS:
            at_least(flag_of(name), getattr(self, name), 1)
        for name in ("judge_timeout", "judge_reply_tokens"):
            found = getattr(self, name)
            if found <= 0:
                flag = flag_of(name)
                raise SettingsError(f"{flag} above 0", str(found), "Raise it.")
        if not 0 <= self.judge_temperature <= 2:
            found = str(self.judge_temperature)
            raise SettingsError(
                "a --judge-temperature from 0 to 2", found, "Correct it."
            )

        for name in ("judge_cascade_error", "judge_cascade_check"):
            found = getattr(self, name)
            if not 0 < found <= 1:
                expected = f"{flag_of(name)} above 0 and up to 1"
                raise SettingsError(expected, str(found), "Correct it.")
        if self.judge_cascade and self.judge == RULES:
            raise SettingsError(
                "a judge to stand behind the rules, with --judge-cascade",
                f"--judge {RULES}",
                "Name a guard or a server, or leave out --judge-cascade.",
            )
        if self.judge_cascade and self.judge_thinking:
            raise SettingsError(
                "--judge-cascade without --judge-thinking: the rules were set beside "
                "the judge on answers, not on thoughts",
                "both",
                "Leave one of them out.",
            )

    @property
    def guard(self) -> str | None:
        """Directory or Hub id of the guard model; None for another judge."""
        return self.judge.removeprefix(GUARD) if self.judge.startswith(GUARD) else None


BY_RULES = JudgeSettings()
"""The judge of whoever names none."""
