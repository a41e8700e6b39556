"""Which heads let refusal go: contributions, their ranking, and heads to compare with.

A head's contribution to the cliff is what it adds to the probe's logit on the plateau
less what it adds at the final token, each under the token's own root mean square. It
is large where the head's change takes the logit down.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from decimal import Decimal
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.errors import InputError, SettingsError
from holdfast.stats.bootstrap import Estimate, bootstrap_means, check_lengths

By = Literal["drop", "published"]


class Head(NamedTuple):
    """A head by its block and its place in it, both counted from 0."""

    layer: int
    head: int


class Readings(NamedTuple):
    """What was read of each head on each example."""

    # Mean contribution over the plateau, each token under its own RMS.
    plateau: Float[Tensor, "example layer head"]
    # The same mean before division by the RMS.
    plateau_unscaled: Float[Tensor, "example layer head"]
    plateau_inverse_rms: Float[Tensor, "example"]  # Mean of 1 / RMS over the plateau.
    # Contribution at the final token under its own RMS.
    final: Float[Tensor, "example layer head"]
    final_inverse_rms: Float[Tensor, "example"]  # 1 / RMS at the final token.
    # What the head writes at the final token along the direction of unit length, before
    # the final norm and without its weight.
    published: Float[Tensor, "example layer head"]


class Drops(NamedTuple):
    """How much each head lowers the logit from the plateau to the final token."""

    # Plateau minus final token; what is ranked.
    total: Float[Tensor, "example layer head"]
    # The part from what the head writes, at the mean of both 1 / RMS.
    written: Float[Tensor, "example layer head"]
    # The part from the change of the RMS, which other parts of the model make as well;
    # `written + rms = total`.
    rms: Float[Tensor, "example layer head"]


class RankedHead(NamedTuple):
    """One head in the order of its contribution."""

    rank: int  # Place in the order, from 1.
    head: Head  # Which one.
    # Mean of what is ranked, with an interval over base requests.
    contribution: Estimate
    rms_change: Estimate  # Mean of the part that the change of the RMS makes.
    plateau: float  # Mean contribution to the logit on the plateau.
    final: float  # Mean contribution to the logit at the final token.


def drops(readings: Readings) -> Drops:
    """Split each head's drop into what it writes and what the RMS does.

    With `a` before and `a / r` after division by the RMS, at a plateau token `p` and
    the final token `T`:

        a_p/r_p - a_T/r_T = (a_p - a_T)(1/r_p + 1/r_T)/2 + (a_p + a_T)(1/r_p - 1/r_T)/2

    The split treats both tokens alike; it is averaged over the plateau exactly.

    Args:
        readings: What was read of each head.
    """
    inverse = readings.final_inverse_rms[:, None, None]
    on_plateau = readings.plateau_inverse_rms[:, None, None]
    unscaled = readings.final / inverse
    # The means over the plateau of a_p / r_T and of a_T / r_p.
    crossed = readings.plateau_unscaled * inverse
    crossing = unscaled * on_plateau
    total = readings.plateau - readings.final
    written = (total + crossed - crossing) / 2
    return Drops(total, written, (total - crossed + crossing) / 2)


def rank_heads(
    readings: Readings,
    clusters: Sequence[str],
    generator: torch.Generator,
    *,
    by: By = "drop",
    layers: Collection[int] | None = None,
) -> tuple[RankedHead, ...]:
    """Order heads by how far they take the logit down, the furthest first.

    Args:
        readings: What was read on complied harmful requests.
        clusters: The base request of each example.
        generator: Source of randomness, on the CPU.
        by: "drop" for the plateau minus the final token; "published" for the paper's
            ranking, the projection of what a head writes at the final token, most
            negative first. Its sign is turned, so that large is first as well.
        layers: Layers that have heads; all by default.

    Returns:
        Every head once. Equal ones stay in the order of layers and heads.

    Raises:
        InputError: If there are no examples, or not one base request for each.

    Source:
        "published" is the score of the code of https://arxiv.org/abs/2510.06036,
        which takes all harmful requests, complied with or not.
    """
    check_lengths(len(readings.final), clusters)
    if not clusters:
        raise InputError(
            "complied harmful requests to rank heads by",
            "none",
            "Add prompts that the model complies with, say wrapped ones.",
        )
    found = drops(readings)
    ranked = found.total if by == "drop" else -readings.published
    contributions = bootstrap_means(ranked.flatten(1), clusters, generator)
    changes = bootstrap_means(found.rms.flatten(1), clusters, generator)
    means = ranked.double().mean(0).flatten()
    order = means.argsort(descending=True, stable=True).tolist()
    n_heads = ranked.shape[-1]
    if layers is not None:
        order = [place for place in order if place // n_heads in layers]
    level = readings.plateau.double().mean(0).flatten().tolist()
    final = readings.final.double().mean(0).flatten().tolist()
    return tuple(
        RankedHead(
            rank,
            Head(*divmod(place, n_heads)),
            contributions[place],
            changes[place],
            level[place],
            final[place],
        )
        for rank, place in enumerate(order, 1)
    )


def count_heads(fraction: int | float, n_total: int) -> int:
    """Return how many heads a fraction of all heads is, by ceiling.

    The fraction is taken as it is written: 0.07 of 100 is 7, although the nearest
    binary number is a little larger.

    Raises:
        SettingsError: If the fraction selects no head, or more than there are.
    """
    if not 0 < fraction <= 1:
        raise SettingsError(
            f"a fraction of the model's {n_total} heads above 0 and up to 1",
            f"{fraction}, which selects {'no head' if fraction <= 0 else 'too many'}",
            f"The smallest that selects one head is any up to {1 / n_total:.3g}.",
        )
    return math.ceil(Decimal(str(fraction)) * n_total)


def top_heads(ranking: Sequence[RankedHead], n: int) -> tuple[Head, ...]:
    """Return the first `n` heads of a ranking."""
    return tuple(row.head for row in ranking[:n])


def most_positive_heads(ranking: Sequence[RankedHead], n: int) -> tuple[Head, ...]:
    """Return the `n` heads that hold refusal up the most: the last of a ranking.

    Raises:
        SettingsError: If they would overlap with the first `n`.
    """
    if 2 * n > len(ranking):
        raise SettingsError(
            f"at most {len(ranking) // 2} heads, so that first and last differ",
            f"{n} of {len(ranking)}",
            "Lower the fraction.",
        )
    return tuple(row.head for row in reversed(ranking[len(ranking) - n :]))


def layer_matched_draws(
    selected: Collection[tuple[int, int]],
    n_heads: int,
    n_draws: int,
    generator: torch.Generator,
) -> tuple[tuple[Head, ...], ...]:
    """Draw random heads to compare with: as many in each layer, none of the selected.

    Draws differ from each other as long as there are enough different ones.

    Args:
        selected: The heads that are compared.
        n_heads: Heads in each layer.
        n_draws: How many draws.
        generator: Source of randomness, on the CPU.

    Returns:
        One set of heads per draw, in the order of layers and heads.

    Raises:
        SettingsError: If a layer has fewer heads left than were selected in it.
    """
    counts = Counter(layer for layer, _ in selected)
    left = {
        layer: [head for head in range(n_heads) if (layer, head) not in selected]
        for layer in sorted(counts)
    }
    full = [layer for layer, heads in left.items() if len(heads) < counts[layer]]
    if full:
        raise SettingsError(
            f"at most half of a layer's {n_heads} heads selected, so that as many "
            "others can be drawn at random",
            f"{counts[full[0]]} in layer {full[0]}",
            "Lower the fraction.",
        )
    n_different = math.prod(math.comb(len(left[i]), counts[i]) for i in left)
    draws: list[tuple[Head, ...]] = []
    while len(draws) < n_draws:
        draw = []
        for layer, heads in left.items():
            places = torch.randperm(len(heads), generator=generator)[: counts[layer]]
            draw += [Head(layer, heads[place]) for place in places.tolist()]
        found = tuple(sorted(draw))
        if found not in draws or len(set(draws)) == n_different:
            draws.append(found)
    return tuple(draws)


def parse_heads(text: str) -> tuple[Head, ...]:
    """Read heads written as `layer:head`, with commas between them.

    Raises:
        SettingsError: If a part is written otherwise.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    heads = []
    for part in parts:
        layer, colon, head = part.partition(":")
        if not (colon and layer.isdecimal() and head.isdecimal()):
            raise SettingsError(
                "heads as `layer:head` with commas between them, such as `5:3,6:11`",
                part,
                "Layers and heads count from 0.",
            )
        heads.append(Head(int(layer), int(head)))
    return tuple(heads)
