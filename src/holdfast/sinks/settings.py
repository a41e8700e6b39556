"""The settings of `holdfast sinks`; this module loads no tensors."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from holdfast.flags import Sampling, Texts
from holdfast.ranges import require_numbers
from holdfast.rollout.settings import parse_columns


@dataclass(frozen=True)
class SinksSettings:
    """Which texts the sink mass is compared on, and how."""

    harmful: str
    """Rows with a prompt and a harmful response, and a thinking where the model thinks:
    any pool that `holdfast select` reads."""

    reference: str
    """Rows with a prompt and a reference response, a refusal or another safe one; best
    on the very prompts of --harmful."""

    pairing: Literal["prompt", "none"] = "prompt"
    """Compare two texts on one prompt over equal positions (prompt), or all harmful
    with all reference texts as the paper's code does (none), where length and prompt
    move the sink mass too."""

    positions: Literal["all", "response"] = "all"
    """Which tokens look back: all after the first, as published, or those after the
    prompt."""

    max_tokens: int | None = None
    """Texts are cut after so many tokens (the paper's code: 512). Default: not cut."""

    limit: int | None = None
    """At most so many prompts, chosen by content hash."""

    column: Texts = ()
    """FIELD=NAME for a field under another name, in both files: prompt, response,
    thinking. May be repeated."""

    system_prompt: str | None = None
    """System prompt of every conversation."""

    seed: Annotated[int, Sampling] = 0
    """Seed of the intervals."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self, max_tokens=2, limit=2)
        self.columns()

    def columns(self) -> dict[str, str]:
        """Return the column of each field that has one.

        Raises:
            SettingsError: If an entry is not FIELD=NAME, or a field is named twice.
        """
        return parse_columns(self.column)

    def kept(self) -> dict[str, Any]:
        """Return the settings on which a result depends; paths are no part of it."""
        found = asdict(self)
        return {k: v for k, v in found.items() if k not in ("harmful", "reference")}
