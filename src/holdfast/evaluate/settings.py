"""What `holdfast evaluate` can be told; this module loads no tensors."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from holdfast.errors import SettingsError
from holdfast.flags import GROUPS, Sampling, Texts
from holdfast.ranges import require_numbers
from holdfast.rollout.settings import DrawingSettings, RolloutSettings

AUTHORED = "authored"
DRAWN = (
    *("samples", "temperature", "top_p", "max_thinking", "max_answer"),
    *("system_prompt", "seed", "diffusion"),
)


@dataclass(frozen=True)
class EvaluateSettings(DrawingSettings):
    """Which suites are asked, under which attacks, and how answers are drawn."""

    suite: Texts = ()
    """A suite by name, NAME=FILE, KIND=FILE or FILE; may be repeated. Default:
    authored requests, harmful, harmless, and harmless that sound dangerous."""

    attack: Texts = ()
    """An attack around every harmful request, or all; may be repeated. Default: all
    for the authored requests, none for other suites."""

    attack_benign: bool = False
    """Put the attacks around harmless requests as well."""

    translations: str | None = None
    """Table for the attack translation: columns prompt and translation."""

    column: Texts = ()
    """Column of the prompts, as SUITE=NAME; may be repeated."""

    turns: Literal["all", "first"] = "all"
    """Turns of a conversation that are asked: all, each after the model's own answers
    to those before, or the first alone. The last answer is judged."""

    yes: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Read a column of prompts even where its rows look like answers."""

    data_revision: Texts = ()
    """Revision on the Hub, as SUITE=COMMIT; may be repeated."""

    limit: int | None = None
    """At most so many requests of a suite and kind, chosen by content hash. Default:
    100 of the authored ones, all of the others."""

    max_answer: Annotated[int, Sampling] = 512
    """Tokens of answer after which it is cut."""

    system_prompt: str | None = None
    """System prompt of every conversation."""

    edit: Annotated[str | None, Parameter(group=GROUPS["Heads"])] = None
    """JSON file of heads to scale while answers are drawn:
    {"heads": [[layer, head]], "factor": 0}."""

    lm_eval: Texts = ()
    """A task of lm-eval, or the YAML file of one, for utility, where lm-eval is
    installed; may be repeated."""

    seed: Annotated[int, Sampling] = 0
    """Seed of every draw: prompts, wordings, sampling, resampling."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        super().__post_init__()
        require_numbers(self, max_answer=1, limit=1)
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
        return RolloutSettings(**{name: getattr(self, name) for name in DRAWN})

    def of_suite(self, entries: tuple[str, ...], suite: str) -> str | None:
        """Return what was said for a suite among entries SUITE=VALUE."""
        said = dict(entry.partition("=")[::2] for entry in entries)
        return said.get(suite, said.get(suite.partition("=")[0]))
