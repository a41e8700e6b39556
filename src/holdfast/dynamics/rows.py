"""The answers whose signal is read: which tokens, for which part, and with what signal.

A signal as a file is `signal.safetensors`, one tensor per channel.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from holdfast.dynamics.anchors import topic_length_strata
from holdfast.dynamics.settings import SignalSettings
from holdfast.errors import InputError
from holdfast.rollout.rows import (
    ATTACK_SUCCESS_OUTCOMES,
    BESIDE,
    LOST,
    PLAIN,
    Rollout,
    from_table,
    requests_of,
)
from holdfast.stats.groups import GROUPS
from holdfast.study import Study, atomic_write_bytes, canonical_json

LOOKALIKE = "safe_lookalike"
ROLLOUTS, SIGNAL = "rollouts.parquet", "signal.safetensors"
LOGIT, MATCHED, PROBE = "compliance_logit", "matched_logit", "probe"
DIFFERENCE, PERPLEXITY, TEXT = "logit_difference", "perplexity", "text"
READING, CHANGED = "reading", "changed"
_ABOUT = "about"


class Window(NamedTuple):
    """The tokens of a row whose states are read."""

    # The sequence, without its last token, which predicts nothing.
    token_ids: tuple[int, ...]
    # How many tokens of the response are watched; as many of the last states of the
    # sequence predict them.
    n: int

    @property
    def start(self) -> int:
        """Position of the first token that is watched."""
        return len(self.token_ids) + 1 - self.n


Watched = tuple[Rollout, Window]
Batch = Sequence[Watched]


def window_of(row: Rollout, settings: SignalSettings) -> Window | None:
    """Return the tokens of a row that are watched, or None where there are none.

    `row`: The row; the token that ended it counts as one of its tokens.
    """
    start = row.spans.answer[0] if settings.region == "answer" else row.spans.prompt[1]
    n = len(row.token_ids) - start
    if settings.time == "step":
        n = min(n, settings.steps)
    if row.tokens == LOST or n < 1 or start < 1:
        return None
    if settings.region == "answer" and not row.closed:
        return None
    return Window(row.token_ids[: start + n - 1], n)


class AnchorRows(NamedTuple):
    """The rows that anchors may be fitted on."""

    published: tuple[Rollout, ...]  # Plain training rows of both sides.
    # The same refusals, beside harmless rows that sound like them.
    matched: tuple[Rollout, ...]

    @property
    def rows(self) -> list[Rollout]:
        """All of them, each once."""
        return list(
            {row.row_id: row for row in (*self.published, *self.matched)}.values()
        )


def anchor_rows(rows: Sequence[Rollout], settings: SignalSettings) -> AnchorRows:
    """Return the rows that anchors may be fitted on.

    Training rows, in the order of their content hashes, at most half of the requests
    of each side, so that as many are left to fit a detector on. Harmless rows that
    sound dangerous have no part in any other fit; half of their requests are taken
    for the matched anchors.
    """

    def counts(row: Rollout) -> bool:
        role = "benign" if row.label == "benign" else "harmful"
        plain = settings.unfiltered or (role, row.verdict) in PLAIN
        return row.is_decided and plain

    def half(role: str, split: str) -> list[Rollout]:
        side = [
            row
            for row in rows
            if row.role == role and row.split == split and counts(row)
        ]
        ordered = sorted({row.request_id for row in side}, key=_content_hash)
        kept = set(ordered[: min(settings.anchor_requests, len(ordered) // 2)])
        return [row for row in side if row.request_id in kept]

    refused, benign = half("harmful", "train"), half("benign", "train")
    sounding = half(LOOKALIKE, "test")
    return AnchorRows((*benign, *refused), (*benign, *sounding, *refused))


def _content_hash(request_id: str) -> str:
    return hashlib.sha256(f"anchor/{request_id}".encode()).hexdigest()


def matched_strata(rows: Sequence[Rollout]) -> list[str]:
    """Return the topic and length of each row as matched anchors see them.

    A topic that has harmless and harmful rows is itself. Else a harmful row has its
    counterpart in harmless ones that sound dangerous, whatever their topics.
    """
    harmful, benign = (
        {row.topic for row in rows if row.label == label}
        for label in ("harmful", "benign")
    )
    shared = (harmful & benign) - {None}

    def topic(row: Rollout) -> str | None:
        dangerous = row.label == "harmful" or row.role == LOOKALIKE
        alone = dangerous and row.topic not in shared
        return "sounds dangerous" if alone else row.topic

    lengths = [row.spans.prompt[1] for row in rows]
    return topic_length_strata([topic(row) for row in rows], lengths)


def is_read(row: Rollout) -> bool:
    """Return whether the judge saw a refusal, help, or part of it."""
    return row.is_refused or row.verdict in ATTACK_SUCCESS_OUTCOMES


def is_held_out(row: Rollout, taken: Collection[str]) -> bool:
    """Return whether a row is of the tests, and no anchor was made of its request."""
    tested = row.split == "test" and row.role not in BESIDE
    return tested and row.request_id not in taken and is_read(row)


def is_harmful(rows: Sequence[Rollout]) -> Bool[Tensor, "example"]:
    """Return whether each request is harmful."""
    return torch.tensor([row.label == "harmful" for row in rows], dtype=torch.bool)


def group_of(row: Rollout) -> str:
    """Return the group of a row: benign or attack, complied or refused."""
    return GROUPS[2 * (row.label == "harmful") + row.is_refused]


@dataclass(frozen=True)
class SignalRows:
    """Rows whose signal was read."""

    rows: Sequence[Rollout]
    # What was read, one entry per row.
    channels: Mapping[str, Float[Tensor, "example step"]]
    taken: frozenset[str]  # Base requests that the anchors were fitted on.
    facts: Mapping[str, Any]  # Identity and mode of the signal, hashes of the anchors.

    @property
    def requests(self) -> list[str]:
        """The base request of each row."""
        return requests_of(self.rows)

    @property
    def groups(self) -> list[str]:
        """The group of each row: benign or attack, complied or refused."""
        return [group_of(row) for row in self.rows]

    def take(self, indices: Sequence[int]) -> "SignalRows":
        """Return some of the rows, with their channels."""
        return replace(
            self,
            rows=[self.rows[index] for index in indices],
            channels={name: each[indices] for name, each in self.channels.items()},
        )

    def filter(self, keep: Callable[[Rollout], bool]) -> "SignalRows":
        """Return the rows for which `keep` is true."""
        return self.take([index for index, row in enumerate(self.rows) if keep(row)])

    def empty(self) -> "SignalRows":
        """Return none of the rows."""
        return self.take([])

    def concat(self, other: "SignalRows") -> "SignalRows":
        """Return the rows of both, on the channels that both have."""
        return replace(
            self,
            rows=[*self.rows, *other.rows],
            channels={
                name: torch.cat([each, other.channels[name]])
                for name, each in self.channels.items()
                if name in other.channels
            },
        )

    def by(self, key: Callable[[Rollout], str]) -> dict[str, "SignalRows"]:
        """Return the rows of each key, by its name."""
        names = [key(row) for row in self.rows]
        return {
            name: self.take([i for i, each in enumerate(names) if each == name])
            for name in sorted(set(names))
        }

    def by_group(self) -> dict[str, "SignalRows"]:
        """Return the rows of every group, those of empty groups too."""
        groups = self.by(group_of)
        return {group: groups.get(group, self.empty()) for group in GROUPS}


def write_signal(study: Study, signal: SignalRows) -> None:
    """Write the signal of every row."""
    facts = dict(signal.facts) | {"taken": sorted(signal.taken)}
    about = {"row_ids": [row.row_id for row in signal.rows], "facts": facts}
    tensors = {key: each.contiguous() for key, each in signal.channels.items()}
    # One entry, since the order of several changes from one run to the next.
    data = save(tensors, {_ABOUT: canonical_json(about)})
    atomic_write_bytes(study.path(SIGNAL), data)


def read_signal(study: Study) -> SignalRows:
    """Read the signal of a study beside its rows; refuse one of earlier answers."""
    inputs = study.record("signal").get("inputs", {})
    if inputs.get(ROLLOUTS) != study.input_hash(ROLLOUTS):
        raise InputError(
            f"a signal of the answers in {study.directory}",
            "none, or one of earlier answers",
            "Run `holdfast signal` on the study.",
        )
    rows = {row.row_id: row for row in from_table(study.read_table(ROLLOUTS))}
    path = study.require(SIGNAL)
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()[_ABOUT])
            channels = {key: file.get_tensor(key) for key in file.keys()}
        facts = about["facts"]
        taken = frozenset(facts.pop("taken"))
        kept = [rows[row_id] for row_id in about["row_ids"]]
    # The reader of safetensors raises its own error, which is no ValueError.
    except Exception as error:
        raise InputError(
            f"the signal of every row in {path}",
            f"a damaged file ({error})",
            "Remove it and run `holdfast signal` again.",
        ) from error
    return SignalRows(kept, channels, taken, facts)
