"""Causal effects of heads on a logit, at the cost of a few tokens.

One prefill up to the end of the thinking is shared by all heads. Taking a head away
touches the end template alone, so each head costs one cached pass of those few
tokens. The passes of many heads are one: their tokens stand side by side over the one
cache, which is never copied, and a mask keeps each head's tokens to themselves.
"""

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.errors import InputError, SettingsError
from holdfast.models.batching import longest_first, with_batch_halving
from holdfast.models.decoding.shared_prefix import (
    MAX_BYTES,
    RepeatedPrefix,
    SharedPrefix,
    copies_at_once,
    read_prefix,
)
from holdfast.models.finite import check_finite
from holdfast.models.hidden_states import check_lengths
from holdfast.models.interventions import Head, head_factors
from holdfast.models.model import Adapter

Moment = Literal["final_token", "end_template"]
MOMENTS: tuple[Moment, ...] = ("final_token", "end_template")


class Effects(NamedTuple):
    """What taking heads away does to the logit at the final token."""

    plain: Float[Tensor, "example"]  # The logit as it is.
    # Ablated minus clean logit, one column per candidate; positive where the heads had
    # lowered it.
    change: Float[Tensor, "example head"]


def causal_effects(
    adapter: Adapter,
    sequences: Sequence[Sequence[int]],
    n_template: Sequence[int],
    candidates: Sequence[Sequence[Head]],
    direction: Float[Tensor, "d_model"],
    offset: int | float = 0.0,
    *,
    moments: Collection[Moment] = MOMENTS,
    factor: int | float = 0.0,
    batch_size: int = 16,
    max_bytes: int = MAX_BYTES,
) -> dict[Moment, Effects]:
    """Scale heads at the final token, or over the end template, and read the logit.

    What a head writes early in the end template stays in the keys and values that
    the final token reads, so the second check sees what the first cannot.

    `direction`: Direction in the space after the final norm.
    Returns: Effects for each moment, in float32 on the CPU, in the order of the
    sequences and candidates.
    """
    check_lengths(adapter, sequences)
    _check_templates(sequences, n_template)
    if not candidates or not moments:
        raise SettingsError(
            "heads to ablate, and a moment to do it at",
            f"{len(candidates)} candidates, {len(moments)} moments",
            "Name at least one head, and `final_token` or `end_template`.",
        )
    tables = [head_factors(adapter, heads, factor) for heads in candidates]
    plan = _Plan(
        torch.stack([torch.ones_like(tables[0]), *tables]),
        direction.to(adapter.device, torch.float32),
        offset,
        tuple(moment for moment in MOMENTS if moment in moments),
        max_bytes,
    )
    # Only templates of one length can stand side by side without padding.
    order = sorted(longest_first(sequences), key=lambda row: n_template[row])
    found: dict[int, Tensor] = {}
    for length, group in groupby(order, key=lambda row: n_template[row]):
        rows = list(group)

        def run(batch: Sequence[int], length: int = length) -> list[Tensor]:
            return _run(adapter, plan, [sequences[row] for row in batch], length)

        results, _ = with_batch_halving(run, rows, batch_size)
        found |= zip(rows, results, strict=True)
    logits = _in_order(found, len(plan.moments), len(plan.tables))
    check_finite(logits, "the states under some head's edit")
    return {
        moment: Effects(logits[:, i, 0], logits[:, i, 1:] - logits[:, i, :1])
        for i, moment in enumerate(plan.moments)
    }


class _Plan(NamedTuple):
    tables: Float[Tensor, "_ layer head"]
    """Factors of each candidate, after those that change nothing."""
    direction: Float[Tensor, "d_model"]
    offset: int | float
    moments: tuple[Moment, ...]
    max_bytes: int


def _logits(
    prefix: SharedPrefix | RepeatedPrefix,
    token_ids: Int[Tensor, "example position"],
    plan: _Plan,
) -> Float[Tensor, "example _"]:
    """Return the logit after tokens that follow, for each table of factors."""
    length = token_ids.shape[1]

    def run(tables: Sequence[Tensor]) -> list[Tensor]:
        states = prefix.final_states(token_ids, torch.stack(list(tables)))
        found = states.float() @ plan.direction.to(states.device) + plan.offset
        return list(found.to("cpu").T)

    size = copies_at_once(prefix, length, plan.max_bytes)
    results, _ = with_batch_halving(run, list(plan.tables), size)
    return torch.stack(results, -1)


@torch.inference_mode()
def _run(
    adapter: Adapter, plan: _Plan, rows: Sequence[Sequence[int]], n_template: int
) -> list[Float[Tensor, "moment _"]]:
    """Return the logits of each sequence, by moment and table."""
    prefix = read_prefix(adapter, [row[:-n_template] for row in rows])
    template = torch.tensor([list(row[-n_template:]) for row in rows])
    template = template.to(adapter.device)
    found: dict[Moment, Tensor] = {}
    if "end_template" in plan.moments:
        found["end_template"] = _logits(prefix, template, plan)
    if "final_token" in plan.moments:
        prefix.extend(template[:, :-1])
        found["final_token"] = _logits(prefix, template[:, -1:], plan)
    return list(torch.stack([found[moment] for moment in plan.moments], 1))


def _in_order(
    found: dict[int, Tensor], n_moments: int, n_tables: int
) -> Float[Tensor, "example _ _"]:
    logits = torch.empty((len(found), n_moments, n_tables))
    # Copied outside inference mode: the result is an ordinary tensor.
    for row, result in found.items():
        logits[row] = result
    return logits


def _check_templates(
    sequences: Sequence[Sequence[int]], n_template: Sequence[int]
) -> None:
    if len(n_template) != len(sequences):
        raise InputError(
            f"one length of the end template for each of {len(sequences)} sequences",
            f"{len(n_template)}",
            "Pass the number of tokens that end each thinking.",
        )
    for index, (ids, length) in enumerate(zip(sequences, n_template, strict=True)):
        if not 0 < length < len(ids):
            raise InputError(
                f"an end template within the {len(ids)} tokens of sequence {index}, "
                "with something before it",
                f"{length} tokens",
                "Leave out rows whose thinking has not ended.",
            )
