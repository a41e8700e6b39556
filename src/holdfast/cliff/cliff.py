"""Mean traces, plateau, final score and cliff of a refusal probe.

The plateau is what the probe reads through the thinking, the final score what it
reads at the last token of the end-of-thinking template, just before the answer. The
cliff is the difference. It is given on the probe's score, in [0, 1], and scaled: on
the logit, divided by the gap between refused harmful and complied benign requests at
that last token. The scaled cliff does not change when the probe's weights are
multiplied, so it does not depend on how hard the probe was regularised.

Lining rows up at their right end and filling the left with zeros pulls the left part
of a mean curve towards 0. Here a row counts only at the offsets that it has, and the
number of rows is given at each offset.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.errors import InputError
from holdfast.stats.bootstrap import (
    Estimate,
    check_lengths,
    require_width,
    undefined,
)
from holdfast.stats.rates import clustered_mean, mean_difference

LAST_SHARE = 0.05
"""Share of the thinking, at its end, that is no part of the plateau."""
MIN_TOKENS = 20
BOUNDS = {
    "plateau": (0.0, 1.0),
    "plateau_max": (0.0, 1.0),
    "final": (0.0, 1.0),
    "cliff": (-1.0, 1.0),
}
"""Least and largest value of what is read off a score; logits have none."""
Rule = Literal["median", "maximum"]
Quantity = Literal["plateau", "final", "cliff", "scaled_plateau", "scaled_cliff"]


class RowCliff(NamedTuple):
    """The cliff of one trace. Plateau and cliff are None with a reason."""

    plateau: float | None  # Score through the thinking, in [0, 1].
    plateau_max: float | None  # Its maximum over the same tokens.
    final: float  # Score at the last token of the end template, in [0, 1].
    cliff: float | None  # `plateau - final`; positive where refusal falls.
    plateau_logit: float | None  # The plateau on the logit.
    final_logit: float  # The final score on the logit.
    n_thinking: int  # Tokens of thinking.
    reason: str | None = None  # Why there is no plateau, or None.


class CliffSummary(NamedTuple):
    """Means over the rows of a group that thought for long enough."""

    plateau: Estimate  # Mean plateau.
    plateau_max: Estimate  # Mean of the maxima.
    final: Estimate  # Mean final score, over the same rows.
    cliff: Estimate  # Mean cliff.
    plateau_logit: Estimate  # Mean plateau on the logit.
    final_logit: Estimate  # Mean final score on the logit.
    # Mean cliff on the logit over the gap; 1 is a fall from reading like a refusal to
    # reading like a benign request.
    scaled_cliff: Estimate
    short_thinking_excluded: int  # Rows left out.
    n_requests: int  # Base requests among the rows that were kept.


def row_cliff(
    logits: Float[Tensor, "position"],
    thinking: slice,
    final_index: int,
    rule: Rule = "median",
    min_tokens: int = MIN_TOKENS,
) -> RowCliff:
    """Read plateau and cliff off the probe's logits of one conversation.

    Args:
        logits: Probe logits at every position.
        thinking: Positions of the thinking, without the end template.
        final_index: Position of the last token of the end template.
        rule: `median` of the thinking, or its `maximum` as in the paper.
        min_tokens: Shorter thinking has no plateau.

    Raises:
        InputError: If the positions do not lie in the trace.

    Source:
        https://arxiv.org/abs/2510.06036; the median is ours, since the maximum of a
        noisy flat trace is high and makes a cliff where there is none.
    """
    n_positions = len(logits)
    if not 0 <= final_index < n_positions or not (
        0 <= thinking.start <= thinking.stop <= n_positions
    ):
        raise InputError(
            f"thinking and final token within {n_positions} positions",
            f"thinking {thinking.start}:{thinking.stop}, final token {final_index}",
            "Pass the spans of the very sequence that was traced.",
        )
    values = logits.detach().double().cpu()
    final_logit = float(values[final_index])
    final = float(torch.sigmoid(values[final_index]))
    n_thinking = thinking.stop - thinking.start
    kept = n_thinking - math.ceil(LAST_SHARE * n_thinking)
    if n_thinking < min_tokens or kept < 1:
        reason = f"{n_thinking} tokens of thinking, fewer than {min_tokens}"
        return RowCliff(None, None, final, None, None, final_logit, n_thinking, reason)
    level = values[thinking.start : thinking.start + kept]
    scores = torch.sigmoid(level)
    plateau_max = float(scores.max())
    middle = 0.5 if rule == "median" else 1.0
    plateau = float(scores.quantile(middle))
    plateau_logit = float(level.quantile(middle))
    return RowCliff(
        plateau,
        plateau_max,
        final,
        plateau - final,
        plateau_logit,
        final_logit,
        n_thinking,
    )


def final_gap(
    refused: Sequence[RowCliff],
    refused_clusters: Sequence[str],
    benign: Sequence[RowCliff],
    benign_clusters: Sequence[str],
    generator: torch.Generator,
) -> Estimate:
    """Return the logit gap at the final token: refused harmful minus benign.

    It is the unit of the scaled cliff. Short thinking is no hindrance here.
    """
    return mean_difference(
        _column([row.final_logit for row in refused]),
        refused_clusters,
        _column([row.final_logit for row in benign]),
        benign_clusters,
        generator,
    )


def summarise(
    rows: Sequence[RowCliff],
    clusters: Sequence[str],
    gap: Estimate,
    generator: torch.Generator,
) -> CliffSummary:
    """Average a group's traces, with intervals over base requests.

    Args:
        rows: One trace a row.
        clusters: The base request of each row.
        gap: What `final_gap` returned. The interval of the scaled cliff holds the
            gap fixed.
        generator: Source of randomness, on the CPU.
    """
    check_lengths(len(rows), clusters)
    kept = [
        (row, name)
        for row, name in zip(rows, clusters, strict=True)
        if row.plateau is not None
    ]
    names = [name for _, name in kept]
    n_short = len(rows) - len(kept)

    def mean(field: str) -> Estimate:
        values = [float(getattr(row, field)) for row, _ in kept]
        bounds = BOUNDS.get(field)
        found = clustered_mean(_column(values), names, generator, bounds=bounds)
        return _because_short(require_width(found), n_short)

    scaled = _unscalable(gap, len(kept))
    if scaled is None:
        values = [_read(row, "scaled_cliff", gap) for row, _ in kept]
        found = clustered_mean(_column(values), names, generator)
        scaled = _because_short(require_width(found), n_short)
    return CliffSummary(
        plateau=mean("plateau"),
        plateau_max=mean("plateau_max"),
        final=mean("final"),
        cliff=mean("cliff"),
        plateau_logit=mean("plateau_logit"),
        final_logit=mean("final_logit"),
        scaled_cliff=scaled,
        short_thinking_excluded=n_short,
        n_requests=len(set(names)),
    )


def excess(
    rows: Sequence[RowCliff],
    clusters: Sequence[str],
    control_rows: Sequence[RowCliff],
    control_clusters: Sequence[str],
    generator: torch.Generator,
    *,
    quantity: Quantity = "scaled_cliff",
    gap: Estimate | None = None,
) -> Estimate:
    """Return how far one group's mean exceeds another's.

    Requests that occur in both groups are drawn together, so the interval is that of
    a paired difference where there are pairs.

    Args:
        rows: Traces of the group (say, complied harmful).
        clusters: The base request of each row.
        control_rows: Traces of the control (say, refused harmful).
        control_clusters: The base request of each control row.
        generator: Source of randomness, on the CPU.
        quantity: What is compared.
        gap: Needed for the scaled quantities.
    """
    check_lengths(len(rows), clusters)
    check_lengths(len(control_rows), control_clusters)
    if quantity.startswith("scaled"):
        found = _unscalable(gap, len(rows) + len(control_rows))
        if found is not None:
            return found
    kept = [
        [
            (row, name)
            for row, name in zip(group, names, strict=True)
            if row.plateau is not None
        ]
        for group, names in ((rows, clusters), (control_rows, control_clusters))
    ]
    return mean_difference(
        _column([_read(row, quantity, gap) for row, _ in kept[0]]),
        [name for _, name in kept[0]],
        _column([_read(row, quantity, gap) for row, _ in kept[1]]),
        [name for _, name in kept[1]],
        generator,
    )


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _because_short(found: Estimate, n_short: int) -> Estimate:
    if found.n == 0 and n_short:
        return undefined(0, f"all {n_short} rows thought for too few tokens")
    return found


def _unscalable(gap: Estimate | None, n: int) -> Estimate | None:
    """Return the reason why logits cannot be scaled, or None when they can."""
    if gap is None or gap.value is None or gap.low is None:
        why = "is unknown" if gap is None else f"is unknown: {gap.reason}"
    elif gap.low <= 0:
        why = f"is not clearly above 0 ({gap.low:.2f} to {gap.high:.2f})"
    else:
        return None
    return undefined(n, f"the gap between refused and benign final logits {why}")


def _read(row: RowCliff, quantity: Quantity, gap: Estimate | None) -> float:
    """Return one quantity of a row that has a plateau."""
    if not quantity.startswith("scaled"):
        return float(getattr(row, quantity))
    assert gap is not None
    assert gap.value is not None
    assert row.plateau_logit is not None
    if quantity == "scaled_plateau":
        return row.plateau_logit / gap.value
    return (row.plateau_logit - row.final_logit) / gap.value


WINDOW = (-64, 8)


class Trace(NamedTuple):
    """One conversation's scores, and where its parts are."""

    scores: Float[Tensor, "position"]  # Probe scores at every position.
    start: int  # First position that counts: the first token of the thinking.
    origin: int  # First token of the end template; offset 0.
    request_id: str  # The base request.


class AlignedPoint(NamedTuple):
    """The mean of the rows that have a token at one offset."""

    offset: int  # Tokens from the first token of the end template.
    mean: float | None  # Mean score; None when no row has the offset.
    # Lower end of the band; None when fewer than two requests have it.
    low: float | None
    high: float | None  # Upper end of the band.
    n: int  # Rows that have the offset.


def aligned_mean(
    traces: Sequence[Trace],
    generator: torch.Generator,
    window: tuple[int, int] = WINDOW,
) -> tuple[AlignedPoint, ...]:
    """Return mean and band at each offset from the end of the thinking.

    Args:
        traces: The rows of one group.
        generator: Source of randomness, on the CPU.
        window: First offset, and the one after the last.

    Returns:
        One point an offset, in order, also where no row has it.
    """
    return tuple(_point(offset, traces, generator) for offset in range(*window))


def _point(
    offset: int,
    traces: Sequence[Trace],
    generator: torch.Generator,
) -> AlignedPoint:
    present = [
        trace
        for trace in traces
        if trace.start <= trace.origin + offset < len(trace.scores)
    ]
    if not present:
        return AlignedPoint(offset, None, None, None, 0)
    column = torch.stack(
        [
            trace.scores[trace.origin + offset].detach().double().cpu()
            for trace in present
        ]
    )
    clusters = [trace.request_id for trace in present]
    band = clustered_mean(column, clusters, generator)
    return AlignedPoint(offset, float(column.mean()), band.low, band.high, len(present))
