"""The settings of `holdfast guard bundle` and `live`; this module loads no tensors."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from holdfast.errors import SettingsError
from holdfast.flags import Several, Shares, Texts
from holdfast.ranges import require_numbers


@dataclass(frozen=True)
class GuardBundleSettings:
    """Which live detectors are fitted, and how often they may stop a benign request."""

    rates: Shares = (0.01, 0.05)
    """Rates of false stops by request that thresholds are made for. Default: 0.01,
    0.05."""

    min_calibration: int = 1000
    """Fewest benign requests that set the thresholds."""

    fit_on: Texts = ()
    """An attack family (wrapper) whose answers the direction of harm is fitted on; may
    be repeated. Default: every second family by name, so that others are unseen."""

    window: int = 16
    """Tokens of the rolling mean, and of the window of the segment rule."""

    support: int = 8
    """Tokens of a window that must agree before the segment rule fires."""

    band: float = 1.0
    """Distance from a direction's boundary, in logits, within which a token counts as
    hesitation."""

    acts_on: Annotated[str | None, Parameter(show_default=False)] = None
    """The detector on whose firing a policy acts; `any` is all of them, under one
    threshold. Default: the one that finds most attacks of the families of --fit-on, on
    requests that nothing was fitted on."""

    edit: Annotated[str | None, Parameter(show_default=False)] = None
    """JSON file of heads to scale under the policies steer and redraw, as
    {"heads": [[layer, head], ...], "factor": 0}."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self, min_calibration=1, window=1, support=1, band=0)
        if not self.rates or not all(0 < rate < 1 for rate in self.rates):
            raise SettingsError(
                "--rates between 0 and 1",
                ", ".join(str(rate) for rate in self.rates) or "none",
                "For example 0.01 0.05.",
            )
        if self.support > self.window:
            raise SettingsError(
                "--support of at most --window tokens",
                f"{self.support} of {self.window}",
                "Lower the one or raise the other.",
            )


Policies = Annotated[tuple[Literal["stop", "refuse", "steer", "redraw"], ...], Several]


@dataclass(frozen=True)
class GuardLiveSettings:
    """What is tried live, and at which rate."""

    guard: str
    """The bundle, a folder that `holdfast guard bundle` wrote."""

    policies: Policies = ("stop",)
    """A policy to answer under; may be repeated. Default: stop."""

    rate: float = 0.01
    """Rate of false stops by request whose thresholds are used."""

    limit: int | None = None
    """At most so many rows of each kind are answered, chosen by content hash."""

    min_test: int = 1000
    """Fewest benign test requests without a warning."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self, limit=1, min_test=1)
        if not 0 < self.rate < 1:
            raise SettingsError("--rate between 0 and 1", str(self.rate), "Say 0.01.")
