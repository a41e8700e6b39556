"""What every engine can do: prompts in, frozen completions out, whoever decodes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from holdfast.errors import SettingsError
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Completion, Sampling
from holdfast.models.model import Adapter
from holdfast.report.progress import Tick

Messages = tuple[Mapping[str, str], ...]


class Ask(NamedTuple):
    """One row that an engine is asked for."""

    token_ids: tuple[int, ...]  # The prompt under the chat template.
    seed: int  # Seed of the row.
    # The same prompt before it was rendered, for a server that renders it itself; empty
    # where it holds more than a chat template can write.
    messages: Messages = ()
    condition: str | None = None  # The adapter that answers; None for the model itself.


class Around(NamedTuple):
    """What an engine is told beside what it is asked; an engine may need none of it."""

    batch_size: int = 32  # Rows decoded together, where that is for us to say.
    # Whether the prompts hold their thinking and its end.
    thinking_done: bool = False
    told: Callable[[Tick], None] | None = None  # Told of what is done.
    # Told which row nobody answered, by its place, and why; it is in no batch then.
    failed: Callable[[int, str], None] | None = None
    # File that keeps every finished row until its batch is done.
    kept: Path | None = None


PLAINLY = Around()
"""Nothing but what is asked."""


@runtime_checkable
class Engine(Protocol):
    """Whoever draws completions.

    Attributes:
        name: Its name, as `--engine` has it.
        rows_at_once: Rows of a batch; None for as many as suits the model here.
    """

    name: str
    rows_at_once: int | None

    def draw(
        self, asks: Sequence[Ask], sampling: Sampling, around: Around = PLAINLY
    ) -> Iterator[list[Completion]]:
        """Complete prompts, batch by batch, under the contract of `generate`.

        Raises:
            SettingsError: If it does not hold the adapter of a row.
        """
        ...

    def hold(self, adapters: Mapping[str, Path]) -> None:
        """Take adapters, by the names that rows ask for, in place of earlier ones.

        Raises:
            SettingsError: If it takes none, or not these.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """Return what rows depend on beside the model, known before anything starts."""
        ...

    def record(self) -> dict[str, Any]:
        """Return what study and report say of it."""
        ...


@runtime_checkable
class ReadsText(Protocol):
    """An engine that may tell its text alone, which is tokenised again then.

    Attributes:
        apart: Whether each region is tokenised by itself.
    """

    apart: bool

    def fit_text(self, rows: Sequence[Completion]) -> None:
        """Choose how to tokenise, by rows that the model itself drew."""
        ...


class HfEngine:
    """The model itself, in this process."""

    name = "hf"

    def __init__(self, adapter: Adapter) -> None:
        """Hold the model."""
        self.adapter = adapter
        self.rows_at_once: int | None = None

    def draw(
        self, asks: Sequence[Ask], sampling: Sampling, around: Around = PLAINLY
    ) -> Iterator[list[Completion]]:
        """Complete prompts as `generate` does."""
        require_no_condition(self.name, asks)
        return generate(
            self.adapter,
            [(each.token_ids, each.seed) for each in asks],
            sampling,
            batch_size=around.batch_size,
            thinking_done=around.thinking_done,
            told=around.told,
        )

    def hold(self, adapters: Mapping[str, Path]) -> None:
        """Refuse adapters: heads are scaled while the model runs."""
        raise no_adapters(self.name, next(iter(adapters), None))

    def identity(self) -> dict[str, Any]:
        """Return nothing: rows depend on the model alone."""
        return {}

    def record(self) -> dict[str, Any]:
        """Return its name."""
        return {"name": self.name}


def require_no_condition(name: str, asks: Sequence[Ask]) -> None:
    """Refuse an adapter where the engine holds none."""
    for each in asks:
        if each.condition is not None:
            raise no_adapters(name, each.condition)


def no_adapters(name: str, condition: str | None) -> SettingsError:
    """Return the error of an engine that holds no adapter."""
    return SettingsError(
        f"an engine that holds the adapter {condition!r}",
        f"--engine {name}",
        "Use an engine that takes adapters.",
    )
