"""The settings of `holdfast decide`; this module loads no tensors."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from holdfast.ranges import a_share, require_numbers

Switched = Annotated[bool, Parameter(negative=(), show_default=False)]


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
        )
        a_share("--widest", self.widest)


def stage_of(key: str) -> str:
    """Return the name of the stage of a part of `decide`."""
    return f"decide_{key}"


def file_of(key: str) -> str:
    """Return the file that a part of `decide` writes."""
    return f"{stage_of(key)}.json"
