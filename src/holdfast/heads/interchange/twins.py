"""Twins: two runs of one base request, of which one refused and one complied."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from holdfast.cliff.cliff import MIN_TOKENS
from holdfast.errors import TooFewExamplesError
from holdfast.heads.settings import MIN_REQUESTS, Span
from holdfast.rollout.rows import Rollout

Kind = Literal["samples", "wrappers"]
BLOCK = 8
"""Twins among which a source of another request is looked for, so that a batch of whole
blocks holds all that it needs."""


class Twin(NamedTuple):
    """Two runs of one base request that ended otherwise."""

    refused: Rollout
    complied: Rollout

    @property
    def kind(self) -> Kind:
        """Two samples of one prompt, or the request under two wrappers (or none)."""
        same = self.refused.prompt_id == self.complied.prompt_id
        return "samples" if same else "wrappers"

    @property
    def request_id(self) -> str:
        """The base request, which is the cluster of every interval."""
        return self.refused.request_id

    @property
    def name(self) -> str:
        """Both rows."""
        return f"{self.refused.row_id}/{self.complied.row_id}"

    @property
    def length(self) -> int:
        """Tokens of the longer run."""
        return max(self.refused.final, self.complied.final)


class Twins(NamedTuple):
    """Twins that rank heads, and those on which everything is measured."""

    ranking: tuple[Twin, ...]
    measuring: tuple[Twin, ...]


def find_twins(rows: Sequence[Rollout], limit: int, span: Span) -> Twins:
    """Return twins of harmful requests, by split.

    Every request gives one pair before any gives two. Two samples of one prompt come
    first, since nothing but their own words tells them apart.

    Args:
        rows: All rollouts of a study.
        limit: At most so many twins of each split.
        span: Where heads are exchanged; both runs must have tokens there.

    Raises:
        TooFewExamplesError: If there are too few; says why requests have none.
    """
    by_split: dict[str, dict[str, list[Rollout]]] = {"train": {}, "test": {}}
    for row in rows:
        if row.label == "harmful" and row.split in by_split:
            by_split[row.split].setdefault(row.request_id, []).append(row)
    found = [_twins(requests, span)[:limit] for requests in by_split.values()]
    counts = [len({twin.request_id for twin in part}) for part in found]
    if min(counts) < MIN_REQUESTS:
        raise _too_few(counts, by_split, span)
    return Twins(tuple(found[0]), tuple(found[1]))


def is_usable(row: Rollout, span: Span) -> bool:
    """Return whether a run has an answer of known tokens, and something to exchange."""
    start, stop = getattr(row.spans, span)
    return row.is_decided and stop > start and row.n_thinking >= MIN_TOKENS


def span_of(row: Rollout, span: Span) -> tuple[int, int]:
    """Return the positions of a row at which heads are exchanged."""
    start, stop = getattr(row.spans, span)
    return start, stop


def partners(twins: Sequence[Twin]) -> list[int]:
    """Return for each twin another one of another request, by its place.

    Twins stand by length, as batches read them, and the next one of the same block that
    is of another request is taken; where a block has none, the next one anywhere.

    Raises:
        TooFewExamplesError: If all twins are of one request.
    """
    order = in_order(twins)
    chosen = [0] * len(twins)
    for at, place in enumerate(order):
        first = at // BLOCK * BLOCK
        block = order[first : first + BLOCK]
        near = [*block[at - first + 1 :], *block[: at - first]]
        others = (
            other
            for other in (*near, *order[at + 1 :], *order[:at])
            if twins[other].request_id != twins[place].request_id
        )
        other = next(others, None)
        if other is None:
            raise TooFewExamplesError(
                "twins of two base requests or more", "one", "Add harmful requests."
            )
        chosen[place] = other
    return chosen


def in_order(twins: Sequence[Twin]) -> list[int]:
    """Return the places of twins in the order in which batches read them."""
    return sorted(range(len(twins)), key=lambda i: (-twins[i].length, twins[i].name))


def _twins(requests: dict[str, list[Rollout]], span: Span) -> list[Twin]:
    """Return the twins of all requests, the first of each request first."""
    ranked: list[tuple[int, str, Twin]] = []
    for request in requests.values():
        usable = [row for row in request if is_usable(row, span)]
        for turn, twin in enumerate(_pairs(usable)):
            ranked.append((turn, twin.refused.prompt_id, twin))
    return [twin for _, _, twin in sorted(ranked, key=lambda each: each[:2])]


def _pairs(rows: Sequence[Rollout]) -> Iterator[Twin]:
    """Yield pairs of refused and complied rows of one request, each row once."""
    pairs = [
        Twin(refused, complied)
        for refused in rows
        if refused.is_refused
        for complied in rows
        if complied.is_complied
    ]
    used: set[str] = set()
    for twin in sorted(pairs, key=_preference):
        if used.isdisjoint((twin.refused.row_id, twin.complied.row_id)):
            used |= {twin.refused.row_id, twin.complied.row_id}
            yield twin


def _preference(twin: Twin) -> tuple[bool, bool, str, str]:
    bare = None in (twin.refused.wrapper, twin.complied.wrapper)
    return twin.kind != "samples", bare, twin.refused.row_id, twin.complied.row_id


def _too_few(
    counts: Sequence[int],
    by_split: dict[str, dict[str, list[Rollout]]],
    span: Span,
) -> TooFewExamplesError:
    """Return how many requests have twins, and why the others have none."""
    why = Counter(
        _reason(request, span)
        for requests in by_split.values()
        for request in requests.values()
    )
    told = ", ".join(f"{n} {reason}" for reason, n in sorted(why.items()) if reason)
    advice = (
        "Add wrappers that work at times (--wrapped, --wrappers-per-request) or draw "
        "more samples of each prompt (--samples 4 --temperature 0.7) and run "
        "`holdfast rollout` again; where every request always ends alike there is "
        "nothing to exchange."
    )
    return TooFewExamplesError(
        f"{MIN_REQUESTS} training requests and as many held-out ones, each with a run "
        "that refused and one that complied",
        f"{counts[0]} and {counts[1]}" + (f" (others: {told})" if told else ""),
        advice,
    )


def _reason(rows: Sequence[Rollout], span: Span) -> str:
    """Return why a request has no twins; empty if it has."""
    usable = [row for row in rows if is_usable(row, span)]
    refused, complied = (
        any(row.verdict == kind for row in usable) for kind in ("refused", "complied")
    )
    if refused and complied:
        return ""
    if refused or complied:
        return f"only {'refused' if refused else 'complied'}"
    if any(row.is_decided for row in rows):
        return f"without thinking of {MIN_TOKENS} tokens and an end of it"
    return "neither refused nor complied"
