"""The settings of rollouts, probes and traces; where a default is written.

They are resolved once, checked once, and written into each study. No heavy library is
imported here, so that the command line can show its help at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from holdfast.data.chat.rendering import (
    Rendering,
    ThinkingMode,
    parse_date,
    parse_options,
)
from holdfast.errors import SettingsError
from holdfast.flags import Sampling, Texts, flat
from holdfast.ranges import flag_of, require_numbers


@dataclass(frozen=True)
class DiffusionSettings:
    """How a response is denoised; of masked-diffusion models alone."""

    gen_length: Annotated[int | None, Parameter(show_default=False)] = None
    """Masked-diffusion models: tokens of a response. Default: as the model's
    configuration says (`response_length`), else 128."""

    block_length: Annotated[int | None, Parameter(show_default=False)] = None
    """Masked-diffusion models: tokens of a block; blocks are finished from left to
    right, and 1 writes token by token. Default: one block."""

    denoising_steps: Annotated[int | None, Parameter(show_default=False)] = None
    """Masked-diffusion models: forward passes for a response. Default: 32, or a pass
    a token where that is fewer, or a block a step where there are more blocks."""

    remasking: Literal["low_confidence", "random", "entropy", "margin"] = (
        "low_confidence"
    )
    """Masked-diffusion models: what decides which tokens stay at a step."""

    cfg_scale: float = 0.0
    """Masked-diffusion models: strength of classifier-free guidance."""

    threshold: Annotated[float | None, Parameter(show_default=False)] = None
    """Masked-diffusion models: every token whose probability is above this stays,
    however many steps that takes."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self, gen_length=1, block_length=1, denoising_steps=1)

    def given(self) -> list[str]:
        """Return the flags that were given another value than their default."""
        return [
            flag_of(each.name)
            for each in fields(self)
            if getattr(self, each.name) != each.default
        ]


DIFFUSION = DiffusionSettings()
"""The defaults."""
ROLES = (
    "harmful",
    "wrapped",
    "benign",
    "benign_wrapped",
    "safe_lookalike",
    "second",
)


@dataclass(frozen=True)
class ModelSettings:
    """How the model is loaded, how much of it runs at once, how prompts are rendered.

    Of the first two nothing may change a result beyond the arithmetic of the device;
    what changes a prompt is part of every result's key.
    """

    revision: str | None = None
    """Revision of a Hub model: a branch, a tag or a commit."""

    device: str = "auto"
    """Where the model runs: auto, cpu, cuda, cuda:1, mps, or balanced (over all GPUs,
    for a model that is too large for one)."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights: auto, float32, bfloat16, float16."""

    batch_size: Annotated[int | None, Parameter(show_default=False)] = None
    """Rows at once; halved by itself where the memory does not suffice. Default: 32,
    and up to 128 for a small model."""

    thinking: ThinkingMode = "auto"
    """Whether the model thinks: auto (as its chat template has it by default),
    required (switched on, else an error), off (switched off, else an error)."""

    thinking_tags: Annotated[
        tuple[str, str] | None, Parameter(negative=(), show_default=False)
    ] = None
    """What opens and closes the thinking, OPEN CLOSE. Default: read off the chat
    template, or known of the model."""

    template_option: Texts = ()
    """A variable of the chat template, as NAME=VALUE, such as enable_thinking=false;
    may be repeated."""

    date: str | None = None
    """The day that a chat template is told if it asks, as YYYY-MM-DD. Default: that of
    the study, else today."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self, batch_size=1)
        self.rendering()

    def rendering(self) -> Rendering:
        """Return how prompts are rendered."""
        if self.date is not None:
            parse_date(self.date)
        for tag in self.thinking_tags or ():
            if not tag.strip():
                raise SettingsError(
                    "--thinking-tags OPEN CLOSE",
                    repr(tag),
                    "Give both tags, for example '<think>' '</think>'.",
                )
        options = parse_options(self.template_option)
        return Rendering(options, self.date, self.thinking, self.thinking_tags)

    def kept(self) -> dict[str, Any]:
        """Return what a study keeps of it, so that later stages load the same."""
        names = ("revision", "dtype", "thinking", "thinking_tags", "template_option")
        return {name: getattr(self, name) for name in names}

    def over(self, kept: Mapping[str, Any]) -> "ModelSettings":
        """Return these settings over what `kept` returned, as JSON holds it."""
        default = ModelSettings()
        changed: dict[str, Any] = {}
        for name, value in kept.items():
            if getattr(self, name) == getattr(default, name):
                changed[name] = tuple(value) if isinstance(value, list) else value
        return replace(self, **changed)


@dataclass(frozen=True)
class DrawingSettings:
    """How answers are drawn, for an audit and for suites alike."""

    samples: Annotated[int, Sampling] = 1
    """Answers drawn for each prompt."""

    temperature: Annotated[float | None, Sampling] = None
    """Sampling temperature, 0 for greedy. Default: the model's own, else greedy."""

    top_p: Annotated[float | None, Sampling] = None
    """Share of the probability to draw from. Default: the model's own, else 1."""

    max_thinking: Annotated[int, Sampling] = 2048
    """Tokens of thinking after which it is closed by force, and flagged."""

    diffusion: Annotated[DiffusionSettings, flat("Diffusion")] = DIFFUSION
    """How a masked-diffusion model decodes."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self, samples=1, max_thinking=0, temperature=0)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SettingsError("--top-p in (0, 1]", str(self.top_p), "Choose another.")


@dataclass(frozen=True)
class RolloutSettings(DrawingSettings):
    """Which prompts are asked, and how the answers are drawn."""

    harmful: str | None = None
    """Harmful requests: a file, or hub:owner/name[:split]. Default: authored ones."""

    wrapped: str | None = None
    """Jailbreak prompts. Default: authored wrappers around the harmful requests."""

    benign: str | None = None
    """Harmless requests. Default: authored ones."""

    benign_wrapped: str | None = None
    """Harmless requests in the same wrappers. Default: made like the wrapped ones."""

    safe_lookalike: str | None = None
    """Harmless requests that sound dangerous, for over-refusal. Default: authored."""

    second: str | None = None
    """Harmful requests from a second source, on which the probe is only tested."""

    column: Texts = ()
    """Column that holds the prompt: NAME for every file, or ROLE=NAME for one."""

    turns: Literal["all", "first"] = "all"
    """Turns of a conversation that are asked: all, each after the model's own answers
    to those before, or the first alone. The last answer is judged."""

    yes: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Read a column of prompts even where its rows look like answers."""

    data_revision: str | None = None
    """Revision of the hub: datasets."""

    limit: int | None = None
    """At most so many prompts per role, chosen by content hash."""

    wrappers_per_request: int = 2
    """How many authored wrappers are put around each request."""

    max_answer: Annotated[int, Sampling] = 256
    """Tokens of answer after which it is cut."""

    system_prompt: str | None = None
    """System prompt of every conversation."""

    test_fraction: float = 0.4
    """Share of the requests held out of every fit; widened if too few are in it."""

    seed: Annotated[int, Sampling] = 0
    """Seed of every draw: prompts, sampling, resampling."""

    imported: Annotated[str | None, Parameter(name="--import")] = None
    """Completions made elsewhere: JSONL with prompt, completion and, if known,
    label, wrapper and request_id, or what a server sent. Nothing is generated then."""

    import_requests: str | None = None
    """The requests of a batch, where --import names the lines of its answers."""

    write_batch: Annotated[str | None, Parameter(show_default=False)] = None
    """Write the questions to this JSONL file, as a batch for OpenAI or vLLM, and draw
    nothing. The same command with --import and the file of its results goes on."""

    import_bare: Literal["ask", "answer", "thinking"] = "ask"
    """What imported rows are that have neither thinking nor its tags: answers whose
    thinking was not kept, or thinking that was cut off. Default: refuse to guess."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        super().__post_init__()
        require_numbers(self, max_answer=1, wrappers_per_request=1, limit=1)
        if not 0.1 <= self.test_fraction <= 0.5:
            raise SettingsError(
                "--test-fraction from 0.1 to 0.5",
                str(self.test_fraction),
                "Choose another.",
            )
        if self.import_requests is not None and self.imported is None:
            raise SettingsError(
                "--import beside --import-requests",
                "the requests alone",
                "Name the file of the answers with --import.",
            )
        if self.write_batch is not None and self.imported is not None:
            raise SettingsError(
                "--write-batch or --import",
                "both",
                "Write the batch first, and import its results then.",
            )
        self.columns()

    def columns(self) -> dict[str, str]:
        """Return the column of each role that has one."""
        chosen: dict[str, str] = {}
        for entry in self.column:
            role, equals, name = entry.partition("=")
            roles = (role,) if equals else ROLES
            if equals and role not in ROLES:
                raise SettingsError(
                    f"--column NAME or ROLE=NAME, with a role of {', '.join(ROLES)}",
                    repr(entry),
                    "Name the column alone to use it for every file.",
                )
            for each in roles:
                if chosen.setdefault(each, name or role) != (name or role):
                    raise SettingsError(
                        "one --column for each role",
                        f"two for {each}: {chosen[each]!r} and {name or role!r}",
                        "Give ROLE=NAME for each file.",
                    )
        return chosen


@dataclass(frozen=True)
class ProbeSettings:
    """How the refusal probe is fitted."""

    folds: int = 5
    """Folds of the cross-validation that chooses the regulariser."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self, folds=2)


@dataclass(frozen=True)
class TraceSettings:
    """How plateau, final score and cliff are read off."""

    plateau: Literal["median", "maximum"] = "median"
    """The plateau of one answer; the maximum is the published rule."""

    min_thinking: int = 20
    """Thinking shorter than this many tokens is counted out."""

    window: int = 64
    """Tokens before the end of thinking that the mean trace shows."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self, min_thinking=1, window=1)


def parse_columns(entries: tuple[str, ...]) -> dict[str, str]:
    """Return the column of each field, from entries FIELD=NAME."""
    chosen: dict[str, str] = {}
    for entry in entries:
        field, equals, name = entry.partition("=")
        if not (equals and field and name) or field in chosen:
            raise SettingsError(
                "--column FIELD=NAME, each field once",
                repr(entry),
                "Write --column prompt=question, for example.",
            )
        chosen[field] = name
    return chosen
