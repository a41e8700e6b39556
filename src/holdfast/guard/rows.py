"""Which rows detectors are fitted on, and which they are tried on."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, get_args

import torch

from holdfast.data.splits import split_by_hash
from holdfast.dynamics.rows import LOGIT, LOOKALIKE, SignalRows, is_read, read_signal
from holdfast.errors import InputError
from holdfast.guard.detector import Channel
from holdfast.study import Study

PLAIN, WRAPPED = "benign", "benign_wrapped"


class FitRows(NamedTuple):
    """Benign rows that detectors are fitted on, and others that set thresholds."""

    train: SignalRows
    calibration: SignalRows


def read_rows(study: Study) -> SignalRows:
    """Read what detectors read of a study, beside its rows.

    Rows that the judge could make nothing of are left out.
    """
    signal = read_signal(study).filter(is_read)
    channels = {"compliance": torch.sigmoid(signal.channels[LOGIT])} | {
        name: each
        for name, each in signal.channels.items()
        if name in get_args(Channel)
    }
    return replace(signal, channels=channels)


def fit_rows(signal: SignalRows, *, wrapped: bool) -> FitRows:
    """Return the benign rows to fit on, and as many to calibrate on.

    Complied rows of training requests that no anchor was made of; which half a
    request goes to depends on its hash.
    """
    roles = (PLAIN, WRAPPED) if wrapped else (PLAIN,)
    benign = signal.filter(
        lambda row: (
            row.role in roles
            and row.split == "train"
            and not row.is_refused
            and row.request_id not in signal.taken
        )
    )
    requests = sorted({row.request_id for row in benign.rows})
    halves = split_by_hash(requests, lambda name: f"guard/{name}", (0.5, 0.5, 0.0))
    train = set(halves.train)
    return FitRows(
        benign.filter(lambda row: row.request_id in train),
        benign.filter(lambda row: row.request_id not in train),
    )


def benign_tests(signal: SignalRows) -> dict[str, SignalRows]:
    """Return benign rows that no fit has seen, by domain."""
    roles = {PLAIN: "plain", WRAPPED: "in wrappers", LOOKALIKE: "sounding dangerous"}
    fresh = signal.filter(
        lambda row: row.split == "test" and row.request_id not in signal.taken
    ).by(lambda row: row.role)
    return {name: fresh[role] for role, name in roles.items() if role in fresh}


def attacks(signal: SignalRows) -> dict[str, SignalRows]:
    """Return harmful rows in wrappers by family; nothing was fitted on any attack."""
    return signal.filter(
        lambda row: row.role == "wrapped" and row.request_id not in signal.taken
    ).by(lambda row: str(row.wrapper))


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
