"""Words that give an outcome away: found on training rows, masked on others."""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

SIGNIFICANT = 1.96
"""Standard errors from which a token is taken to go with an outcome."""


def telling_tokens(
    documents: Sequence[Sequence[int]], labels: Bool[Tensor, "example"], n: int
) -> tuple[int, ...]:
    """Return the tokens that most go with True, at most `n`, the strongest first.

    By the difference of the shares of rows that have the token at least once, divided
    by its standard error where both shares are the same.

    `documents`: The tokens of each row.
    """
    totals = int(labels.sum()), int((~labels).sum())
    if not all(totals):
        return ()
    counts: dict[int, list[int]] = {}
    for tokens, label in zip(documents, labels.tolist(), strict=True):
        for token in set(tokens):
            counts.setdefault(token, [0, 0])[0 if label else 1] += 1
    found: dict[int, float] = {}
    for token, (here, there) in counts.items():
        pooled = (here + there) / sum(totals)
        error = pooled * (1 - pooled) * sum(1 / total for total in totals)
        if error > 0:
            apart = here / totals[0] - there / totals[1]
            found[token] = float(apart / error**0.5)
    kept = [token for token, value in found.items() if value >= SIGNIFICANT]
    return tuple(sorted(kept, key=lambda token: (-found[token], token))[:n])


def mask(
    tokens: Sequence[int], telling: Collection[int], generator: torch.Generator
) -> tuple[int, ...] | None:
    """Return tokens in which each telling one is another of the same row.

    Returns: As many tokens; None where the row has none but telling ones.
    """
    neutral = [token for token in tokens if token not in telling]
    if not neutral:
        return None
    drawn = torch.randint(len(neutral), (len(tokens),), generator=generator).tolist()
    return tuple(
        neutral[place] if token in telling else token
        for token, place in zip(tokens, drawn, strict=True)
    )


def mask_as_many(
    tokens: Sequence[int], telling: Collection[int], generator: torch.Generator
) -> tuple[int, ...] | None:
    """Return tokens in which as many are replaced as `mask` does, at random places."""
    neutral = [token for token in tokens if token not in telling]
    if not neutral:
        return None
    count = len(tokens) - len(neutral)
    places = set(torch.randperm(len(tokens), generator=generator)[:count].tolist())
    drawn = torch.randint(len(neutral), (len(tokens),), generator=generator).tolist()
    return tuple(
        neutral[drawn[place]] if place in places else token
        for place, token in enumerate(tokens)
    )
