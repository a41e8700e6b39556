"""The step-wise signal by group: figures, mean curves and examples."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.data.chat.conversation import token_texts
from holdfast.data.chat.rendering import ChatTokenizer
from holdfast.dynamics.rows import (
    CHANGED,
    LOGIT,
    LOOKALIKE,
    MATCHED,
    READING,
    TEXT,
    Window,
    groups_of,
    held_out,
    is_read,
)
from holdfast.dynamics.settings import SignalSettings
from holdfast.dynamics.states import draft_steps, token_steps
from holdfast.dynamics.trajectories import (
    RECOVERED,
    Recovery,
    band,
    incomplete_recovery,
    internal_recovery,
    recovery_features,
    text_recovery,
)
from holdfast.models.decoding.row_state import Drafting
from holdfast.rollout.rows import Rollout, requests_of
from holdfast.stats.auroc import auroc_difference, auroc_interval
from holdfast.stats.bootstrap import Estimate, undefined
from holdfast.stats.groups import (
    ATTACK_COMPLIED,
    ATTACK_REFUSED,
    BENIGN_COMPLIED,
    GROUPS,
)
from holdfast.stats.rates import clustered_mean, clustered_rate
from holdfast.study.figures import DIGITS, figure_of, generator


class Read(NamedTuple):
    """Rows with what was read of them."""

    rows: Sequence[Rollout]  # The rows.
    # Every channel, one entry per row.
    channels: Mapping[str, Float[Tensor, "example step"]]
    taken: frozenset[str]  # Base requests that the anchors were fitted on.
    seed: int  # Seed of the study.

    def places(self, rows: Sequence[Rollout]) -> list[int]:
        """Return where rows are among all."""
        known = {row.row_id: place for place, row in enumerate(self.rows)}
        return [known[row.row_id] for row in rows]

    def of(self, channel: str, rows: Sequence[Rollout]) -> Tensor:
        """Return one channel of some rows."""
        return self.channels[channel][self.places(rows)]


def summary(read: Read) -> dict[str, Any]:
    """Return the figures and curves of a signal, on rows that no anchor has seen."""
    rows = held_out(read.rows, read.taken)
    names = groups_of(rows)
    members = {
        group: [row for row, name in zip(rows, names, strict=True) if name == group]
        for group in GROUPS
    }
    found = _separations(read, rows) | _recovery(read, rows)
    return {
        "figures": {name: figure_of(each) for name, each in found.items()},
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


def _recovery(read: Read, rows: Sequence[Rollout]) -> dict[str, Estimate]:
    """Return what becomes of harmful drafts, where drafts were predicted ahead."""
    if READING not in read.channels:
        return {}
    harmful = [row for row in rows if row.label == "harmful"]
    if not harmful:
        nothing = undefined(0, "no harmful request is held out")
        return {f"text_{name}": nothing for name in Recovery._fields}
    found = text_recovery(
        read.of(READING, harmful).long(),
        read.of(CHANGED, harmful) > 0,
        requests_of(harmful),
        generator(read.seed, "signal/text_recovery"),
    )
    return {f"text_{name}": each for name, each in found._asdict().items()}


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


MOST_POSITIONS = 48
"""Positions of a response that a grid shows, from its beginning."""
OPEN, FRESH, KEPT = "open", "fresh", "kept"


def drafted(
    read: Read,
    row: Rollout,
    how: Drafting,
    settings: SignalSettings,
    tokenizer: ChatTokenizer,
) -> dict[str, Any]:
    """Return the steps of a response, and what stood where at each of them.

    `tokenizer`: For the text of the tokens.
    Returns: `steps`: the signal, the text-level signal and the text that was committed
    to. `words`: the response token by token, each with the step at which it was.
    `grid`: for each step the text at each position, and whether it was only predicted
    (`open`), committed to at this step (`fresh`) or before (`kept`).
    """
    end = min(len(row.token_ids) - row.spans.answer[0], MOST_POSITIONS)
    indices = draft_steps(how, settings).tolist()
    n_steps = 1 + indices.index(indices[-1])
    compliance = torch.sigmoid(read.of(LOGIT, [row])[0]).tolist()[:n_steps]
    said = read.of(TEXT, [row])[0].tolist()[:n_steps]
    grid, steps, before = [], [], -1
    for place, index in enumerate(indices[:n_steps]):
        texts = token_texts(tokenizer, how.drafts[index][:end])
        states = [
            OPEN if at > index else FRESH if at > before else KEPT
            for at in how.committed_at[:end]
        ]
        grid.append([list(cell) for cell in zip(texts, states, strict=True)])
        fresh = [
            text for text, state in zip(texts, states, strict=True) if state == FRESH
        ]
        steps.append(
            {
                "text": "".join(fresh),
                "compliance": round(compliance[place], 4),
                "text_signal": said[place],
            }
        )
        before = index
    final = token_texts(tokenizer, how.response[:end])
    # A token that a cut series never reaches has the tone of the last step.
    found = [
        next(
            (i for i, index in enumerate(indices[:n_steps]) if index >= at), n_steps - 1
        )
        for at in how.committed_at[:end]
    ]
    words = [list(pair) for pair in zip(final, found, strict=True)]
    return {"steps": steps, "words": words, "grid": grid}


def step_examples(
    read: Read,
    windows: Mapping[str, Window],
    settings: SignalSettings,
    tokenizer: ChatTokenizer,
    drafts: Mapping[str, Drafting] | None = None,
) -> list[dict[str, Any]]:
    """Return a few answers with the signal of every step.

    `windows`: The watched tokens of each row, by its id.
    `tokenizer`: For the text of the tokens.
    Returns: One record per row: its group, its verdict, and for each step the text that
    it added, the signal, and the text-level signal beside it; where there are drafts,
    the grid of positions and steps.
    """
    rows = typical(read)
    if drafts is not None:
        return [
            _head(row, group)
            | drafted(read, row, drafts[row.row_id], settings, tokenizer)
            for row, group in zip(rows, groups_of(rows), strict=True)
        ]
    return [
        _example(read, row, group, windows[row.row_id], settings, tokenizer)
        for row, group in zip(rows, groups_of(rows), strict=True)
    ]


def _example(
    read: Read,
    row: Rollout,
    group: str,
    window: Window,
    settings: SignalSettings,
    tokenizer: ChatTokenizer,
) -> dict[str, Any]:
    start = len(window.token_ids) + 1 - window.n
    texts = token_texts(tokenizer, row.token_ids[start : start + window.n])
    compliance = torch.sigmoid(read.of(LOGIT, [row])[0]).tolist()
    said = read.of(TEXT, [row])[0].tolist()
    steps, before = [], 0
    for step, index in enumerate(token_steps(window.n, settings).tolist()):
        if step and index + 1 == before:
            # The text has ended; what follows says the same again.
            break
        steps.append(
            {
                "text": "".join(texts[before : index + 1]),
                "compliance": round(compliance[step], 4),
                "text_signal": said[step],
            }
        )
        before = index + 1
    return _head(row, group) | {"steps": steps}


def _head(row: Rollout, group: str) -> dict[str, Any]:
    return {
        "title": row.wrapper or row.role,
        "group": group,
        "verdict": f"{row.verdict}: {row.reason}",
    }
