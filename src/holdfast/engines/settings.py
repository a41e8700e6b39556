"""The flags of an engine; this module loads no tensors."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from holdfast.errors import SettingsError
from holdfast.ranges import at_least, flag_of, require_numbers

COUNTS = ("endpoint_concurrency", "endpoint_attempts")


@dataclass(frozen=True)
class EngineSettings:
    """Who draws the answers, and how it is reached; the model stays who reads them."""

    engine: Literal["hf", "server", "vllm"] = "hf"
    """Who draws: hf (the model itself, in this process), server (an OpenAI-shaped
    server that holds the same model), vllm (the same checkpoint in vLLM, in this
    process)."""

    endpoint: Annotated[str | None, Parameter(show_default=False)] = None
    """For a server, its URL, such as http://localhost:8000/v1."""

    endpoint_model: Annotated[str | None, Parameter(show_default=False)] = None
    """For a server, the name of the model there. Default: the only one it serves."""

    endpoint_api_key_env: str = "OPENAI_API_KEY"
    """For a server, the environment variable with the key."""

    endpoint_concurrency: int = 32
    """For a server, rows under way at once."""

    endpoint_timeout: float = 600.0
    """For a server, seconds without a sign of it."""

    endpoint_attempts: int = 6
    """For a server, how often a row is asked for."""

    endpoint_unseeded: Annotated[bool, Parameter(negative=(), show_default=False)] = (
        False
    )
    """Go on with a server that drops the seed; no row can be drawn again then."""

    engine_tolerance: float = 0.25
    """Share of the first prompts whose greedy tokens may leave those of the model at
    no near-tie; beyond it the engine is refused."""

    vllm_arguments: Annotated[str | None, Parameter(show_default=False)] = None
    """For vllm, arguments of vllm.LLM as JSON, such as {"tensor_parallel_size": 8}."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self)
        for name in COUNTS:
            at_least(flag_of(name), getattr(self, name), 1)
        if self.endpoint_timeout <= 0:
            found = str(self.endpoint_timeout)
            raise SettingsError("--endpoint-timeout above 0", found, "Raise it.")
        if not 0 <= self.engine_tolerance <= 1:
            found = str(self.engine_tolerance)
            raise SettingsError("an --engine-tolerance from 0 to 1", found, "Mend it.")
        if (self.engine == "server") != (self.endpoint is not None):
            given = f"--endpoint {self.endpoint}" if self.endpoint else "no --endpoint"
            raise SettingsError(
                "--endpoint URL with --engine server, and only there",
                f"--engine {self.engine} and {given}",
                "Give both, or neither.",
            )


HERE = EngineSettings()
"""The engine of whoever names none: the model itself."""
