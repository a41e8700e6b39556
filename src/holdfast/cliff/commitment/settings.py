"""The settings of `holdfast decide`; this module loads no tensors."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from holdfast.errors import SettingsError
from holdfast.ranges import a_share, require_numbers

Switched = Annotated[bool, Parameter(negative=(), show_default=False)]
Swap = Literal["heads", "direction", "wrapper"]
Swaps = Annotated[
    tuple[Literal[Swap, "all"], ...],
    Parameter(negative=(), consume_multiple=True, show_default=False),
]
SWAPS: tuple[Swap, ...] = ("heads", "direction", "wrapper")


@dataclass(frozen=True)
class DecideSettings:
    """Which answers of a study are cut, and how many are drawn from each cut."""

    draws: int = 8
    """Answers drawn from each cut of a thinking."""

    draw_temperature: Annotated[float | None, Parameter(show_default=False)] = None
    """Temperature of these draws. Default: that of the study, or 0.7 where it was 0,
    since greedy draws are all the same."""

    draw_tokens: int = 32
    """Tokens of such an answer: as many as the judge needs."""

    complied_rows: Annotated[int | None, Parameter(show_default=False)] = None
    """At most so many complied harmful answers. Default: all of them."""

    refused_rows: int = 40
    """At most so many refused harmful answers, as a control."""

    benign_rows: int = 40
    """At most so many complied benign answers, as a control."""

    min_thinking: int = 20
    """Tokens of thinking below which an answer is left out: a twentieth of fewer is
    less than a token."""

    widest: float = 0.6
    """Widest 95% interval of the share at one cut; more is asked of --draws by less."""

    cheap: Switched = False
    """Read the first token of an answer instead of drawing any: the probability of
    those that open refusals in this study, and of those that open compliances."""

    redraw_thinking: Switched = False
    """Beside it, let the model think on from each cut, and answer then."""

    swap: Swaps = ()
    """Ask whether it is the thinking or the state: answers under either thinking, with
    an edit and without. The edit: heads, the study's, scaled; a direction, added at the
    end template; a wrapper, taken off after the thinking; or all that can be."""

    edit: Annotated[str | None, Parameter(show_default=False)] = None
    """JSON file of heads to scale, as {"heads": [[layer, head], ...], "factor": 0}.
    Default: the top of the ranking of `heads`."""

    edit_fraction: float = 0.03
    """Share of all heads at the top of the ranking that are ablated, rounded up."""

    direction: Literal["mean_difference", "probe"] = "mean_difference"
    """Direction of the edit: mean of refused minus that of complied training answers
    at the last token of the end template, or that of the probe."""

    direction_action: Literal["add", "remove"] = "add"
    """Add the direction, towards refusal, or project it out."""

    direction_layer: Annotated[int | None, Parameter(show_default=False)] = None
    """Layer after which that is done, from 0. Default: the middle one."""

    direction_strength: float = 1.0
    """How much is added, in gaps between the two means."""

    use: Switched = False
    """Ask whether the probe is what the model uses: take its direction out, beside
    random ones, and mask the words that give refusals away."""

    swap_prompts: int = 48
    """At most so many harmful and so many harmless held-out prompts for --swap."""

    use_prompts: int = 32
    """At most so many refused and so many complied held-out answers for --use."""

    random_directions: int = 5
    """Random directions of each kind beside that of the probe."""

    masked_words: int = 20
    """At most so many tokens that go with refusals, or with compliances, are masked."""

    edited_draws: int = 2
    """Answers drawn for --swap and --use in each condition; one where the study's
    temperature is 0, at which all are the same."""

    edited_tokens: int = 64
    """Most tokens of such an answer."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(
            self,
            draws=1,
            draw_temperature=0,
            draw_tokens=1,
            complied_rows=1,
            refused_rows=0,
            benign_rows=0,
            min_thinking=1,
            widest=0.01,
            direction_layer=0,
            swap_prompts=1,
            use_prompts=1,
            random_directions=1,
            masked_words=1,
            edited_draws=1,
            edited_tokens=1,
        )
        a_share("--edit-fraction", self.edit_fraction)
        a_share("--widest", self.widest)
        if self.cheap and self.redraw_thinking:
            raise SettingsError(
                "--redraw-thinking with answers that are drawn",
                "--cheap, which draws none",
                "Leave one of them out.",
            )


def stage_of(key: str) -> str:
    """Return the name of the stage of a part of `decide`."""
    return f"decide_{key}"


def file_of(key: str) -> str:
    """Return the file that a part of `decide` writes."""
    return f"{stage_of(key)}.json"
