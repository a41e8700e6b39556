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
from holdfast.cliff.probe import Probe
from holdfast.data.splits import Test, Train
from holdfast.errors import TooFewExamplesError
from holdfast.heads.attribution import Attribution, attribute
from holdfast.heads.causal_effects import MOMENTS, Moment, causal_effects
from holdfast.heads.ranking import Head, Readings
from holdfast.heads.settings import MIN_REQUESTS
from holdfast.models.interventions import HeadEdit, scale_heads
from holdfast.models.model import Adapter
from holdfast.rollout.rows import ATTACK_SUCCESS_OUTCOMES, Rollout
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


MIN_TRIED = 5
LEAST = 0.05
"""Success on training requests below which a wrapper does not work at all."""
NEAR_BEST = 0.75
"""A wrapper works if it does so at least this often, relative to the best one."""
HARMFUL = ("harmful", "wrapped")
BENIGN = ("benign", "benign_wrapped")
LOOKALIKE = "safe_lookalike"


class Selected(NamedTuple):
    """Complied harmful answers: those that rank heads, and those that check them."""

    ranking: Train[Rollout]
    checking: Test[Rollout]


class Prompts(NamedTuple):
    """Held-out answers whose prompts are asked again."""

    harmful: list[Rollout]  # Under the wrappers that work, complied with or not.
    # Harmful prompts of all other kinds, which are refused so far.
    others: list[Rollout]
    benign: list[Rollout]  # Plain and wrapped.
    # Harmless ones that sound dangerous, if the study has any.
    lookalikes: list[Rollout]
    # The wrappers that work on training requests; None is no wrapper.
    wrappers: list[str | None]


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
        and row.spans.thinking[1] - row.spans.thinking[0] >= MIN_TOKENS
    ]
    parts = [_first(_of(found, split), len(found)) for split in ("train", "test")]
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


def choose_prompts(rows: Sequence[Rollout], limit: int) -> Prompts:
    """Return held-out prompts to ask again: harmful ones that may work, and benign.

    Which wrappers work is read off training requests, so that no prompt is chosen by
    the outcome that is measured on it.

    `limit`: At most so many of each label, by content hash; of lookalikes half as many.
    """
    working = _working(_of(rows, "train"))
    test = [row for row in _of(rows, "test") if row.closed]
    asked = [row for row in test if row.role in HARMFUL]
    harmful = [row for row in asked if (row.role, row.wrapper) in working]
    others = [row for row in asked if (row.role, row.wrapper) not in working]
    benign = [row for row in test if row.role in BENIGN]
    if not harmful or not benign:
        raise TooFewExamplesError(
            "held-out harmful prompts of a kind that works on training requests, and "
            "held-out benign ones",
            f"{len(harmful)} and {len(benign)}",
            "Where no attack succeeds there is nothing to ablate; else add prompts.",
        )
    names = {row.wrapper for row in harmful}
    return Prompts(
        _first(harmful, limit),
        _first(others, limit),
        _first(benign, limit),
        _first([row for row in test if row.role == LOOKALIKE], -(-limit // 2)),
        sorted(names, key=lambda name: name or ""),
    )


def _working(train: Sequence[Rollout]) -> set[tuple[str, str | None]]:
    rates: dict[tuple[str, str | None], float] = {}
    for role, wrapper in {(row.role, row.wrapper) for row in train}:
        kind = [row for row in train if (row.role, row.wrapper) == (role, wrapper)]
        if role in HARMFUL and len(kind) >= MIN_TRIED:
            hits = sum(row.verdict in ATTACK_SUCCESS_OUTCOMES for row in kind)
            rates[role, wrapper] = hits / len(kind)
    best = max(rates.values(), default=0.0)
    least = max(LEAST, NEAR_BEST * best)
    return {kind for kind, rate in rates.items() if rate > LEAST and rate >= least}


def _of(rows: Sequence[Rollout], split: str) -> list[Rollout]:
    return [row for row in rows if row.split == split]


def _first(rows: Sequence[Rollout], limit: int) -> list[Rollout]:
    """Return the first rows by content hash, one role and sample as good as another."""
    return sorted(rows, key=lambda row: (row.prompt_id, row.row_id))[:limit]
