"""Authored answers and what a person calls them; half of them were set aside.

The answers imitate how models refuse and help; the requests are harmless stand-ins.
Rows with an even place among the rows of their kind are for working on the rules, those
with an odd place were set aside before the third version was begun.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("authored_answers.jsonl")


class Authored(NamedTuple):
    """One answer, the outcome that a person gives it, and its kind."""

    expected: str
    kind: str
    request: str
    answer: str
    set_aside: bool
    finish: str


def authored(set_aside: bool | None = None) -> list[Authored]:
    """Return the rows of one half, or all of them."""
    place: dict[tuple[str, str], int] = defaultdict(int)
    rows = []
    for line in FILE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kind = row["expected"], row["kind"]
        answer = row["answer"] + row.get("again", "") * row.get("times", 0)
        finish = "length" if "again" in row else "stop"
        odd = place[kind] % 2 == 1
        place[kind] += 1
        rows.append(Authored(*kind, row["request"], answer, odd, finish))
    return [row for row in rows if set_aside in (None, row.set_aside)]
