"""Write an evaluation in the format of another tool."""

from pathlib import Path

from holdfast.errors import InputError
from holdfast.interop.inspect_log import require_inspect, write_log
from holdfast.session.evaluation_sources import EVALUATED, TABLE, is_evaluated
from holdfast.study import Study, require_place

FORMATS = ("inspect",)


def run(place: Path, to: str = "inspect", output: Path | None = None) -> list[Path]:
    """Write the evaluation of a study as a log of inspect_ai.

    Args:
        place: The study.
        to: The format; `inspect` is the only one.
        output: Folder to write to; by default `inspect` in the study.

    Returns:
        The files that were written.

    Raises:
        InputError: If the study has no evaluation that is done.
        EnvironmentProblem: If inspect_ai is not installed.
        StorageError: If the folder cannot be written.
    """
    if output is not None:
        require_place(output / "log", folder=False)
    study = Study.open(place)
    if to not in FORMATS:
        raise InputError("a format of inspect", f"`{to}`", "Leave out --to.")
    if not is_evaluated(study):
        raise InputError(
            f"an evaluation in {place}",
            "none that is done",
            "Run `holdfast evaluate MODEL -o STUDY` first.",
        )
    require_inspect()
    block = study.read_json(EVALUATED)
    record = study.record("generate")
    # inspect_ai reads a name as time, task and id, and a dash would end the id.
    label = "".join(c for c in block["judge"]["label"] if c.isalnum())
    day = record["started"].replace(":", "-")
    path = (output or study.path("inspect")) / f"{day}_holdfast-evaluation_{label}.eval"
    rows = study.read_table(TABLE).to_pylist()
    return [write_log(rows, block, study.manifest["model"], record["started"], path)]
