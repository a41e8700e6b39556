"""What `holdfast evaluate` can be told; nothing heavy is imported here."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from holdfast.errors import SettingsError
from holdfast.ranges import at_least, flag_of, require_numbers
from holdfast.session.diffusion_settings import DIFFUSION, DiffusionSettings
from holdfast.session.settings import RolloutSettings

if TYPE_CHECKING:
    from holdfast.judges.choose import JudgeSettings

AUTHORED = "authored"
Several = Parameter(negative=(), consume_multiple=False, show_default=False)


@dataclass(frozen=True)
class EvaluateSettings:
    """Which suites are asked, under which attacks, and how answers are drawn."""

    suite: Annotated[tuple[str, ...], Several] = ()
    """A suite by name, NAME=FILE, KIND=FILE or FILE; may be repeated. Default:
    authored requests, harmful, harmless, and harmless that sound dangerous."""

    attack: Annotated[tuple[str, ...], Several] = ()
    """An attack around every harmful request, or all; may be repeated. Default: all
    for the authored requests, none for other suites."""

    attack_benign: bool = False
    """Put the attacks around harmless requests as well."""

    translations: str | None = None
    """Table for the attack translation: columns prompt and translation."""

    column: Annotated[tuple[str, ...], Several] = ()
    """Column of the prompts, as SUITE=NAME; may be repeated."""

    turns: Literal["all", "first"] = "all"
    """Turns of a conversation that are asked: all, each after the model's own answers
    to those before, or the first alone. The last answer is judged."""

    yes: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Read a column of prompts even where its rows look like answers."""

    data_revision: Annotated[tuple[str, ...], Several] = ()
    """Revision on the Hub, as SUITE=COMMIT; may be repeated."""

    limit: int | None = None
    """At most so many requests of a suite and kind, chosen by content hash. Default:
    100 of the authored ones, all of the others."""

    samples: int = 1
    """Answers drawn for each prompt."""

    temperature: float | None = None
    """Sampling temperature, 0 for greedy. Default: the model's own, else greedy."""

    top_p: float | None = None
    """Nucleus sampling. Default: the model's own, else 1."""

    max_thinking: int = 2048
    """Tokens of thinking after which it is closed by force, and flagged."""

    max_answer: int = 512
    """Tokens of answer after which it is cut."""

    system_prompt: str | None = None
    """System prompt of every conversation."""

    edit: str | None = None
    """JSON file of heads to scale while answers are drawn:
    {"heads": [[layer, head]], "factor": 0}."""

    lm_eval: Annotated[tuple[str, ...], Several] = ()
    """A task of lm-eval, or the YAML file of one, for utility, where lm-eval is
    installed; may be repeated."""

    seed: int = 0
    """Seed of every draw: prompts, wordings, sampling, resampling."""

    diffusion: Annotated[DiffusionSettings, Parameter(name="*")] = DIFFUSION
    """How a masked-diffusion model decodes."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self)
        self.drawing()
        at_least("--limit", self.limit, 1)
        for flag, entries in (
            ("--column", self.column),
            ("--data-revision", self.data_revision),
        ):
            for entry in entries:
                if not all(entry.partition("=")):
                    raise SettingsError(
                        f"{flag} SUITE=VALUE", repr(entry), "Name the suite as well."
                    )

    def drawing(self) -> RolloutSettings:
        """Return the part that says how answers are drawn, as an audit says it."""
        return RolloutSettings(
            samples=self.samples,
            temperature=self.temperature,
            top_p=self.top_p,
            max_thinking=self.max_thinking,
            max_answer=self.max_answer,
            system_prompt=self.system_prompt,
            seed=self.seed,
            diffusion=self.diffusion,
        )

    def of_suite(self, entries: tuple[str, ...], suite: str) -> str | None:
        """Return what was said for a suite among entries SUITE=VALUE."""
        said = dict(entry.partition("=")[::2] for entry in entries)
        return said.get(suite, said.get(suite.partition("=")[0]))


COUNTS = (
    "judge_batch_size",
    "judge_concurrency",
    "judge_attempts",
    "judge_max_requests",
    "judge_max_tokens",
)
"""Flags of a judge that count something, of which there is at least one."""


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
    """For a guard, prompts a pass."""

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
