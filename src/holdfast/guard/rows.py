"""Rows with their signal, and which of them detectors are fitted and tried on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.data.splits import split_by_hash
from holdfast.dynamics.rows import LOGIT, LOOKALIKE, is_read
from holdfast.dynamics.stage import read_signal_file
from holdfast.errors import InputError
from holdfast.guard.detector import Channel
from holdfast.rollout.rows import Rollout, from_table
from holdfast.study import Study

ROLLOUTS = "rollouts.parquet"
PLAIN, WRAPPED = "benign", "benign_wrapped"


@dataclass(frozen=True)
class Seen:
    """Rows whose signal was read."""

    rows: list[Rollout]  # The rows.
    # What detectors read, one entry per row.
    channels: dict[Channel, Float[Tensor, "example step"]]
    taken: frozenset[str]  # Base requests that the anchors were fitted on.
    facts: dict[str, Any]  # Identity and mode of the signal.

    def only(self, keep: Callable[[Rollout], bool]) -> "Seen":
        """Return the rows for which `keep` is true, with their channels."""
        places = [place for place, row in enumerate(self.rows) if keep(row)]
        return replace(
            self,
            rows=[self.rows[place] for place in places],
            channels={name: each[places] for name, each in self.channels.items()},
        )

    def nothing(self) -> "Seen":
        """Return none of the rows."""
        return self.only(lambda _: False)

    def beside(self, other: "Seen") -> "Seen":
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


class FitRows(NamedTuple):
    """Benign rows that detectors are fitted on, and others that set thresholds."""

    train: Seen
    calibration: Seen


def read_seen(study: Study) -> Seen:
    """Read the signal of a study beside its rows.

    Rows that the judge could make nothing of are left out.
    """
    inputs = study.record("signal").get("inputs", {})
    if inputs.get(ROLLOUTS) != study.input_hash(ROLLOUTS):
        raise InputError(
            f"a signal of the answers in {study.directory}",
            "none, or one of earlier answers",
            "Run `holdfast signal` on the study.",
        )
    signal = read_signal_file(study)
    known = {row.row_id: row for row in from_table(study.read_table(ROLLOUTS))}
    rows = [known[row_id] for row_id in signal.row_ids]
    named = signal.channels
    channels: dict[Channel, Tensor] = {"compliance": torch.sigmoid(named[LOGIT])}
    others: tuple[Channel, ...] = (
        "compliance_logit",
        "text",
        "probe",
        "logit_difference",
        "perplexity",
    )
    channels |= {name: named[name] for name in others if name in named}
    taken = frozenset(signal.facts.pop("taken"))
    return Seen(rows, channels, taken, signal.facts).only(is_read)


def fit_rows(seen: Seen, *, wrapped: bool) -> FitRows:
    """Return the benign rows to fit on, and as many to calibrate on.

    Complied rows of training requests that no anchor was made of; which half a
    request goes to depends on its hash.
    """
    roles = (PLAIN, WRAPPED) if wrapped else (PLAIN,)
    benign = seen.only(
        lambda row: (
            row.role in roles
            and row.split == "train"
            and not row.is_refused
            and row.request_id not in seen.taken
        )
    )
    requests = sorted({row.request_id for row in benign.rows})
    halves = split_by_hash(requests, lambda name: f"guard/{name}", (0.5, 0.5, 0.0))
    train = set(halves.train)
    return FitRows(
        benign.only(lambda row: row.request_id in train),
        benign.only(lambda row: row.request_id not in train),
    )


def benign_tests(seen: Seen) -> dict[str, Seen]:
    """Return benign rows that no fit has seen, by domain."""
    fresh = seen.only(
        lambda row: row.split == "test" and row.request_id not in seen.taken
    )
    roles = {PLAIN: "plain", WRAPPED: "in wrappers", LOOKALIKE: "sounding dangerous"}
    found = {name: fresh.only(partial(_has, role=role)) for role, name in roles.items()}
    return {name: each for name, each in found.items() if each.rows}


def attacks(seen: Seen) -> dict[str, Seen]:
    """Return harmful rows in wrappers by family; nothing was fitted on any attack."""
    fresh = seen.only(
        lambda row: row.role == "wrapped" and row.request_id not in seen.taken
    )
    families = sorted({str(row.wrapper) for row in fresh.rows})
    return {family: fresh.only(partial(_has, wrapper=family)) for family in families}


def choose_families(
    families: Sequence[str], asked: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return the families that a detector is chosen on, and those that report it.

    `asked`: Those to choose on; empty for every second one.
    """
    unknown = sorted(set(asked) - set(families))
    chosen = list(asked) or list(families[::2])
    rest = [family for family in families if family not in chosen]
    if unknown or (families and not rest and len(families) > 1):
        raise InputError(
            f"attack families among {', '.join(families)}, and one left to report on",
            ", ".join(unknown) or "all of them to choose on",
            "Give other families with --choose-on.",
        )
    return chosen, rest


def joined(parts: Mapping[str, Seen], names: Sequence[str], beginning: Seen) -> Seen:
    """Return the rows of several parts as one."""
    found = beginning.nothing()
    for name in names:
        found = found.beside(parts[name])
    return found


def _has(row: Rollout, **facts: str) -> bool:
    return all(str(getattr(row, name)) == each for name, each in facts.items())
