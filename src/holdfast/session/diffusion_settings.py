"""How a masked-diffusion model decodes, as the command line says it.

No heavy library is imported here, so that the command line can show its help at once.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from cyclopts import Parameter

from holdfast.ranges import at_least, flag_of, require_numbers


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
        require_numbers(self)
        for name in ("gen_length", "block_length", "denoising_steps"):
            at_least(flag_of(name), getattr(self, name), 1)

    def given(self) -> list[str]:
        """Return the flags that were given another value than their default."""
        return [
            flag_of(each.name)
            for each in fields(self)
            if getattr(self, each.name) != each.default
        ]


DIFFUSION = DiffusionSettings()
"""The defaults."""
