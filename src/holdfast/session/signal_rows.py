"""Which rows the anchors are fitted on, and which tell how well they read."""

import hashlib
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from holdfast.analysis.detection import group_names
from holdfast.session.outcomes import GAVE_IN
from holdfast.session.rows import Rollout
from holdfast.session.signal_settings import SignalSettings
from holdfast.session.splitting import BESIDE, PLAIN

LOOKALIKE = "safe_lookalike"


class Window(NamedTuple):
    """The tokens of a row whose states are read.

    Attributes:
        token_ids: The sequence, without its last token, which predicts nothing.
        n: How many tokens of the response are watched; as many of the last states
            of the sequence predict them.
    """

    token_ids: tuple[int, ...]
    n: int


class AnchorRows(NamedTuple):
    """The rows that anchors may be fitted on.

    Attributes:
        published: Plain training rows of both sides.
        matched: The same refusals, beside harmless rows that sound like them.
    """

    published: tuple[Rollout, ...]
    matched: tuple[Rollout, ...]

    @property
    def rows(self) -> list[Rollout]:
        """All of them, each once."""
        return list(
            {row.row_id: row for row in (*self.published, *self.matched)}.values()
        )

    @property
    def requests(self) -> set[str]:
        """Base requests of all of them; nothing else is read off these."""
        return {row.request_id for row in self.rows}


def window_of(row: Rollout, settings: SignalSettings) -> Window | None:
    """Return the tokens of a row that are watched, or None where there are none.

    Args:
        row: The row; the token that ended it counts as one of its tokens.
        settings: Where the steps begin, and how many there are.
    """
    start = row.spans.answer[0] if settings.region == "answer" else row.spans.prompt[1]
    n = len(row.token_ids) - start
    if settings.time == "step":
        n = min(n, settings.steps)
    if n < 1 or start < 1 or (settings.region == "answer" and not row.closed):
        return None
    return Window(row.token_ids[: start + n - 1], n)


def anchor_rows(rows: Sequence[Rollout], settings: SignalSettings) -> AnchorRows:
    """Return the rows that anchors may be fitted on.

    Training rows, in the order of their content hashes, at most half of the requests
    of each side, so that as many are left to fit a detector on. Harmless rows that
    sound dangerous have no part in any other fit; half of their requests are taken
    for the matched anchors.

    Args:
        rows: All rows with a window.
        settings: How many, and whether outcomes are looked at.
    """

    def side(role: str, split: str) -> list[Rollout]:
        return [
            row
            for row in rows
            if row.role == role and row.split == split and _counts(row, settings)
        ]

    refused = _half(side("harmful", "train"), settings.anchor_requests)
    benign = _half(side("benign", "train"), settings.anchor_requests)
    sounding = _half(side(LOOKALIKE, "test"), settings.anchor_requests)
    return AnchorRows((*benign, *refused), (*benign, *sounding, *refused))


def matched_topics(rows: Sequence[Rollout]) -> list[str | None]:
    """Return the topic of each row as matched anchors see it.

    A topic that has harmless and harmful rows is itself. Else a harmful row has its
    counterpart in harmless ones that sound dangerous, whatever their topics.

    Args:
        rows: Rows of both sides.
    """
    topics = {
        label: {row.topic for row in rows if row.label == label}
        for label in ("harmful", "benign")
    }
    shared = (topics["harmful"] & topics["benign"]) - {None}

    def topic(row: Rollout) -> str | None:
        if row.topic in shared:
            return row.topic
        if row.label == "harmful" or row.role == LOOKALIKE:
            return "sounds dangerous"
        return row.topic

    return [topic(row) for row in rows]


def held_out(rows: Sequence[Rollout], taken: Collection[str]) -> list[Rollout]:
    """Return the test rows from whose requests no anchor was made.

    Args:
        rows: All rows with a window.
        taken: Base requests of the anchors.
    """
    return [
        row
        for row in rows
        if row.split == "test"
        and row.role not in BESIDE
        and row.request_id not in taken
        and is_read(row)
    ]


def is_read(row: Rollout) -> bool:
    """Tell whether the judge saw a refusal, help, or part of it."""
    return row.is_refused or row.verdict in GAVE_IN


def groups_of(rows: Sequence[Rollout]) -> list[str]:
    """Return the group of each row: benign or attack, complied or refused."""
    return group_names(is_harmful(rows), is_refused(rows))


def is_harmful(rows: Sequence[Rollout]) -> Bool[Tensor, "example"]:
    """Return whether each request is harmful."""
    return torch.tensor([row.label == "harmful" for row in rows], dtype=torch.bool)


def is_refused(rows: Sequence[Rollout]) -> Bool[Tensor, "example"]:
    """Return whether each answer is a refusal."""
    return torch.tensor([row.is_refused for row in rows], dtype=torch.bool)


def requests_of(rows: Sequence[Rollout]) -> list[str]:
    """Return the base request of each row."""
    return [row.request_id for row in rows]


def _counts(row: Rollout, settings: SignalSettings) -> bool:
    if not row.is_decided:
        return False
    role = "benign" if row.label == "benign" else "harmful"
    return settings.unfiltered or (role, row.verdict) in PLAIN


def _half(rows: Sequence[Rollout], most: int) -> list[Rollout]:
    """Return the rows of half of the requests, chosen by hash, or of fewer."""
    ordered = sorted({row.request_id for row in rows}, key=_hash)
    kept = set(ordered[: min(most, len(ordered) // 2)])
    return [row for row in rows if row.request_id in kept]


def _hash(request_id: str) -> str:
    return hashlib.sha256(f"anchor/{request_id}".encode()).hexdigest()
