"""The blocks `signal` and `guard` of the report, as far as they are there."""

from typing import Any

from holdfast.session.head_assembly import is_current
from holdfast.study import Study

SIGNAL, GUARD = "signal", "guard"
FILES = {SIGNAL: "signal.json", GUARD: "guard/evaluation.json"}
STAGES = {SIGNAL: "signal", GUARD: "guard_evaluate"}
EXAMPLES = "signal_examples.json"


def signal_files(study: Study) -> list[str]:
    """Return the files that the report reads of the signal and its detectors."""
    found = [FILES[name] for name in FILES if is_current(study, STAGES[name])]
    return [*found, EXAMPLES] if FILES[SIGNAL] in found else found


def signal_blocks(study: Study) -> dict[str, Any]:
    """Return what the stages `signal` and `guard` have found, if they have run.

    Args:
        study: A study whose stages have run, as far as they could.
    """
    read = signal_files(study)
    return {name: study.read_json(FILES[name]) for name in FILES if FILES[name] in read}
