"""Can the outcome be read at the first token of the thinking, and better later on?

A probe is fitted at each place on training requests and tried on others. Beside it
stand what the length of the prompt and its words alone would say: an outcome that
hangs on the wrapper is in the prompt, and no thinking is needed to know it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.cliff.commitment.cuts import SHARES
from holdfast.cliff.commitment.opened import Opened
from holdfast.cliff.commitment.settings import file_of
from holdfast.cliff.probe import FOLDS, fit_probe
from holdfast.models.hidden_states import states_at
from holdfast.rollout.rows import Rollout, is_refused, requests_of
from holdfast.stats.auroc import auroc_difference, auroc_interval
from holdfast.stats.bootstrap import Estimate, undefined
from holdfast.study.figures import figure_of, generator

KEY = "first_token"
ROLES = ("harmful", "wrapped")
PENALTIES = (1e-2, 1.0)
"""Penalties to choose from: few, since a dozen probes are fitted."""
SOURCE = (
    "the outcome read at the first thinking token: https://arxiv.org/abs/2606.25013"
)


class Parts(NamedTuple):
    """Harmful answers that refused or complied: to fit on, and to try on."""

    train: list[Rollout]
    test: list[Rollout]

    @property
    def missing(self) -> str:
        """Why nothing can be fitted or tried; empty where something can."""
        counts = [
            len({row.request_id for row in part if row.is_refused is side})
            for part in self
            for side in (True, False)
        ]
        if min(counts[:2]) >= FOLDS and min(counts[2:]) >= 2:
            return ""
        return (
            f"harmful requests that were refused and complied with: {counts[0]} and "
            f"{counts[1]} to fit on, {counts[2]} and {counts[3]} to try on; {FOLDS} of "
            "each are needed to fit on, and 2 to try on"
        )


def run(opened: Opened) -> dict[str, Any]:
    """Fit and try a probe at each place; writes `decide_first_token.json`."""
    least = opened.settings.min_thinking
    with opened.stage(KEY, {"shares": SHARES, "min_thinking": least}) as stage:
        if stage.is_done:
            return stage.read_json(file_of(KEY))
        rows = [
            row
            for row in opened.every
            if row.role in ROLES and row.is_decided and row.n_thinking >= least
        ]
        parts = Parts(*([r for r in rows if r.split == p] for p in ("train", "test")))
        return stage.write_json(file_of(KEY), _block(opened, parts))


def _block(opened: Opened, parts: Parts) -> dict[str, Any]:
    names = ("auroc", "within_wrapper", "length_alone", "words_alone", "beyond_words")
    counted = {
        "n_train": len(parts.train),
        "n_test": len(parts.test),
        "source": SOURCE,
    }
    if why := parts.missing:
        nothing = figure_of(undefined(len(parts.test), why))
        return counted | dict.fromkeys(names, nothing) | {"places": [], "reason": why}
    seed, labels = opened.seed, is_refused(parts.test)
    train, test = (_states(opened, part) for part in parts)
    asked, asked_then = (
        [row.token_ids[slice(*row.spans.prompt)] for row in part] for part in parts
    )
    first = _logits(parts, train[:, 0], test[:, 0], seed)
    length = _logits(parts, _lengths(asked), _lengths(asked_then), seed)
    words = _logits(parts, *_bags(asked, asked_then), seed=seed)
    clusters = requests_of(parts.test)
    wrappers = [row.wrapper or "none" for row in parts.test]

    def draws(name: str) -> torch.Generator:
        return generator(seed, f"decide/first_token/{name}")

    found: dict[str, Estimate] = {
        "auroc": auroc_interval(first, labels, clusters, draws("auroc")),
        "within_wrapper": auroc_interval(
            first, labels, clusters, draws("within"), wrappers
        ),
        "length_alone": auroc_interval(length, labels, clusters, draws("length")),
        "words_alone": auroc_interval(words, labels, clusters, draws("words")),
        "beyond_words": auroc_difference(
            first, words, labels, clusters, draws("beyond")
        ),
    }
    places = []
    for place, share in enumerate((*SHARES, None), start=1):
        logits = _logits(parts, train[:, place], test[:, place], seed)
        estimate = auroc_interval(logits, labels, clusters, draws(f"place/{share}"))
        places.append({"at": share, "auroc": figure_of(estimate)})
    return (
        counted
        | {name: figure_of(each) for name, each in found.items()}
        | {"places": places, "reason": ""}
    )


def _states(
    opened: Opened, rows: Sequence[Rollout]
) -> Float[Tensor, "example place d_model"]:
    """Return the states at the first thinking token, at `SHARES`, and at the end."""
    places = []
    for row in rows:
        start, end = row.spans.thinking
        cuts = [start + round(share * (end - start)) - 1 for share in SHARES]
        places.append([start, *cuts, row.final])
    return torch.stack(
        states_at(
            opened.session.adapter,
            [row.token_ids[: row.final + 1] for row in rows],
            places,
            batch_size=opened.session.batch_size,
        )
    )


def _logits(
    parts: Parts,
    train: Float[Tensor, "_ feature"],
    test: Float[Tensor, "example feature"],
    seed: int,
) -> Float[Tensor, "example"]:
    """Fit on training rows, and return what is read off the others."""
    probe = fit_probe(
        train,
        is_refused(parts.train),
        clusters=requests_of(parts.train),
        seed=seed,
        l2_grid=PENALTIES,
    )
    return probe.logit(test)


def _lengths(prompts: Sequence[Sequence[int]]) -> Float[Tensor, "example 1"]:
    return torch.tensor([[float(len(each))] for each in prompts])


def _bags(
    train: Sequence[Sequence[int]], test: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, "_ word"], Float[Tensor, "example word"]]:
    """Return prompts as bags of tokens, each weighed by how rare it is in training."""
    seen = Counter(token for prompt in train for token in set(prompt))
    column = {token: place for place, token in enumerate(sorted(seen))}
    rarity = torch.tensor([len(train) / seen[token] for token in column]).log() + 1

    def bag(prompts: Sequence[Sequence[int]]) -> Tensor:
        made = torch.zeros(len(prompts), len(column))
        for row, prompt in enumerate(prompts):
            for token, count in Counter(prompt).items():
                if token in column:
                    made[row, column[token]] = count
        return torch.nn.functional.normalize(made * rarity, dim=-1)

    return bag(train), bag(test)
