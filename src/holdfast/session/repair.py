"""Self-repair: does the score come back, do other heads take over, is there more?"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.analysis.bootstrap import Estimate
from holdfast.analysis.heads import Head, drops, rank_heads, top_heads
from holdfast.analysis.means import bootstrap_means
from holdfast.analysis.paired import paired_difference
from holdfast.analysis.probe import Probe
from holdfast.models.capture import project_states
from holdfast.models.edits import HeadEdit, editing, head_factors
from holdfast.models.parts import Adapter
from holdfast.session.attributing import read, unpack
from holdfast.session.figures import figure_of, generator
from holdfast.session.rows import Rollout

LATE = 16
"""Tokens at the end of an answer over which the late score is the mean."""


def second_round(
    adapter: Adapter,
    rows: Sequence[Rollout],
    probe: Probe,
    first: Sequence[Head],
    seed: int,
    batch_size: int,
) -> tuple[tuple[Head, ...], dict[str, Any]]:
    """Rank heads again while the first ones are off, and say who took over.

    The tokens stay the same, so that nothing but the edit differs.

    Args:
        adapter: The model.
        rows: Complied harmful answers to training requests.
        probe: The probe.
        first: Heads that are off.
        seed: Seed of the intervals.
        batch_size: Rows at once.

    Returns:
        As many new heads, and figures: what all other heads contribute before and
        after, and the contribution of each new head before and after.
    """
    edit = HeadEdit(head_factors(adapter, first, 0.0))
    before, after = (
        unpack(
            read(adapter, rows, probe, batch_size=batch_size, edit=each), rows, adapter
        )
        for each in (None, edit)
    )
    ranking = rank_heads(
        after.readings, after.clusters, generator(seed, "repair/ranking")
    )
    others = [row for row in ranking if row.head not in first]
    new = top_heads(others, len(first))
    was, now = (drops(each.readings).total for each in (before, after))
    keep = torch.ones(was.shape[1:], dtype=torch.bool)
    for head in first:
        keep[head] = False
    rest_before, rest_after = (each[:, keep].sum(1) for each in (was, now))
    clusters = before.clusters
    block: dict[str, Any] = {
        "others_before": figure_of(_mean(rest_before, clusters, seed, "before")),
        "others_after": figure_of(_mean(rest_after, clusters, seed, "after")),
        "others_change": figure_of(
            paired_difference(
                rest_after, rest_before, clusters, generator(seed, "repair/change")
            )
        ),
        "new_heads": [],
    }
    for head in new:
        one, other = was[:, head.layer, head.head], now[:, head.layer, head.head]
        name = f"{head.layer}:{head.head}"
        block["new_heads"].append(
            {
                "layer": head.layer,
                "head": head.head,
                "before": figure_of(_mean(one, clusters, seed, f"{name}/before")),
                "after": figure_of(_mean(other, clusters, seed, f"{name}/after")),
            }
        )
    return new, block


def score_along_answers(
    adapter: Adapter,
    rows: Sequence[Mapping[str, Any]],
    probe: Probe,
    heads: Sequence[Head],
    batch_size: int,
) -> Float[Tensor, "example _"]:
    """Read the probe's logit before the answer and late in it, under an edit.

    Args:
        adapter: The model.
        rows: Rows of `ablation.parquet` of one condition.
        probe: The probe.
        heads: Heads that were off while the answers were drawn.
        batch_size: Rows at once.

    Returns:
        One row an answer: the logit at its final token, and the mean over its last
        tokens.
    """
    direction, offset = probe.raw()
    edit = HeadEdit(head_factors(adapter, heads, 0.0)) if heads else None
    with editing(adapter, edit):
        found = project_states(
            adapter,
            [row["token_ids"] for row in rows],
            direction.float()[None],
            torch.tensor([offset]),
            batch_size=batch_size,
        )
    ends = []
    for row, logits in zip(rows, found, strict=True):
        start = row["answer_start"]
        late = logits[max(start, len(logits) - LATE) :, 0]
        # An answer that is empty is as it was at its beginning.
        ends.append((logits[start - 1, 0], late.mean() if len(late) else logits[-1, 0]))
    return torch.tensor([[float(a), float(b)] for a, b in ends])


def comes_back(
    plain: Float[Tensor, "example _"],
    edited: Float[Tensor, "example _"],
    clusters: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Return the score before the answer and late in it, without and with the edit.

    Args:
        plain: What `score_along_answers` read without an edit.
        edited: The same with the heads off, prompt by prompt.
        clusters: The base request of each prompt.
        seed: Seed of the intervals.
    """
    columns = {
        "final_plain": plain[:, 0],
        "final_edited": edited[:, 0],
        "late_plain": plain[:, 1],
        "late_edited": edited[:, 1],
        "lost_again": (edited[:, 0] - plain[:, 0]) - (edited[:, 1] - plain[:, 1]),
    }
    return {
        name: figure_of(_mean(column, clusters, seed, f"score/{name}"))
        for name, column in columns.items()
    }


def in_words(block: Mapping[str, Any]) -> list[str]:
    """Say what the figures of self-repair mean.

    Args:
        block: Figures of `second_round` and of `comes_back`, side by side.
    """
    change, lost = block["others_change"], block["lost_again"]
    said = []
    if change["low"] is not None and change["low"] > 0:
        said.append(
            f"With the top heads off, other heads take more from the logit than before "
            f"({change['value']:.2f} more): they take over in part."
        )
    else:
        said.append("With the top heads off, no other heads visibly take over.")
    if lost["low"] is not None and lost["low"] > 0:
        said.append(
            f"The gain in the refusal logit shrinks along the answer, by "
            f"{lost['value']:.2f} of {_gain(block):.2f}."
        )
    else:
        said.append("The gain in the refusal logit does not visibly shrink again.")
    return said


def _gain(block: Mapping[str, Any]) -> float:
    plain, edited = block["final_plain"]["value"], block["final_edited"]["value"]
    return float(edited or 0) - float(plain or 0)


def _mean(values: Tensor, clusters: Sequence[str], seed: int, name: str) -> Estimate:
    found = bootstrap_means(
        values[:, None], clusters, generator(seed, f"repair/{name}")
    )
    return found[0]
