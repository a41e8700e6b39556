"""The prompts that heads are ranked on, and what every head adds there.

Heads are chosen on training requests alone, and so are the wrappers that are said to
work; everything that is reported is measured on held-out requests.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.cliff.cliff import MIN_TOKENS
from holdfast.cliff.fit import vectors_per_row
from holdfast.cliff.held_out import HARMFUL, first_by_hash, of_split
from holdfast.cliff.probe import Probe
from holdfast.data.splits import Test, Train
from holdfast.errors import TooFewExamplesError
from holdfast.heads.attribution import Attribution, attribute
from holdfast.heads.causal_effects import MOMENTS, Moment, causal_effects
from holdfast.heads.ranking import Head, Readings
from holdfast.heads.settings import MIN_REQUESTS
from holdfast.models.interventions import HeadEdit, scale_heads
from holdfast.models.model import Adapter
from holdfast.rollout.rows import Rollout
from holdfast.rollout.session import Session
from holdfast.study.batches import Batches
from holdfast.study.directory import Stage

OTHERS = (
    "mlps",
    "biases",
    "embedding",
    "plateau_logit",
    "final_logit",
    "mixers",
)
CAUSAL = "heads_causal"
"""Folder of the batches of the second half of the stage `heads`."""


class Read(NamedTuple):
    """What was read of each head, and of everything else, on each row."""

    readings: Readings  # Of the heads.
    # Plateau minus final token of all MLPs, all biases and the embedding, then the
    # logit at both, in the order of `OTHERS`, and of mixers where there are any.
    others: Float[Tensor, "example _"]
    clusters: list[str]  # The base request of each row.


def read(
    adapter: Adapter,
    rows: Sequence[Rollout],
    probe: Probe,
    *,
    batch_size: int,
    edit: HeadEdit | None = None,
) -> Float[Tensor, "example _"]:
    """Attribute plateau and final token of each row; one line of numbers per row."""
    adapter.require("heads")
    direction, offset = probe.raw()
    mixers = any(block.has_mixer for block in adapter.blocks)
    with scale_heads(adapter, edit):
        found = attribute(
            adapter,
            [row.token_ids[: row.final + 1] for row in rows],
            [row.spans.thinking for row in rows],
            direction.float(),
            offset,
            tail=1,
            batch_size=batch_size,
        )
    return torch.stack([_line(each, mixers=mixers) for each in found])


def unpack(
    lines: Float[Tensor, "example _"], rows: Sequence[Rollout], adapter: Adapter
) -> Read:
    """Return what `read` found, taken apart."""
    shape = (len(lines), adapter.n_layers, adapter.n_heads)
    size = shape[1] * shape[2]
    heads = [lines[:, i * size : (i + 1) * size].reshape(shape) for i in range(4)]
    rest = lines[:, 4 * size :]
    readings = Readings(
        plateau=heads[0],
        plateau_unscaled=heads[1],
        plateau_inverse_rms=rest[:, 0],
        final=heads[2],
        final_inverse_rms=rest[:, 1],
        published=heads[3],
    )
    return Read(readings, rest[:, 2:], [row.request_id for row in rows])


def read_in_batches(
    stage: Stage, session: Session, rows: Sequence[Rollout], probe: Probe
) -> Read:
    """Attribute rows, keeping each finished batch on disk."""
    adapter, batches = session.adapter, Batches(stage, session.batch_size)
    lines = vectors_per_row(
        batches,
        rows,
        lambda batch: read(adapter, batch, probe, batch_size=batches.batch_size),
        "Attributing to heads",
    )
    return unpack(lines, rows, adapter)


def ablate_one_by_one(
    stage: Stage,
    session: Session,
    rows: Sequence[Rollout],
    probe: Probe,
    heads: Sequence[Head],
) -> Mapping[Moment, Float[Tensor, "example head"]]:
    """Ablate each head, at the final token and over the end template."""
    adapter = session.adapter
    batches = Batches(stage, session.batch_size, parts=CAUSAL)
    direction, offset = probe.raw()

    def change(batch: Sequence[Rollout]) -> Float[Tensor, "example _"]:
        effects = causal_effects(
            adapter,
            [row.token_ids[: row.final + 1] for row in batch],
            [row.final + 1 - row.spans.end_template[0] for row in batch],
            [[head] for head in heads],
            direction.float(),
            offset,
            batch_size=batches.batch_size,
        )
        return torch.cat([effects[each].change for each in MOMENTS], 1)

    both = vectors_per_row(batches, rows, change, "Taking heads away").chunk(
        len(MOMENTS), 1
    )
    return dict(zip(MOMENTS, both, strict=True))


def _line(found: Attribution, *, mixers: bool) -> Float[Tensor, "_"]:
    level, end = found.plateau, found.tail
    others = [
        level.mlps.sum() - end.mlps[-1].sum(),
        level.biases.sum() - end.biases[-1].sum(),
        level.embedding - end.embedding[-1],
        torch.tensor(found.plateau_logit),
        found.tail_logits[-1],
    ]
    if mixers:
        others.append(level.mixers.sum() - end.mixers[-1].sum())
    rms = [torch.tensor(found.plateau_inverse_rms), found.tail_inverse_rms[-1]]
    return torch.cat(
        [
            level.heads.flatten(),
            found.plateau_unscaled.flatten(),
            end.heads[-1].flatten(),
            found.published.flatten(),
            torch.stack([each.float() for each in [*rms, *others]]),
        ]
    ).float()


class Selected(NamedTuple):
    """Complied harmful answers: those that rank heads, and those that check them."""

    ranking: Train[Rollout]
    checking: Test[Rollout]


def select(
    rows: Sequence[Rollout], limit: int, flag: str = "--selection-prompts"
) -> Selected:
    """Return complied harmful answers with enough thinking, by split.

    `flag`: The flag that sets the limit, which a message names where it is to blame.
    """
    found = [
        row
        for row in rows
        if row.role in HARMFUL
        and row.is_complied
        and row.closed
        and row.n_thinking >= MIN_TOKENS
    ]
    parts = [
        first_by_hash(of_split(found, split), len(found)) for split in ("train", "test")
    ]
    least = [_rows_for(part, MIN_REQUESTS) for part in parts]
    if any(n is None or n > limit for n in least):
        raise _too_few([part[:limit] for part in parts], least, flag)
    train, test = (tuple(part[:limit]) for part in parts)
    return Selected(Train(train), Test(test))


def _rows_for(rows: Sequence[Rollout], n_requests: int) -> int | None:
    """Return how many first rows hold so many base requests; None if all do not."""
    seen: set[str] = set()
    for count, row in enumerate(rows, start=1):
        seen.add(row.request_id)
        if len(seen) == n_requests:
            return count
    return None


def _too_few(
    parts: Sequence[Sequence[Rollout]], least: Sequence[int | None], flag: str
) -> TooFewExamplesError:
    """Return whether the data are short, or only what the flag has left of them."""
    counts = [len({row.request_id for row in part}) for part in parts]
    enough = [n for n in least if n is not None]
    advice = (
        f"Set {flag} to {max(enough)} or more, which holds as many requests."
        if len(enough) == len(least)
        else "Where no attack succeeds there is no head to find; else add harmful "
        "prompts that the model complies with."
    )
    return TooFewExamplesError(
        f"complied harmful answers to {MIN_REQUESTS} training requests and as many "
        f"held-out ones, with {MIN_TOKENS} tokens of thinking or more",
        f"{counts[0]} and {counts[1]}",
        advice,
    )
