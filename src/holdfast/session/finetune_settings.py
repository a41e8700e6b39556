"""The settings of `holdfast finetune`; nothing heavy is imported here."""

from dataclasses import dataclass, field
from typing import Annotated

from cyclopts import Parameter

from holdfast.errors import SettingsError
from holdfast.ranges import at_least, require_numbers
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

    defense_data: str | None = None
    """Rows of the same shape with a safe answer, for a defense that trains on such
    answers or compares with them."""

    defense_harmful: str | None = None
    """Rows with a harmful answer to the prompts of --defense-data, for a defense that
    compares the two."""

    column: Annotated[
        tuple[str, ...],
        Parameter(negative=(), consume_multiple=False, show_default=False),
    ] = ()
    """FIELD=NAME for a field under another name: prompt, response, thinking. May be
    repeated."""

    system_prompt: str | None = None
    """System prompt of every conversation."""

    keep_checkpoints: bool = False
    """Keep every checkpoint (--save-every) in OUTPUT.checkpoints when all is done, for
    example for `holdfast sinks`. Each is a model with the state of its optimiser."""

    recipe: Annotated[Recipe, Parameter(name="*")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self)
        at_least("--benign-ratio", self.benign_ratio, 0)
        self.columns()
        self._check_defense()

    def _check_defense(self) -> None:
        options = self.recipe.options()
        for flag, needed, given in (
            ("--defense-data", options.reference, self.defense_data),
            ("--defense-harmful", options.harmful, self.defense_harmful),
        ):
            if needed == (given is not None):
                continue
            defense = f"--defense {self.recipe.defense}"
            asked = " ".join(
                f"--defense-option {o}" for o in self.recipe.defense_option
            )
            raise SettingsError(
                f"{flag} with rows for {defense}" if needed else f"no {flag}",
                "none"
                if needed
                else f"one, which {' '.join((defense, asked)).strip()} does not read",
                "Name a file of such rows." if needed else "Drop it.",
            )

    def columns(self) -> dict[str, str]:
        """Return the column of each field that has one.

        Raises:
            SettingsError: If an entry is not FIELD=NAME, or a field is named twice.
        """
        return parse_columns(self.column)
