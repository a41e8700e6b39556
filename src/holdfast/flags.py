"""What flags have in common: where help lists them, and how often they are given."""

from typing import Annotated

from cyclopts import Group, Parameter

_NAMES = (
    "Prompts",
    "Sampling",
    "Model",
    "Engine",
    "Probe",
    "Heads",
    "Commitment",
    "Judge",
    "Diffusion",
    "Signal",
    "Detectors",
    "Selection",
    "Serving",
    "Training",
    "Output",
)
GROUPS = {name: Group(name, sort_key=place) for place, name in enumerate(_NAMES)}
Sampling = Parameter(group=GROUPS["Sampling"])
Prompting = Parameter(group=GROUPS["Prompts"])
Several = Parameter(negative=(), consume_multiple=False, show_default=False)
Texts = Annotated[tuple[str, ...], Several]
"""Texts, one for each time that the flag is given."""
Shares = Annotated[
    tuple[float, ...],
    Parameter(negative=(), consume_multiple=True, show_default=False),
]
"""Numbers behind one flag."""


def flat(group: str) -> Parameter:
    """Return how the fields of a settings class become flags, in a group of help."""
    return Parameter(name="*", group=GROUPS[group])
