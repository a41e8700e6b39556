"""Compare two reports figure by figure: `python benchmarks/same_report.py A B`.

Everything but the block `run` (times and paths) must be equal: numbers to 1e-6, texts,
lists and keys exactly. Prints every place that differs, and exits with 1 if any does.
For studies of one model and seed, made by two commits checked out beside each other.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOLERANCE = 1e-6


def differences(before: Any, after: Any, place: str = "report") -> Iterator[str]:
    """Yield one line for each place at which two JSON values differ."""
    numbers = isinstance(before, int | float) and isinstance(after, int | float)
    if numbers and not isinstance(before, bool) and not isinstance(after, bool):
        if not math.isclose(before, after, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            yield f"{place}: {before} and {after}"
    elif isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            if key not in before or key not in after:
                yield f"{place}.{key}: in one report alone"
            else:
                yield from differences(before[key], after[key], f"{place}.{key}")
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{place}: {len(before)} and {len(after)} entries"
        pairs = enumerate(zip(before, after, strict=False))
        for index, (one, other) in pairs:
            yield from differences(one, other, f"{place}[{index}]")
    elif before != after or isinstance(before, bool) != isinstance(after, bool):
        yield f"{place}: {before!r} and {after!r}"


def main(before: str, after: str) -> int:
    """Compare the reports of two studies, or two report files."""
    reports = []
    for name in (before, after):
        path = Path(name) / "report.json" if Path(name).is_dir() else Path(name)
        reports.append(json.loads(path.read_text(encoding="utf-8")))
        reports[-1].pop("run", None)
    found = sorted(differences(*reports))
    print("\n".join(found) or "equal but for `run`")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
