"""How far from where it was fitted the probe still reads refusal.

It is fitted on plain requests at the last token before the answer. A cliff is seen
under wrappers, and in the middle of the thinking: there it is tried here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from holdfast.analysis.auroc import auroc_interval
from holdfast.analysis.bootstrap import Estimate, undefined
from holdfast.analysis.verdict import Thresholds
from holdfast.session.cliffs import BENIGN, REFUSED, Group, read_group
from holdfast.session.figures import figure_of, generator
from holdfast.session.rows import Rollout
from holdfast.session.settings import TraceSettings
from holdfast.session.tracing import Scores

TRUSTED = Thresholds().meter
"""Lower end of an AUROC below which what is read there is not to be trusted."""

MIN_EACH = 5
PLACES = {
    "wrapped_auroc": "on wrapped requests",
    "second_source_auroc": "on requests of the second source",
    "plateau_auroc": "in the middle of the thinking",
    "lowest_wrapper_auroc": "under the wrapper where it does worst",
}


def reach(
    groups: Mapping[str, Sequence[Rollout]],
    scores: Mapping[str, Scores],
    settings: TraceSettings,
    seed: int,
) -> dict[str, Any]:
    """Return how well the probe ranks refused harmful above complied benign answers.

    Args:
        groups: Held-out rows by group.
        scores: Traces by name.
        settings: Rule of the plateau.
        seed: Seed of the bootstrap.

    Returns:
        `plateau_auroc`, by the plateau; `lowest_wrapper_auroc`, by the final token
        within the wrapper where that is lowest, and `lowest_wrapper`, its name.
    """
    read = [read_group(groups[name], scores, settings) for name in (REFUSED, BENIGN)]
    found: dict[str, Any] = {
        "plateau_auroc": figure_of(_auroc(read, "plateau_logit", seed, "plateau"))
    }
    wrappers = sorted(
        {row.wrapper for group in read for row in group.rows if row.wrapper is not None}
    )
    by_wrapper = {
        name: _auroc([_within(g, name) for g in read], "final_logit", seed, name)
        for name in wrappers
    }
    known = {name: each for name, each in by_wrapper.items() if each.value is not None}
    if not known:
        reason = f"no wrapper has {MIN_EACH} refused harmful and as many benign answers"
        return found | {"lowest_wrapper_auroc": figure_of(undefined(0, reason))}
    lowest = min(known, key=lambda name: (known[name].value or 0.0, name))
    return found | {
        "lowest_wrapper_auroc": figure_of(known[lowest]),
        "lowest_wrapper": lowest,
    }


def doubts(probe: Mapping[str, Any]) -> list[str]:
    """Say where a cliff seen through this probe is not to be trusted.

    Args:
        probe: The block `probe` of the report, with what `reach` returned.
    """
    said = []
    for key, place in PLACES.items():
        figure = probe.get(key)
        if not isinstance(figure, dict) or figure["low"] is None:
            continue
        if figure["low"] < TRUSTED:
            said.append(
                f"A cliff seen through this probe is not to be trusted {place}: there "
                f"its AUROC is {figure['value']:.2f} ({figure['low']:.2f} to "
                f"{figure['high']:.2f}), not shown to reach {TRUSTED:.2f}."
            )
    return said


def _within(group: Group, wrapper: str | None) -> Group:
    kept = [i for i, row in enumerate(group.rows) if row.wrapper == wrapper]
    return Group(
        tuple(group.rows[i] for i in kept), tuple(group.cliffs[i] for i in kept)
    )


def _auroc(read: Sequence[Group], field: str, seed: int, name: str | None) -> Estimate:
    values: list[float] = []
    labels: list[bool] = []
    clusters: list[str] = []
    for group, refused in zip(read, (True, False), strict=True):
        for row, cliff in zip(group.rows, group.cliffs, strict=True):
            value = getattr(cliff, field)
            if value is not None:
                values.append(value)
                labels.append(refused)
                clusters.append(row.request_id)
    n_refused = sum(labels)
    if min(n_refused, len(labels) - n_refused) < MIN_EACH:
        return undefined(
            len(labels),
            f"{n_refused} refused harmful and {len(labels) - n_refused} benign answers "
            f"to read; {MIN_EACH} of each are needed",
        )
    return auroc_interval(
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(labels),
        clusters,
        generator(seed, f"reach/{name}"),
    )
