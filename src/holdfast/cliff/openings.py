"""Tokens that open refusals, and tokens that open answers that comply.

Refusals and answers mostly open with words of their own. Which tokens those are is read
off rows whose outcome is known; what both open with says nothing and is left out.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from holdfast.rollout.rows import Rollout

APART = 9.0
"""How many times as often a token opens the one kind of answer as the other."""


class Openings(NamedTuple):
    """Tokens with which refused and complied answers open."""

    refused: tuple[int, ...]
    complied: tuple[int, ...]


class Known(NamedTuple):
    """Openings, and how much of the answers they were read off they open."""

    openings: Openings
    # Share of refused and of complied answers that open with a token of their own.
    refused: float
    complied: float

    @property
    def reason(self) -> str:
        """Why they tell nothing; empty where they do."""
        if self.openings.refused and self.openings.complied:
            return ""
        return "no first token opens refusals or compliances alone"


def openings(rows: Iterable[Rollout]) -> Known:
    """Return the tokens with which refused and complied answers open.

    Each kind weighs the same, however many rows it has.
    """
    counts: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
    for row in rows:
        if row.is_decided and row.answer:
            counts[row.is_refused][row.token_ids[row.spans.answer[0]]] += 1
    shares = {
        kind: {token: n / found.total() for token, n in found.items()}
        for kind, found in counts.items()
    }
    own = {
        kind: tuple(
            sorted(
                token
                for token, share in shares[kind].items()
                if share >= APART * shares[not kind].get(token, 0.0)
            )
        )
        for kind in counts
    }
    held = {kind: sum(shares[kind][token] for token in own[kind]) for kind in own}
    return Known(Openings(own[True], own[False]), held[True], held[False])
