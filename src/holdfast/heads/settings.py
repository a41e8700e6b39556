"""The settings of the verbs that look at single heads.

No heavy library is imported here, so that the command line can show its help at once.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from cyclopts import Parameter

from holdfast.errors import SettingsError
from holdfast.flags import Shares
from holdfast.ranges import a_share, require_numbers

Scope = Literal["everywhere", "end_template", "answer"]
Scopes = Annotated[
    tuple[Scope, ...], Parameter(negative=(), consume_multiple=True, show_default=False)
]
Span = Literal["end_template", "thinking"]
Form = Literal["checkpoint", "adapter"]
MIN_REQUESTS = 10
"""Complied harmful base requests of each split that heads are ranked and checked on."""


@dataclass(frozen=True)
class HeadsSettings:
    """How heads are ranked, and how many are ablated as a check."""

    ranking: Literal["drop", "published"] = "drop"
    """Rank by plateau minus final token, or as the paper does: by the projection of
    what a head writes at the final token, before the final norm."""

    checked_heads: int = 32
    """Heads at the top of the ranking that are ablated one by one; at most a
    quarter of all."""

    selection_prompts: int = 64
    """Complied harmful answers to rank on, and as many held-out ones to check on."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self, checked_heads=1, selection_prompts=MIN_REQUESTS)

    def attribution(self) -> "HeadsSettings":
        """Return what alone counts where heads are ranked by attribution."""
        own = {each.name: getattr(self, each.name) for each in fields(HeadsSettings)}
        return HeadsSettings(**own)


@dataclass(frozen=True)
class RankSettings(HeadsSettings):
    """By what heads are ranked, and how those of twins are exchanged."""

    by: Literal["attribution", "interchange"] = "attribution"
    """Rank by attribution alone (--ranking says how), or by interchange: what a head of
    a run that refused does in one of the same request that complied."""

    twins: int = 64
    """Pairs of runs of one request, one refused and one complied, to rank heads on;
    and as many held-out ones to measure on."""

    span: Span = "end_template"
    """Where heads are exchanged: over the end template, or over all of the thinking,
    aligned at its end where one is longer."""

    reading: Literal["first-token", "probe"] = "first-token"
    """What is followed: the log-odds of opening a refusal at the first answer token, or
    the logit of the refusal probe there."""

    joint_heads: int = 4
    """Heads at the top that are also exchanged together: as one set, beside random sets
    of the same layers, and in pairs with the top heads by attribution."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        super().__post_init__()
        require_numbers(self, twins=MIN_REQUESTS, joint_heads=1)


@dataclass(frozen=True)
class AblateSettings:
    """Which heads are switched off, where, and on how many prompts."""

    fractions: Shares = (0.01, 0.03, 0.05)
    """Shares of all heads to switch off, rounded up to whole heads, everywhere. In
    the other scopes only the middle one. Default: 0.01, 0.03 and 0.05."""

    scopes: Scopes = ("everywhere", "end_template", "answer")
    """Where: everywhere, so that the thinking is drawn anew; end_template, with the
    thinking fixed; answer, from its first token on. Default: all three."""

    random_draws: int = 5
    """Sets of random heads, as many in each layer as the top ones."""

    ablation_prompts: int = 48
    """At most so many harmful and so many harmless held-out prompts, half as many
    that only sound dangerous, and so many questions of --utility."""

    utility: str | None = None
    """Questions with exact answers: a suite such as gsm8k, or a file with columns
    prompt and answer. Default: none are asked."""

    ablated_heads: str | None = None
    """Heads to switch off in place of the top ones: layer:head, with commas."""

    factor: float = 0.0
    """What the heads are multiplied by."""

    renormalise: Literal["none", "token", "tensor"] = "none"
    """Whether the norm of a layer's heads is restored: not; token by token; or over
    the whole tensor as in the paper's code, where a result depends on its batch."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        # Heads that are switched off are followed into their repair, on answers to so
        # many requests.
        least = MIN_REQUESTS if self.factor == 0 else 1
        require_numbers(self, random_draws=1, ablation_prompts=least)
        a_share("--fractions", *self.fractions)
        if not self.fractions or not self.scopes:
            raise SettingsError(
                "at least one --fractions and one --scopes", "none", "Name one."
            )


@dataclass(frozen=True)
class BakeSettings:
    """Which heads are switched off for good, and what is tolerated."""

    fraction: float = 0.03
    """Share of all heads to switch off, rounded up: the top ones of the ranking."""

    baked_heads: str | None = None
    """Heads to scale in place of the top ones: layer:head, with commas."""

    factor: float = 0.0
    """What the heads are multiplied by."""

    form: Annotated[Form, Parameter(name="--as")] = "checkpoint"
    """A whole checkpoint, or a LoRA adapter of PEFT over the model, which a server can
    switch on for each request."""

    test_prompts: int = 96
    """At most so many harmful and so many harmless held-out prompts to test on."""

    max_over_refusal: float = 0.05
    """Refused when the share of harmless requests refused rises by more."""

    max_degenerate: float = 0.02
    """Refused when the share of broken answers rises by more."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self, test_prompts=1, max_over_refusal=0, max_degenerate=0)
        a_share("--fraction", self.fraction)
