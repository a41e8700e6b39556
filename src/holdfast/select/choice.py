"""From scored shards to the chosen rows, with no more in memory than may be chosen."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from holdfast.data.pool import Pool
from holdfast.data.splits import shingles
from holdfast.errors import SettingsError, TooFewExamplesError
from holdfast.rollout.rows import ATTACK_SUCCESS_OUTCOMES
from holdfast.select.scores import SHORT
from holdfast.select.selectors import (
    Best,
    BestOfStream,
    distinct,
    quotas,
    uniform_score,
)
from holdfast.select.settings import SelectSettings
from holdfast.select.shards import ShardFolder

LISTED = 5
"""Places that are named of each kind of row that is left out."""
WORDS = 3


class Chosen(NamedTuple):
    """A chosen row."""

    row: int  # Its number in the pool.
    score: float
    category: str


@dataclass
class Counted:
    """What a pass over the scores counted."""

    # Rows that may be chosen, by category.
    eligible: Counter[str] = field(default_factory=Counter)
    # Rows that may not, by kind.
    left_out: Counter[str] = field(default_factory=Counter)
    # Where the first of each kind stand.
    places: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """The scores of a pool on disk."""

    settings: SelectSettings  # What is chosen by.
    scored: ShardFolder  # Finished shards of scores.
    drawn: ShardFolder | None  # Finished shards of what the model drew, or None.

    def tables(self) -> Iterator[pa.Table]:
        """Yield every shard: scores, what was drawn, key, and who may be chosen.

        Columns `score` (what the ranking is by, null for a row that may not be chosen)
        and `left_out` (why it may not) are added.
        """
        for index in range(self.scored.n_shards):
            table = self.scored.read(index)
            if self.drawn is not None:
                other = self.drawn.read(index).drop_columns(["row"])
                for name in other.column_names:
                    table = table.append_column(name, other.column(name))
            by, seed, rows = self.settings.by, self.settings.seed, table.to_pylist()
            scores = [_score(by, row, seed) for row in rows]
            reasons = list(map(self._left_out, rows, scores))
            pairs = zip(scores, reasons, strict=True)
            kept = [None if why else score for score, why in pairs]
            table = table.append_column("score", pa.array(kept, pa.float64()))
            yield table.append_column("left_out", pa.array(reasons, pa.string()))

    def category(self, name: str | None) -> str:
        """Return the category that a row is ranked in; one for all without quota."""
        return (name or "none") if self.settings.quota != "none" else ""

    def forced(self) -> int | None:
        """Count the thoughts that were closed by force; None where none was drawn."""
        if self.drawn is None:
            return None
        column = ["forced_close"]
        shards = [self.drawn.read(index, column) for index in self.drawn.done()]
        return sum(pc.sum(shard.column(0)).as_py() or 0 for shard in shards)

    def _left_out(self, row: Mapping[str, Any], score: float | None) -> str | None:
        """Return why a row may not be chosen; None if it may."""
        if row.get("draw_kind") is not None:
            return str(row["draw_kind"])
        kind, by = row["kind"], self.settings.by
        if kind not in (None, SHORT):
            return str(kind)
        flagged = by in ("judge", "random-flagged") or self.settings.flagged_only
        if flagged and not row["flagged"]:
            return "not flagged by the judge"
        if by == "rules" and row["rules_outcome"] not in ATTACK_SUCCESS_OUTCOMES:
            return "a refusal by written rules"
        if score is None or math.isnan(score):
            return str(kind or "no score")
        return None


def _score(by: str, row: Mapping[str, Any], seed: int) -> float | None:
    """Return the score of a row under a selector; higher is chosen first."""
    if by in ("random", "random-flagged", "rules"):
        digest = hashlib.sha256(f"{seed}/{row['content']:016x}".encode()).digest()
        return uniform_score(int.from_bytes(digest[:8], "big"))
    if by == "judge":
        # Without a score all flagged rows are equal, and the tie key decides.
        return row["judge_score"] or 0.0
    if by == "final":
        # The logit orders as the score does, and does not saturate.
        return None if row["final_logit"] is None else -row["final_logit"]
    if by == "length":
        if row["n_thinking"] is None:
            return None
        return float(row["n_thinking"] + row["n_answer"])
    value: float | None = row[by]
    return value


class Selection(NamedTuple):
    """The chosen rows, the best first, and what was decided on the way."""

    chosen: tuple[Chosen, ...]
    n_tied: int
    n_similar: int
    counted: Counted


def choose_rows(scores: Scores, pool: Pool, budget: int) -> Selection:
    """Choose the rows of a budget.

    `pool`: The pool, whose prompts are compared where near copies are passed over.
    """
    counted = _count(scores)
    eligible = counted.eligible
    if eligible.total() < budget:
        raise _too_few(budget, eligible.total(), counted)
    if len(eligible) > budget:
        raise SettingsError(
            f"at most {budget} categories for a budget of {budget} rows",
            f"{len(eligible)} categories",
            "Raise --budget, or leave out --quota.",
        )
    wanted = quotas(eligible, budget, scores.settings.quota)
    similar = scores.settings.similar
    extra, n_tied = 0, None
    while True:
        kept = {
            name: min(eligible[name], n + (extra if similar else 0))
            for name, n in wanted.items()
        }
        best = _best(scores, kept)
        chosen, n_similar = _distinct(best, wanted, pool, similar)
        if n_tied is None:
            # At the bar of the budget itself, before anything was passed over.
            n_tied = sum(each.n_tied for each in best.values())
        if len(chosen) == budget:
            chosen.sort(key=lambda each: -each.score)
            return Selection(tuple(chosen), n_tied, n_similar, counted)
        if all(kept[name] == eligible[name] for name in wanted):
            raise _too_few(budget, len(chosen), counted, n_similar)
        # Near copies have used up the candidates: look further down.
        extra = 2 * extra + budget + 64


def _count(scores: Scores) -> Counted:
    counted = Counted()
    for table in scores.tables():
        columns = table.select(["left_out", "category", "place"]).to_pydict()
        for why, category, place in zip(*columns.values(), strict=True):
            if why is None:
                counted.eligible[scores.category(category)] += 1
                continue
            counted.left_out[why] += 1
            places = counted.places.setdefault(why, [])
            if len(places) < LISTED:
                places.append(place)
    return counted


def _best(scores: Scores, kept: dict[str, int]) -> dict[str, Best]:
    streams = {name: BestOfStream(n) for name, n in kept.items()}
    for table in scores.tables():
        columns = [table.column(key).to_numpy() for key in ("score", "content", "row")]
        categories = table.column("category").to_pylist()
        names = np.array([scores.category(name) for name in categories])
        for name, stream in streams.items():
            here = names == name
            if here.any():
                stream.update(*(column[here] for column in columns))
    return {name: stream.best() for name, stream in streams.items()}


def _distinct(
    best: dict[str, Best], wanted: dict[str, int], pool: Pool, similar: float
) -> tuple[list[Chosen], int]:
    """Take as many of each category as wanted, near copies passed over."""
    chosen: list[Chosen] = []
    n_similar = 0
    sets: dict[int, frozenset[int]] = {}
    if similar:
        candidates = {row for each in best.values() for row in each.rows.tolist()}
        sets = {
            row.row: frozenset(map(_hash, shingles(row.prompt, WORDS)))
            for row in pool.rows(candidates.__contains__)
        }
    for name, each in best.items():
        rows, values = each.rows.tolist(), each.scores.tolist()
        places: Sequence[int] = range(min(wanted[name], len(rows)))
        if similar:
            places, passed = distinct(
                [sets[row] for row in rows], wanted[name], similar
            )
            n_similar += len(passed)
        chosen += [Chosen(rows[place], values[place], name) for place in places]
    return chosen, n_similar


def _hash(gram: tuple[str, ...]) -> int:
    # Python's own hash of a text differs from process to process.
    digest = hashlib.blake2b("\0".join(gram).encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:8], "big")


def _too_few(
    budget: int, found: int, counted: Counted, n_similar: int = 0
) -> TooFewExamplesError:
    reasons = [f"{n} {why}" for why, n in counted.left_out.most_common()]
    if n_similar:
        reasons.append(f"{n_similar} near copies of better rows")
    left = f"; left out: {', '.join(reasons)}" if reasons else ""
    return TooFewExamplesError(
        f"{budget} rows that may be chosen",
        f"{found}{left}",
        "Lower --budget, or widen the pool. The scores are kept.",
    )
