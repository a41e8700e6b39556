"""The settings of `holdfast finetune`; nothing heavy is imported here."""

from dataclasses import dataclass, field
from typing import Annotated

from cyclopts import Parameter

from holdfast.errors import SettingsError
from holdfast.session.select_settings import parse_columns
from holdfast.training.recipe import Recipe


@dataclass(frozen=True)
class FinetuneSettings:
    """What a model is trained on, and how."""

    data: str
    """Rows with a prompt, a thinking and a safe response: what `holdfast select`
    wrote, or any pool that it reads."""

    benign: str | None = None
    """Harmless rows of the same shape, mixed in so that safety is not paid for with
    over-refusal."""

    benign_ratio: float = 1.0
    """Harmless rows for each row of --data."""

    column: Annotated[
        tuple[str, ...],
        Parameter(negative=(), consume_multiple=False, show_default=False),
    ] = ()
    """FIELD=NAME for a field under another name: prompt, response, thinking. May be
    repeated."""

    system_prompt: str | None = None
    """System prompt of every conversation."""

    recipe: Annotated[Recipe, Parameter(name="*")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.benign_ratio < 0:
            raise SettingsError(
                "--benign-ratio of 0 or more", str(self.benign_ratio), "Raise it."
            )
        self.columns()

    def columns(self) -> dict[str, str]:
        """Return the column of each field that has one.

        Raises:
            SettingsError: If an entry is not FIELD=NAME, or a field is named twice.
        """
        return parse_columns(self.column)
