"""Tables of what the rules make of labelled answers: by kind, by length, by file.

Usage: judge_confusion.py [FILE ...]

Prints the authored answers of the tests by kind and length, as docs/evaluation.md has
them, and for each FILE of XSTest annotations the answers by label and length.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "judges"))

from authored import LENGTHS, authored_tables, confusion, length
from holdfast.judges.rules.rules import judge


def of_file(path: Path) -> list[str]:
    """Return the confusion on one file of annotations, by label and length."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    order = [name for _, name in LENGTHS]
    said = sorted(
        (
            row["final_label"][2:].replace("_", " "),
            order.index(length(row["completion"])),
            judge(row["prompt"], row["completion"]).outcome,
        )
        for row in rows
    )
    return confusion((f"{label}: {order[n]}", outcome) for label, n, outcome in said)


def main(files: list[str]) -> None:
    """Print all tables."""
    for rows in authored_tables():
        print("\n".join(rows), end="\n\n")
    for name in files:
        print(name, *of_file(Path(name)), sep="\n", end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
