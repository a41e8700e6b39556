"""The flags of an engine; this module loads no tensors."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter


@dataclass(frozen=True)
class EngineSettings:
    """Who draws the answers; the model stays who reads them."""

    engine: Literal["hf", "vllm"] = "hf"
    """Who draws: hf (the model itself, in this process), vllm (the same checkpoint in
    vLLM, in this process)."""

    vllm_arguments: Annotated[str | None, Parameter(show_default=False)] = None
    """For vllm, arguments of vllm.LLM as JSON, such as {"tensor_parallel_size": 8}."""


HERE = EngineSettings()
"""The engine of whoever names none: the model itself."""
