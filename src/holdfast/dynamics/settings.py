"""The settings of `holdfast signal`; this module loads no tensors."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from holdfast.errors import SettingsError
from holdfast.ranges import require_numbers


@dataclass(frozen=True)
class SignalSettings:
    """Which states are read, and against which anchors they are held."""

    steps: int = 32
    """Steps of the signal: tokens, or points of the settled share."""

    mode: Literal["paper", "repo", "robust"] = "paper"
    """As the paper says, as its authors' code does, or centred and without the few
    dimensions that outgrow all others."""

    region: Literal["answer", "completion"] = "answer"
    """Where the steps begin: at the answer, or at the thinking if there is one."""

    time: Literal["step", "fraction"] = "step"
    """What a step is: a step of decoding, or a share of the response that is
    settled, which alone is the same for every sampler."""

    anchors: str | None = None
    """Study whose anchors are used; they must be of this model and these settings.
    Default: fitted here, on training requests that nothing else is read off."""

    anchor_requests: int = 400
    """Most requests behind an anchor; never more than half of the training ones."""

    min_anchors: int = 20
    """Fewest requests behind an anchor."""

    unfiltered: Annotated[bool, Parameter(negative=())] = False
    """Take all harmless and all harmful requests for the anchors, whatever the
    answer; for a model that refuses nothing."""

    perplexity: bool = True
    """Read how likely the model finds each prompt, for the filter that a detector
    has to beat; costs one more pass over the prompts."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self, steps=2, anchor_requests=1, min_anchors=1)
        if self.anchors is None and self.anchor_requests < self.min_anchors:
            raise SettingsError(
                f"--anchor-requests of {self.min_anchors} or more, as --min-anchors "
                "asks for",
                str(self.anchor_requests),
                "Raise the one or lower the other.",
            )
