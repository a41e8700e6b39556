"""The flags of a judge; this module loads no tensors."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from holdfast.errors import SettingsError
from holdfast.ranges import at_least, flag_of, require_numbers

if TYPE_CHECKING:
    from holdfast.judges.choose import JudgeSettings


COUNTS = (
    "judge_batch_size",
    "judge_concurrency",
    "judge_attempts",
    "judge_max_requests",
    "judge_max_tokens",
)


@dataclass(frozen=True)
class JudgeFlags:
    """Who judges the answers."""

    judge: str = "rules"
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

    calibrations: str = "calibrations"
    """Folder with the records of `holdfast judge calibrate`."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self)
        for name in COUNTS:
            at_least(flag_of(name), getattr(self, name), 1)
        if self.judge_timeout <= 0:
            found = str(self.judge_timeout)
            raise SettingsError("--judge-timeout above 0", found, "Choose another.")

    def opened(self) -> "JudgeSettings":
        """Return the settings that open the judge."""
        from holdfast.judges.choose import JudgeSettings

        known = {each.name for each in fields(JudgeSettings)} - {"judge"}
        chosen = {name: getattr(self, f"judge_{name}") for name in known}
        return JudgeSettings(judge=self.judge, **chosen)
