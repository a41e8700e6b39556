"""What `holdfast select` refuses before a model is loaded or a row scored."""

from pathlib import Path

from holdfast.data.pool import Pool
from holdfast.errors import SettingsError
from holdfast.select.settings import NEEDS_PROBE, SelectSettings
from holdfast.study import require_place


def budget_in_rows(settings: SelectSettings, n_rows: int) -> int:
    """Return how many rows are chosen."""
    budget = settings.rows_of(n_rows)
    if budget > n_rows:
        raise SettingsError(
            f"a --budget of at most {n_rows} rows, which is the whole pool",
            settings.budget,
            "Choose fewer.",
        )
    return budget


def check_output(output: Path, pool: Pool) -> None:
    """Refuse, before anything is scored, what chosen rows cannot be written to."""
    if output.suffix.lower() != ".jsonl":
        # The record and the table are named after it, and `finetune` reads it.
        raise SettingsError(
            "-o with the name of a .jsonl file",
            f"`{output.name}`",
            f"Write -o {output.stem}.jsonl.",
        )
    require_place(output, folder=False)
    if output.resolve() in [path.resolve() for path in pool.files]:
        raise SettingsError(
            "-o beside the pool", "a file of the pool itself", "Choose another name."
        )


def check_direction(settings: SelectSettings) -> None:
    """Refuse, before anything is scored, a selector without its probe."""
    if settings.by in NEEDS_PROBE and settings.direction is None:
        raise SettingsError(
            f"a probe to select by {settings.by}",
            "no --direction",
            "Name a study of this model that has one: `holdfast audit MODEL -o STUDY`, "
            "then --direction STUDY.",
        )


def scores_root(settings: SelectSettings, output: Path) -> Path:
    """Return the folder of the scores."""
    if settings.scores is not None:
        return Path(settings.scores).expanduser()
    return output.with_suffix(".scores")
