"""From scored shards to the chosen rows, with no more in memory than may be chosen."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

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
    uniform_scores,
)
from holdfast.select.settings import SelectSettings
from holdfast.select.shards import ShardFolder

LISTED = 5
WORDS = 3
ALL = ""


class Chosen(NamedTuple):
    """A chosen row: its number in the pool, its score, its category."""

    row: int
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
            score, why = self._score(table)
            table = table.append_column("score", pa.array(score, pa.float64()))
            yield table.append_column("left_out", pa.array(why, pa.string()))

    def forced(self) -> int | None:
        """Count the thoughts that were closed by force; None where none was drawn."""
        if self.drawn is None:
            return None
        shards = [self.drawn.read(i, ["forced_close"]) for i in self.drawn.done()]
        return sum(bool(each) for t in shards for each in t.column(0).to_pylist())

    def _score(self, table: pa.Table) -> tuple[list[float | None], list[str | None]]:
        by, columns = self.settings.by, table.to_pydict()
        n = table.num_rows
        values = _values(by, columns, self.settings.seed)
        scores: list[float | None] = []
        reasons: list[str | None] = []
        for place in range(n):
            why = self._left_out(columns, place)
            value = values[place]
            if why is None and (value is None or value != value):
                why = columns["kind"][place] or "no score"
            reasons.append(why)
            scores.append(value if why is None else None)
        return scores, reasons

    def _left_out(self, columns: dict[str, list[Any]], place: int) -> str | None:
        """Return why a row may not be chosen, whatever its score; None if it may."""
        drawn = columns.get("draw_kind")
        if drawn is not None and drawn[place] is not None:
            return str(drawn[place])
        kind = columns["kind"][place]
        if kind not in (None, SHORT):
            return str(kind)
        by = self.settings.by
        flagged = by in ("judge", "random-flagged") or self.settings.flagged_only
        if flagged and not columns["flagged"][place]:
            return "not flagged by the judge"
        if (
            by == "rules"
            and columns["rules_outcome"][place] not in ATTACK_SUCCESS_OUTCOMES
        ):
            return "a refusal by written rules"
        return None


def _values(by: str, columns: dict[str, list[Any]], seed: int) -> list[float | None]:
    """Return the score of every row under a selector; higher is chosen first."""
    if by in ("random", "random-flagged", "rules"):
        return uniform_scores(_hashes(columns["content"], seed)).tolist()
    if by == "judge":
        # Without a score all flagged rows are equal, and the tie key decides.
        return [value or 0.0 for value in columns["judge_score"]]
    if by == "final":
        # The logit orders as the score does, and does not saturate.
        return [None if v is None else -v for v in columns["final_logit"]]
    if by == "length":
        pairs = zip(columns["n_thinking"], columns["n_answer"], strict=True)
        return [None if a is None else float(a + b) for a, b in pairs]
    return columns[by]


def _hashes(contents: list[int], seed: int) -> Iterator[int]:
    for content in contents:
        digest = hashlib.sha256(f"{seed}/{content:016x}".encode()).digest()
        yield int.from_bytes(digest[:8], "big")


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
    by_category = scores.settings.quota != "none"
    counted = _count(scores, by_category)
    total = sum(counted.eligible.values())
    if total < budget:
        raise _too_few(budget, total, counted)
    if len(counted.eligible) > budget:
        raise SettingsError(
            f"at most {budget} categories for a budget of {budget} rows",
            f"{len(counted.eligible)} categories",
            "Raise --budget, or leave out --quota.",
        )
    wanted = quotas(counted.eligible, budget, scores.settings.quota)
    similar = scores.settings.similar
    extra, n_tied = 0, None
    while True:
        kept = {
            name: min(counted.eligible[name], n + (extra if similar else 0))
            for name, n in wanted.items()
        }
        found = _best(scores, kept, by_category)
        chosen, n_similar = _distinct(found, wanted, pool, similar)
        if n_tied is None:
            # At the bar of the budget itself, before anything was passed over.
            n_tied = sum(best.n_tied for best in found.values())
        if len(chosen) == budget:
            chosen.sort(key=lambda each: -each.score)
            return Selection(tuple(chosen), n_tied, n_similar, counted)
        if all(kept[name] == counted.eligible[name] for name in wanted):
            raise _too_few(budget, len(chosen), counted, n_similar)
        # Near copies have used up the candidates: look further down.
        extra = 2 * extra + budget + 64


def _count(scores: Scores, by_category: bool) -> Counted:
    counted = Counted()
    for table in scores.tables():
        columns = table.select(["left_out", "category", "place"]).to_pydict()
        for why, category, place in zip(*columns.values(), strict=True):
            if why is None:
                counted.eligible[_name(category, by_category)] += 1
                continue
            counted.left_out[why] += 1
            places = counted.places.setdefault(why, [])
            if len(places) < LISTED:
                places.append(place)
    return counted


def _best(scores: Scores, kept: dict[str, int], by_category: bool) -> dict[str, Best]:
    streams = {name: BestOfStream(n) for name, n in kept.items()}
    for table in scores.tables():
        values = torch.from_numpy(
            np.array(table.column("score").to_numpy(), dtype=np.float64)
        )
        rows = torch.from_numpy(np.array(table.column("row").to_numpy()))
        content = np.array(table.column("content").to_numpy())
        ties = torch.from_numpy((content >> np.uint64(1)).astype(np.int64))
        if not by_category:
            streams[ALL].update(values, ties, rows)
            continue
        names = np.array([_name(c, True) for c in table.column("category").to_pylist()])
        for name in set(names.tolist()) & set(streams):
            here: Tensor = torch.from_numpy(names == name)
            streams[name].update(values[here], ties[here], rows[here])
    return {name: stream.best() for name, stream in streams.items()}


def _distinct(
    found: dict[str, Best], wanted: dict[str, int], pool: Pool, similar: float
) -> tuple[list[Chosen], int]:
    """Take as many of each category as wanted, near copies passed over."""
    chosen: list[Chosen] = []
    n_similar = 0
    sets = _shingle_sets(found, pool) if similar else {}
    for name, best in found.items():
        rows, values = best.rows.tolist(), best.scores.tolist()
        places: tuple[int, ...] = tuple(range(min(wanted[name], len(rows))))
        if similar:
            done = distinct([sets[row] for row in rows], wanted[name], similar)
            places, n_similar = done.kept, n_similar + len(done.passed)
        chosen += [Chosen(rows[place], values[place], name) for place in places]
    return chosen, n_similar


def _shingle_sets(found: dict[str, Best], pool: Pool) -> dict[int, frozenset[int]]:
    wanted = {row for best in found.values() for row in best.rows.tolist()}
    return {
        row.row: frozenset(_hash(gram) for gram in shingles(row.prompt, WORDS))
        for row in pool.rows(wanted.__contains__)
    }


def _hash(gram: tuple[str, ...]) -> int:
    # Python's own hash of a text differs from process to process.
    digest = hashlib.blake2b("\0".join(gram).encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:8], "big")


def _name(category: str | None, by_category: bool) -> str:
    return (category or "none") if by_category else ALL


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
