"""The probe's score when the words that give an outcome away are masked."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from holdfast.cliff.commitment.causes.words import mask, mask_as_many, telling_tokens
from holdfast.cliff.commitment.opened import Opened
from holdfast.cliff.probe_files import read_own_probe
from holdfast.data.splits import Test, Train
from holdfast.models.hidden_states import final_states
from holdfast.rollout.rows import Rollout, is_refused, requests_of
from holdfast.stats.auroc import auroc_difference, auroc_interval
from holdfast.stats.rates import clustered_mean
from holdfast.study.figures import draws_of, figure_of, generator

Mask = Callable[
    [Sequence[int], Collection[int], torch.Generator], tuple[int, ...] | None
]


def masked_scores(
    opened: Opened, rows: Sequence[Rollout], train: Train[Rollout]
) -> dict[str, Any]:
    """Return the probe's AUROC on held-out answers, with words masked and without.

    Words are found on training rows: those that go with refusals, and with either
    outcome. Beside them as many other tokens are masked, at random places.
    """
    test = Test(
        tuple(
            row
            for row in rows
            if row.split == "test"
            and row.is_decided
            and row.role in ("harmful", "wrapped", "benign", "benign_wrapped")
        )
    )
    most = opened.settings.masked_words
    refusing, complying = giveaways(train, most)
    both = (*refusing, *complying)
    masks: dict[str, tuple[Mask, tuple[int, ...]]] = {
        "refusal_words": (mask, refusing),
        "all_words": (mask, both),
        "as_many": (mask_as_many, both),
    }
    probe, _ = read_own_probe(opened.study, "published")
    labels = is_refused(list(test))

    def scores(sequences: Sequence[Sequence[int]]) -> Float[Tensor, "example"]:
        states = final_states(
            opened.session.adapter, sequences, batch_size=opened.session.batch_size
        )
        return probe.logit(states)

    plain = [row.token_ids[: row.final + 1] for row in test]
    before = scores(plain)
    tokenizer = opened.session.adapter.tokenizer
    block: dict[str, Any] = {
        "tokens": {
            "refusing": [tokenizer.decode([token]) for token in refusing],
            "complying": [tokenizer.decode([token]) for token in complying],
        },
        "before": figure_of(
            auroc_interval(
                before,
                labels,
                requests_of(list(test)),
                generator(opened.seed, "use/words/before"),
            )
        ),
    }
    for name, (way, telling) in masks.items():
        masked = [_masked(row, way, telling, opened.seed, name) for row in test]
        kept = [place for place, each in enumerate(masked) if each is not None]
        after = scores([each for each in masked if each is not None])
        block[name] = _compared(
            opened, list(test), kept, labels, (before, after), name
        ) | {
            "lost": len(masked) - len(kept),
            "masked": figure_of(
                clustered_mean(
                    torch.tensor([_share(row, telling) for row in test]),
                    requests_of(list(test)),
                    generator(opened.seed, f"use/words/share/{name}"),
                    bounds=(0.0, 1.0),
                )
            ),
        }
    return block


def giveaways(train: Train[Rollout], n: int) -> tuple[tuple[int, ...], ...]:
    """Return the tokens in thinkings that go with refusals, and with compliances."""
    rows = list(train)
    documents = [row.token_ids[slice(*row.spans.thinking)] for row in rows]
    labels = is_refused(rows)
    return telling_tokens(documents, labels, n), telling_tokens(documents, ~labels, n)


def _masked(
    row: Rollout, way: Mask, telling: Collection[int], seed: int, name: str
) -> tuple[int, ...] | None:
    start, end = row.spans.thinking
    source = generator(seed, f"use/words/{name}/{row.row_id}")
    inside = way(row.token_ids[start:end], telling, source)
    if inside is None:
        return None
    return (*row.token_ids[:start], *inside, *row.token_ids[end : row.final + 1])


def _share(row: Rollout, telling: Collection[int]) -> float:
    tokens = row.token_ids[slice(*row.spans.thinking)]
    return sum(token in telling for token in tokens) / max(1, len(tokens))


def _compared(
    opened: Opened,
    test: Sequence[Rollout],
    kept: Sequence[int],
    labels: Bool[Tensor, "example"],
    scores: tuple[Float[Tensor, "example"], Float[Tensor, "_"]],
    name: str,
) -> dict[str, Any]:
    before, after = scores[0][list(kept)], scores[1]
    clusters, own = requests_of([test[place] for place in kept]), labels[list(kept)]
    draws = draws_of(opened.seed, f"use/words/{name}")
    return {
        "auroc": figure_of(auroc_interval(after, own, clusters, draws("after"))),
        "change": figure_of(
            auroc_difference(after, before, own, clusters, draws("change"))
        ),
    }
