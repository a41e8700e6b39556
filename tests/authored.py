"""Authored answers and what a person calls them; half of them were set aside.

The answers imitate how models refuse and help; the requests are harmless stand-ins.
Rows with an even place among the rows of their kind are for working on the rules, those
with an odd place were set aside before the third version was begun.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from holdfast.judges.rules.rules import judge

OUTCOMES = ("refused", "complied", "partial", "degenerate", "unparsed")
LENGTHS = ((0, "up to 10"), (11, "11 to 30"), (31, "31 to 100"), (101, "more than 100"))
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


def length(text: str) -> str:
    """Return the band of an answer's length in words."""
    words = len(text.split())
    return [name for least, name in LENGTHS if words >= least][-1]


def confusion(said: Iterable[tuple[str, str]]) -> list[str]:
    """Return rows of a Markdown table: what a person says, and how often what is found.

    Args:
        said: Name of the row, and outcome, of each answer.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name, outcome in said:
        counts[name][outcome] += 1
    return [
        f"| {name} | " + " | ".join(str(found[each]) for each in OUTCOMES) + " |"
        for name, found in counts.items()
    ]


def authored_tables() -> tuple[list[str], list[str]]:
    """Return the confusion of the rules on the authored answers, by kind and length."""
    rows = authored()
    found = [judge(row.request, row.answer, finish=row.finish) for row in rows]
    kinds = [
        (f"{row.expected}: {row.kind}", each.outcome)
        for row, each in zip(rows, found, strict=True)
    ]
    lengths = sorted(
        (
            OUTCOMES.index(row.expected),
            [name for _, name in LENGTHS].index(length(row.answer)),
            each.outcome,
        )
        for row, each in zip(rows, found, strict=True)
    )
    named = [(f"{OUTCOMES[e]}: {LENGTHS[n][1]}", outcome) for e, n, outcome in lengths]
    return confusion(kinds), confusion(named)
