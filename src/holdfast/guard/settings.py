"""The settings of `holdfast guard`; this module loads no tensors."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from holdfast.errors import SettingsError
from holdfast.flags import Shares, Texts
from holdfast.ranges import require_numbers


@dataclass(frozen=True)
class GuardFitSettings:
    """On what detectors are fitted, and how often they may be wrong."""

    rates: Shares = (0.01, 0.05)
    """Rates of false positives that thresholds are made for. Default: 0.01, 0.05."""

    min_calibration: int = 1000
    """Fewest benign requests that set the thresholds."""

    min_train: int = 100
    """Fewest benign requests that detectors are fitted on."""

    wrapped: Annotated[bool, Parameter(negative=())] = False
    """Fit and calibrate on benign requests in wrappers as well. Without it they are
    a domain that was never seen."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self, min_calibration=1, min_train=2)
        if not self.rates or not all(0 < rate < 1 for rate in self.rates):
            raise SettingsError(
                "--rates between 0 and 1",
                ", ".join(str(rate) for rate in self.rates) or "none",
                "For example 0.01 0.05.",
            )


@dataclass(frozen=True)
class GuardEvaluateSettings:
    """Which attacks choose a detector, and on which others it is reported."""

    choose_on: Texts = ()
    """An attack family (wrapper) that the detector to recommend is chosen on; may be
    repeated. All others report it. Default: every second family by name."""

    min_test: int = 1000
    """Fewest benign test requests without a warning."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self, min_test=1)
