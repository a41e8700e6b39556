"""How far two raters agree, beyond what chance alone would give.

Rows of one request (its answers by several models) rise and fall together, so all
intervals draw whole requests.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.errors import InputError
from holdfast.stats.bootstrap import (
    Estimate,
    bootstrap,
    check_lengths,
)


def confusion(
    first: Sequence[str], second: Sequence[str], labels: Sequence[str]
) -> Int[Tensor, "label label"]:
    """Count how often each pair of labels was given.

    `first`: Labels by one rater, one per row.
    `second`: Labels by the other.
    `labels`: All labels there are, in the order of the table.
    Returns: Counts; the first rater is down, the second across.

    Raises:
        InputError: If the raters have different numbers of rows, or a label is not
            among `labels`.
    """
    check_lengths(len(first), second)
    places = {label: place for place, label in enumerate(labels)}
    strange = sorted({*first, *second} - set(places))
    if strange:
        raise InputError(
            f"labels among {', '.join(labels)}",
            ", ".join(strange),
            "Give all labels, or leave out the rows that have others.",
        )
    table = torch.zeros((len(labels), len(labels)), dtype=torch.int64)
    for one, other in zip(first, second, strict=True):
        table[places[one], places[other]] += 1
    return table


def kappa(
    first: Sequence[str],
    second: Sequence[str],
    clusters: Sequence[str],
    generator: torch.Generator,
) -> Estimate:
    """Return Cohen's kappa with an interval over base requests.

    1 is perfect agreement, 0 what two raters with these habits would reach by
    chance. It is undefined where both raters give one and the same label to all
    rows, and then says so rather than "perfect".

    `first`: Labels by one rater, one per row.
    `second`: Labels by the other.
    Returns: The estimate, or the reason why there is none.

    Raises:
        InputError: If the three have different lengths.
    Source: Cohen, "A coefficient of agreement for nominal scales", Educational and
    Psychological Measurement 20 (1960).
    """
    check_lengths(len(first), second, clusters)
    labels = sorted({*first, *second})
    one, other = _one_hot(first, labels), _one_hot(second, labels)
    same = (one * other).sum(1)

    def statistic(weights: Tensor) -> Tensor:
        total = weights.sum(1)
        observed = (weights @ same) / total
        shares = ((weights @ one) / total[:, None], (weights @ other) / total[:, None])
        expected = (shares[0] * shares[1]).sum(1)
        room = 1 - expected
        nothing = torch.full_like(room, torch.nan)
        safe = torch.where(room > 1e-12, room, torch.ones_like(room))
        return torch.where(room > 1e-12, (observed - expected) / safe, nothing)

    return bootstrap(statistic, clusters, generator)


def _one_hot(rows: Sequence[str], labels: Sequence[str]) -> Float[Tensor, "_ label"]:
    places = {label: place for place, label in enumerate(labels)}
    table = torch.zeros((len(rows), len(labels)), dtype=torch.float64)
    for row, label in enumerate(rows):
        table[row, places[label]] = 1
    return table
