"""The step-wise signal by group: figures, mean curves and examples."""

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
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
    SignalRows,
    Window,
    is_held_out,
    is_read,
)
from holdfast.dynamics.settings import SignalSettings
from holdfast.dynamics.states import draft_steps, steps_read
from holdfast.dynamics.trajectories import (
    RECOVERED,
    Recovery,
    incomplete_recovery,
    internal_recovery,
    recovery_features,
    text_recovery,
)
from holdfast.models.decoding.row_state import Drafting
from holdfast.rollout.rows import Rollout
from holdfast.stats.auroc import auroc_difference, auroc_interval
from holdfast.stats.bootstrap import Draws, Estimate, bootstrap_means, undefined
from holdfast.stats.groups import ATTACK_COMPLIED, ATTACK_REFUSED, BENIGN_COMPLIED
from holdfast.stats.rates import clustered_mean, clustered_rate
from holdfast.study.figures import DIGITS, draws_of, figure_of

MAX_POSITIONS = 48
"""Positions of a response that a grid shows, from its beginning."""
OPEN, FRESH, KEPT = "open", "fresh", "kept"


def summary(signal: SignalRows, seed: int) -> dict[str, Any]:
    """Return the figures and curves of a signal, on rows that no anchor has seen."""
    held_out = _held_out(signal)
    groups = held_out.by_group()
    draws = draws_of(seed, "signal")
    figures = _separations(signal, held_out, draws) | _recovery(held_out, draws)
    return {
        "figures": {name: figure_of(each) for name, each in figures.items()},
        "groups": {
            name: _group(each, draws_of(seed, f"signal/{name}"))
            for name, each in groups.items()
        },
        "curves": {
            channel: {
                name: _curve(each, channel, draws(f"{name}/{channel}"))
                for name, each in groups.items()
                if each.rows
            }
            for channel in (LOGIT, MATCHED, TEXT)
            if channel in signal.channels
        },
        "held_out": len(held_out.rows),
        "not_read": sum(not is_read(row) for row in signal.rows),
    }


def _held_out(signal: SignalRows) -> SignalRows:
    return signal.filter(partial(is_held_out, taken=signal.taken))


def _separations(
    signal: SignalRows, held_out: SignalRows, draws: Draws
) -> dict[str, Estimate]:
    """Return how well the last step tells plain refusals from benign compliance."""
    refused = held_out.filter(lambda row: row.role == "harmful" and row.is_refused)
    fresh = signal.filter(
        lambda row: row.is_complied and row.request_id not in signal.taken
    )
    complied = {
        "last_step": held_out.filter(
            lambda row: row.role == "benign" and row.is_complied
        ),
        "lookalike": fresh.filter(lambda row: row.role == LOOKALIKE),
    }
    figures = {}
    for name, benign in complied.items():
        both = benign.concat(refused)
        n_benign, n_refused = len(benign.rows), len(refused.rows)
        if not n_benign or not n_refused:
            reason = f"{n_benign} complied and {n_refused} refused rows held out"
            figures[f"{name}_auroc"] = undefined(len(both.rows), reason)
            continue
        labels = torch.arange(len(both.rows)) < n_benign
        last = {key: each[:, -1] for key, each in both.channels.items()}
        for prefix, channel in (("", LOGIT), ("matched_", MATCHED)):
            key = f"{prefix}{name}_auroc"
            if channel in last:
                figures[key] = auroc_interval(
                    last[channel], labels, both.requests, draws(key)
                )
        if MATCHED in last:
            key = f"matched_{name}_difference"
            figures[key] = auroc_difference(
                last[MATCHED], last[LOGIT], labels, both.requests, draws(key)
            )
    return figures


def _recovery(held_out: SignalRows, draws: Draws) -> dict[str, Estimate]:
    """Return what becomes of harmful drafts, where drafts were predicted ahead."""
    if READING not in held_out.channels:
        return {}
    harmful = held_out.filter(lambda row: row.label == "harmful")
    if not harmful.rows:
        nothing = undefined(0, "no harmful request is held out")
        return {f"text_{name}": nothing for name in Recovery._fields}
    recovery = text_recovery(
        harmful.channels[READING].long(),
        harmful.channels[CHANGED] > 0,
        harmful.requests,
        draws("text_recovery"),
    )
    return {f"text_{name}": each for name, each in recovery._asdict().items()}


def _group(group: SignalRows, draws: Draws) -> dict[str, Any]:
    """Return what the trajectories of a group do."""
    if not group.rows:
        return {"rows": 0, "requests": 0}
    requests = group.requests
    signal = torch.sigmoid(group.channels[LOGIT])
    figures = {
        f"recovered_below_{level:g}": internal_recovery(
            signal, requests, draws(f"recovered/{level}"), recovered=level
        )
        for level in RECOVERED
    }
    figures["incomplete_recovery"] = clustered_rate(
        incomplete_recovery(signal), requests, draws("incomplete")
    )
    columns = recovery_features(signal)._asdict()
    most = float(signal.shape[1] - 1)
    bounds = {"variation": (0.0, most), "crossings": (0.0, most)}
    if MATCHED in group.channels:
        moved = torch.sigmoid(group.channels[MATCHED]) - signal
        columns["matched_minus_published"] = moved.mean(1)
        bounds["matched_minus_published"] = (-1.0, 1.0)
    for name, column in columns.items():
        # Rows that are alike but for rounding show no spread; they count as alike.
        figures[name] = clustered_mean(
            column.double().round(decimals=DIGITS),
            requests,
            draws(name),
            bounds=bounds.get(name, (0.0, 1.0)),
        )
    return {"rows": len(group.rows), "requests": len(set(requests))} | {
        name: figure_of(each) for name, each in figures.items()
    }


def _curve(
    group: SignalRows, channel: str, draws: torch.Generator
) -> list[dict[str, Any]]:
    """Return the mean of a channel at every step, with its band."""
    values = group.channels[channel]
    signal = values if channel == TEXT else torch.sigmoid(values)
    bands = bootstrap_means(signal, group.requests, draws, bounds=(0.0, 1.0))
    return [
        {
            "step": step + 1,
            "mean": round(float(signal[:, step].mean()), DIGITS),
            "low": None if each.low is None else round(each.low, DIGITS),
            "high": None if each.high is None else round(each.high, DIGITS),
            "n": len(group.rows),
        }
        for step, each in enumerate(bands)
    ]


def typical(signal: SignalRows) -> SignalRows:
    """Return a few rows that show what trajectories do, chosen by rule.

    Of each group that is there the row of median dip, and of attacks that succeeded
    also the one with the deepest dip.
    """
    groups = _held_out(signal).by_group()
    chosen = signal.empty()
    for name in (BENIGN_COMPLIED, ATTACK_REFUSED, ATTACK_COMPLIED):
        group = groups[name]
        if not group.rows:
            continue
        least = torch.sigmoid(group.channels[LOGIT]).min(1).values.tolist()
        ids = [row.row_id for row in group.rows]
        order = sorted(range(len(least)), key=lambda i: (least[i], ids[i]))
        indices = [order[len(order) // 2]]
        if name == ATTACK_COMPLIED and order[0] not in indices:
            indices.append(order[0])
        chosen = chosen.concat(group.take(indices))
    return chosen


def step_examples(
    signal: SignalRows,
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
    chosen = typical(signal)
    examples = []
    for index, (row, group) in enumerate(zip(chosen.rows, chosen.groups, strict=True)):
        if drafts is None:
            shown = _written(row, windows[row.row_id], settings, tokenizer)
        else:
            shown = _drafted(row, drafts[row.row_id], settings, tokenizer)
        texts = shown.pop("texts")
        values = (
            torch.sigmoid(chosen.channels[LOGIT][index]).tolist(),
            chosen.channels[TEXT][index].tolist(),
        )
        steps = [
            {"text": text, "compliance": round(compliance, 4), "text_signal": by_text}
            for text, compliance, by_text in zip(texts, *values, strict=False)
        ]
        head = {"title": row.wrapper or row.role, "group": group}
        verdict = f"{row.verdict}: {row.reason}"
        examples.append(head | {"verdict": verdict, "steps": steps} | shown)
    return examples


def _written(
    row: Rollout, window: Window, settings: SignalSettings, tokenizer: ChatTokenizer
) -> dict[str, Any]:
    """Return the text that each step of an answer added."""
    start = window.start
    tokens = token_texts(tokenizer, row.token_ids[start : start + window.n])
    ends = [index + 1 for index in _until_end(steps_read(window.n, settings))]
    return {"texts": ["".join(tokens[a:b]) for a, b in pairwise([0, *ends])]}


def _until_end(steps: Tensor) -> list[int]:
    """Return the states read at each step; those after the text's end say it again."""
    indices: list[int] = steps.tolist()
    return indices[: 1 + indices.index(indices[-1])]


def _drafted(
    row: Rollout, how: Drafting, settings: SignalSettings, tokenizer: ChatTokenizer
) -> dict[str, Any]:
    """Return what stood where at each step of a response.

    Returns: `texts`: what each step committed to. `words`: the response token by token,
    each with the step that committed to it. `grid`: for each step the text at each
    position, and whether it was only predicted (`open`), committed to at this step
    (`fresh`) or before (`kept`).
    """
    end = min(len(row.token_ids) - row.spans.answer[0], MAX_POSITIONS)
    indices = _until_end(draft_steps(how, settings))
    grid, texts, before = [], [], -1
    for index in indices:
        words = token_texts(tokenizer, how.drafts[index][:end])
        states = [
            OPEN if at > index else FRESH if at > before else KEPT
            for at in how.committed_at[:end]
        ]
        cells = list(zip(words, states, strict=True))
        grid.append([list(cell) for cell in cells])
        texts.append("".join(word for word, state in cells if state == FRESH))
        before = index
    # A token that a cut series never reaches has the tone of the last step.
    steps = [
        min(sum(index < at for index in indices), len(indices) - 1)
        for at in how.committed_at[:end]
    ]
    final = token_texts(tokenizer, how.response[:end])
    settled = [list(pair) for pair in zip(final, steps, strict=True)]
    return {"texts": texts, "words": settled, "grid": grid}
