"""Which rows of a pool to choose: the best by a score, ties, near copies, quotas.

Scores come in parts, since a pool need not fit in memory: `Best` keeps no more than
the rows that may still be chosen. Higher is better everywhere; a row without a score
(not a number) is never chosen.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer

from holdfast.errors import SettingsError

Quota = Literal["none", "equal", "proportional"]
_COMPACT_AT: Final = 2
"""Multiples of what is kept that are held before the rest is let go."""


class Best(NamedTuple):
    """The best rows of a stream."""

    rows: Int[np.ndarray, "example"]  # Their numbers, the best first.
    scores: Float[np.ndarray, "example"]
    n_scored: int  # Rows with a score, chosen or not.
    # Rows that were left out with the very score of the last one kept; only the tie
    # key decided against them.
    n_tied: int


class BestOfStream:
    """Keeps the best rows of a stream, whatever its length.

    Among equal scores the smaller tie key goes first, then the smaller row number, so
    the result does not depend on how the stream was cut.
    """

    def __init__(self, n: int) -> None:
        """Start empty; `n` rows are kept at most."""
        self._n = n
        self._scores = np.zeros(0)
        self._ties = np.zeros(0, np.uint64)
        self._rows = np.zeros(0, np.int64)
        self._n_scored = self._n_tied = 0
        self._last = math.inf

    def update(
        self,
        scores: Float[np.ndarray, "example"],
        ties: Integer[np.ndarray, "example"],
        rows: Int[np.ndarray, "example"],
    ) -> None:
        """Take a part of the stream.

        Args:
            scores: Score of each row; not a number for a row without one.
            ties: Key that decides among equal scores, such as a content hash.
            rows: Number of each row.
        """
        scored = ~np.isnan(scores)
        self._n_scored += int(scored.sum())
        self._scores = np.concatenate([self._scores, scores[scored]])
        self._ties = np.concatenate([self._ties, ties[scored].astype(np.uint64)])
        self._rows = np.concatenate([self._rows, rows[scored]])
        if len(self._rows) > _COMPACT_AT * self._n + 1024:
            self._compact()

    def best(self) -> Best:
        """Return the best rows so far."""
        self._compact()
        return Best(self._rows, self._scores, self._n_scored, self._n_tied)

    def _compact(self) -> None:
        # The last key sorts first.
        order = np.lexsort((self._rows, self._ties, -self._scores))
        if len(order) > self._n:
            # Nothing that was let go before can equal a bar that has risen since.
            scores = self._scores[order]
            last = float(scores[self._n - 1]) if self._n else math.inf
            before = self._n_tied if last == self._last else 0
            self._n_tied = before + int((scores[self._n :] == last).sum())
            self._last = last
        kept = order[: self._n]
        self._scores, self._ties = self._scores[kept], self._ties[kept]
        self._rows = self._rows[kept]


class Distinct(NamedTuple):
    """Places that were kept, and each place passed over with the one it resembles."""

    kept: tuple[int, ...]
    passed: tuple[tuple[int, int], ...]


def distinct(items: Sequence[frozenset[int]], n: int, threshold: float) -> Distinct:
    """Go down a ranking and pass over what resembles a better-ranked item.

    Similarity is the Jaccard index of two sets, such as the word n-grams of two
    prompts. A candidate shares an element with everything that it can resemble, so
    only sets that meet in one are compared.

    Args:
        items: Sets in order of rank, the best first.
        n: How many to keep at most.
        threshold: Similarity from which an item is passed over, in (0, 1].

    Returns:
        Places in `items`, in order of rank.

    Raises:
        SettingsError: If the threshold is out of range.
    """
    if not 0 < threshold <= 1:
        raise SettingsError(
            "a similarity in (0, 1]", f"{threshold:g}", "0.8 is the default."
        )
    holders: dict[int, list[int]] = {}
    kept: list[int] = []
    passed: list[tuple[int, int]] = []
    for place, item in enumerate(items):
        if len(kept) == n:
            break
        twin = _twin(item, items, holders, threshold)
        if twin is not None:
            passed.append((place, twin))
            continue
        kept.append(place)
        for element in item:
            holders.setdefault(element, []).append(place)
    return Distinct(tuple(kept), tuple(passed))


def _twin(
    item: frozenset[int],
    items: Sequence[frozenset[int]],
    holders: Mapping[int, list[int]],
    threshold: float,
) -> int | None:
    """Return the best-ranked kept item that this one resembles."""
    # Two sets of similarity t share an element within the first
    # |set| - ceil(t |set|) + 1 of any order; the rarest of them meet the fewest.
    rarest = sorted(item, key=lambda element: (len(holders.get(element, ())), element))
    prefix = len(item) - math.ceil(threshold * len(item) - 1e-9) + 1
    near = {place for element in rarest[:prefix] for place in holders.get(element, ())}
    for place in sorted(near):
        shared = len(item & items[place])
        if shared >= threshold * (len(item) + len(items[place]) - shared) - 1e-12:
            return place
    return None


def quotas(counts: Mapping[str, int], budget: int, rule: Quota) -> dict[str, int]:
    """Divide a budget among categories.

    Args:
        counts: Rows that may be chosen in each category.
        budget: Rows to choose in all.
        rule: `proportional` to the counts, by largest remainder; or `equal`, where
            what a small category cannot use goes to the others.

    Returns:
        Rows to choose in each category; they sum to the budget, or to all there is.
    """
    names = sorted(counts)
    budget = min(budget, sum(counts.values()))
    if rule == "proportional":
        total = max(1, sum(counts.values()))
        exact = {name: budget * counts[name] / total for name in names}
        given = {name: int(exact[name]) for name in names}
        by_remainder = sorted(names, key=lambda name: (given[name] - exact[name], name))
        for name in by_remainder[: budget - sum(given.values())]:
            given[name] += 1
        return given
    given = dict.fromkeys(names, 0)
    left = budget
    while left:
        open_ = [name for name in names if given[name] < counts[name]]
        share = max(1, left // len(open_))
        for name in open_[:left]:
            more = min(share, counts[name] - given[name], left)
            given[name] += more
            left -= more
    return given


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return p-values corrected for their number, by Holm's step-down rule.

    Args:
        p_values: Of all tests of one family, in any order.

    Returns:
        Adjusted p-values in the same order; each may be held against the level that
        the whole family is to keep.

    Source:
        Holm, "A simple sequentially rejective multiple test procedure",
        Scandinavian Journal of Statistics 6 (1979).
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, (len(order) - rank) * p_values[place])
        adjusted[place] = min(1.0, largest)
    return tuple(adjusted)


def uniform_score(value: int) -> float:
    """Return a score in [0, 1) from a 64-bit hash: a random order that stays."""
    return value / 2**64
