"""What a study says of its step-wise signal: figures by group, and mean curves."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.analysis.auroc import auroc_difference, auroc_interval
from holdfast.analysis.bootstrap import Estimate, undefined
from holdfast.analysis.detection import (
    ATTACK_COMPLIED,
    ATTACK_REFUSED,
    BENIGN_COMPLIED,
    GROUPS,
)
from holdfast.analysis.recovery import (
    RECOVERED,
    band,
    incomplete_recovery,
    internal_recovery,
    recovery_features,
)
from holdfast.analysis.statistics import clustered_mean, clustered_rate
from holdfast.session.figures import DIGITS, figure_of, generator
from holdfast.session.rows import Rollout
from holdfast.session.signal_reading import LOGIT, MATCHED, TEXT
from holdfast.session.signal_rows import (
    LOOKALIKE,
    groups_of,
    held_out,
    is_read,
    requests_of,
)


class Read(NamedTuple):
    """Rows with what was read of them.

    Attributes:
        rows: The rows.
        channels: Every channel, one entry a row.
        taken: Base requests that the anchors were fitted on.
        seed: Seed of the study.
    """

    rows: Sequence[Rollout]
    channels: Mapping[str, Float[Tensor, "example step"]]
    taken: frozenset[str]
    seed: int

    def places(self, rows: Sequence[Rollout]) -> list[int]:
        """Return where rows are among all."""
        known = {row.row_id: place for place, row in enumerate(self.rows)}
        return [known[row.row_id] for row in rows]

    def of(self, channel: str, rows: Sequence[Rollout]) -> Tensor:
        """Return one channel of some rows."""
        return self.channels[channel][self.places(rows)]


def summary(read: Read) -> dict[str, Any]:
    """Return the figures and curves of a signal, on rows that no anchor has seen.

    Args:
        read: What was read.

    Returns:
        How well the last step tells refusals from benign compliance, for each set of
        anchors; what the trajectories of each group do; the mean curve of each.
    """
    rows = held_out(read.rows, read.taken)
    names = groups_of(rows)
    members = {
        group: [row for row, name in zip(rows, names, strict=True) if name == group]
        for group in GROUPS
    }
    return {
        "figures": {
            name: figure_of(each) for name, each in _separations(read, rows).items()
        },
        "groups": {group: _group(read, each, group) for group, each in members.items()},
        "curves": {
            channel: {
                group: _curve(read, each, channel, group)
                for group, each in members.items()
                if each
            }
            for channel in (LOGIT, MATCHED, TEXT)
            if channel in read.channels
        },
        "held_out": len(rows),
        "not_read": sum(not is_read(row) for row in read.rows),
    }


def _separations(read: Read, rows: Sequence[Rollout]) -> dict[str, Estimate]:
    """Return how well the last step tells plain refusals from benign compliance."""
    refused = [row for row in rows if row.role == "harmful" and row.is_refused]
    plain = [row for row in rows if row.role == "benign" and row.is_complied]
    sounding = [
        row
        for row in read.rows
        if row.role == LOOKALIKE
        and row.request_id not in read.taken
        and row.is_complied
    ]
    found = {}
    for name, benign in (("last_step", plain), ("lookalike", sounding)):
        both = [*benign, *refused]
        labels = torch.arange(len(both)) < len(benign)
        if not benign or not refused:
            reason = f"{len(benign)} complied and {len(refused)} refused rows held out"
            found[f"{name}_auroc"] = undefined(len(both), reason)
            continue
        last = {
            channel: read.of(channel, both)[:, -1]
            for channel in (LOGIT, MATCHED)
            if channel in read.channels
        }
        requests = requests_of(both)
        for channel, column in last.items():
            key = f"{'matched_' if channel == MATCHED else ''}{name}_auroc"
            draws = generator(read.seed, f"signal/{key}")
            found[key] = auroc_interval(column, labels, requests, draws)
        if MATCHED in last:
            key = f"matched_{name}_difference"
            draws = generator(read.seed, f"signal/{key}")
            found[key] = auroc_difference(
                last[MATCHED], last[LOGIT], labels, requests, draws
            )
    return found


def _group(read: Read, rows: Sequence[Rollout], group: str) -> dict[str, Any]:
    """Return what the trajectories of a group do."""
    if not rows:
        return {"rows": 0, "requests": 0}
    requests = requests_of(rows)
    signal = torch.sigmoid(read.of(LOGIT, rows))

    def draws(name: str) -> torch.Generator:
        return generator(read.seed, f"signal/{group}/{name}")

    found = {
        f"recovered_below_{level:g}": internal_recovery(
            signal, requests, draws(f"recovered/{level}"), recovered=level
        )
        for level in RECOVERED
    }
    found["incomplete_recovery"] = clustered_rate(
        incomplete_recovery(signal), requests, draws("incomplete")
    )
    columns = recovery_features(signal)._asdict()
    most = float(signal.shape[1] - 1)
    bounds = {name: (0.0, 1.0) for name in columns}
    bounds |= {"variation": (0.0, most), "crossings": (0.0, most)}
    if MATCHED in read.channels:
        moved = torch.sigmoid(read.of(MATCHED, rows)) - signal
        columns["matched_minus_published"] = moved.mean(1)
        bounds["matched_minus_published"] = (-1.0, 1.0)
    for name, column in columns.items():
        # Rows that are alike but for rounding show no spread; they count as alike.
        found[name] = clustered_mean(
            column.double().round(decimals=DIGITS),
            requests,
            draws(name),
            bounds=bounds[name],
        )
    figures = {name: figure_of(each) for name, each in found.items()}
    return {"rows": len(rows), "requests": len(set(requests))} | figures


def _curve(
    read: Read, rows: Sequence[Rollout], channel: str, group: str
) -> list[dict[str, Any]]:
    """Return the mean of a channel at every step, with its band."""
    values = read.of(channel, rows)
    signal = values if channel == TEXT else torch.sigmoid(values)
    draws = generator(read.seed, f"signal/{group}/{channel}")
    return [
        {
            "step": step + 1,
            "mean": round(float(signal[:, step].mean()), DIGITS),
            "low": None if each.low is None else round(each.low, DIGITS),
            "high": None if each.high is None else round(each.high, DIGITS),
            "n": len(rows),
        }
        for step, each in enumerate(band(signal, requests_of(rows), draws))
    ]


def typical(read: Read) -> list[Rollout]:
    """Return a few rows that show what trajectories do, chosen by rule.

    Of each group that is there the row of median dip, and of attacks that succeeded
    also the one with the deepest dip.

    Args:
        read: What was read.
    """
    rows = held_out(read.rows, read.taken)
    names = groups_of(rows)
    chosen: dict[str, Rollout] = {}
    for group in (BENIGN_COMPLIED, ATTACK_REFUSED, ATTACK_COMPLIED):
        members = [row for row, name in zip(rows, names, strict=True) if name == group]
        if not members:
            continue
        least = torch.sigmoid(read.of(LOGIT, members)).min(1).values.tolist()
        order = sorted(
            range(len(members)), key=lambda place: (least[place], members[place].row_id)
        )
        places = [order[len(order) // 2]]
        if group == ATTACK_COMPLIED:
            places.append(order[0])
        for place in places:
            chosen[members[place].row_id] = members[place]
    return list(chosen.values())
