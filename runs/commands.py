"""Commands of `holdfast` that run once each, and what is kept of their results.

Kept are figures with their intervals, counts and yes or no; never a prompt, an answer
or a token of one. An outcome is written when a command has ended, so that a run that
was stopped goes on with the first command that has none.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.report.schema import is_finite
from holdfast.study import atomic_write_json

ENDINGS = {
    0: "done",
    3: "the model does not fit, or failed a check",
    4: "not enough evidence",
}
"""Exit statuses that are outcomes; after any other the command is to be run again."""
FIGURE = ("value", "low", "high", "n", "reason")
LABELS = ("scope", "condition", "suite", "attack", "kind", "name", "by")
"""Keys of words that are ours and say of what a figure is."""
VERDICTS = ("attack_succeeds", "cliff", "sparse")
"""Keys whose null says that it could not be told."""
NUMBERS = ("head_width", "layers_with_heads")
"""Keys of lists of numbers that say of what shape a model is; others may be tokens."""
MOST = 32
"""Parts of a list that are kept."""


def call(words: Sequence[str], log: Path) -> tuple[int, str]:
    """Run `holdfast` with its progress in a log; return exit status and output."""
    program = os.environ.get("HOLDFAST")
    command = [program] if program else [sys.executable, "-m", "holdfast"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as errors:
        ended = subprocess.run(
            [*command, *words], stdout=subprocess.PIPE, stderr=errors, check=False
        )
    return ended.returncode, ended.stdout.decode()


def outcome(
    place: Path,
    words: Sequence[str],
    names: Mapping[str, str],
    *,
    keep: Sequence[str] = (),
    writes: Path | None = None,
) -> dict[str, Any]:
    """Return the outcome of a command, which is run if it has none yet.

    Args:
        place: Where the outcome is kept, and the log of the command beside it.
        words: The command, without `--json`.
        names: What a record calls paths: long ones first.
        keep: Parts of the result that are kept; all by default.
        writes: A folder that the command wants empty: what a command that was stopped
            left there is taken away.
    """
    if place.exists():
        known: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        return known
    if writes is not None:
        shutil.rmtree(writes, ignore_errors=True)
    log, started = place.with_suffix(".log"), time.monotonic()
    status, output = call([*words, "--json"], log)
    seconds = time.monotonic() - started
    said = _complaint(log) if status else ""
    if status not in ENDINGS:
        sys.exit(f"Status {status}: {said or log} Run the same again to go on.")
    found: dict[str, Any] = json.loads(output) if status == 0 else {}
    made: dict[str, Any] = {
        "command": " ".join(words),
        "status": status,
        "ended": ENDINGS[status],
        "said": said,
        "seconds": round(seconds),
        "found": figures({key: found[key] for key in keep or found if key in found}),
    }
    # Labels may name a model by its path.
    made = json.loads(_renamed(json.dumps(made), names))
    atomic_write_json(place, made)
    return made


def figures(value: Any, key: str = "") -> Any:
    """Return the figures, counts, yes or no and labels of a result, and no other text.

    Of a list, the first `MOST` parts that have figures.
    """
    if isinstance(value, list) and key in NUMBERS:
        return value
    if isinstance(value, list):
        parts = [figures(each) for each in value[:MOST] if isinstance(each, dict)]
        return [each for each in parts if each] or None
    if not isinstance(value, dict):
        kept = isinstance(value, bool) or is_finite(value) or key in LABELS
        return value if kept else None
    if {"holds", "reason"} <= value.keys():
        # What a model is good for, and why not for the rest: words of ours.
        return {
            key: value[key] for key in ("holds", "reason") if value[key] is not None
        }
    if {"value", "low", "high"} <= value.keys():
        return {key: value[key] for key in FIGURE if value.get(key) is not None}
    named = {str(name): figures(each, str(name)) for name, each in value.items()}
    return {
        name: each
        for name, each in named.items()
        if each not in (None, {}) or (name in VERDICTS and value[name] is None)
    }


def _complaint(log: Path) -> str:
    """Return what a command ended with, if that was an error."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    mark = "holdfast: "
    said = [line.removeprefix(mark) for line in lines if line.startswith(mark)]
    return said[-1] if said else ""


def _renamed(text: str, names: Mapping[str, str]) -> str:
    for path, name in names.items():
        text = text.replace(path, name)
    return text
