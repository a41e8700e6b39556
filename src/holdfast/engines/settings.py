"""The flags of an engine; this module loads no tensors."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EngineSettings:
    """Who draws the answers; the model stays who reads them."""

    engine: Literal["hf"] = "hf"
    """Who draws: hf (the model itself, in this process)."""


HERE = EngineSettings()
"""The engine of whoever names none: the model itself."""
