"""Two evaluations on the same prompts: what changed, and whether that is chance."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from jaxtyping import Bool
from torch import Tensor

from holdfast.evaluate.panel import PairedRow
from holdfast.evaluate.rows import MEASURES, as_judged, conditions, counts_for
from holdfast.rollout.rows import unread
from holdfast.stats.paired import mcnemar, sign_flip
from holdfast.stats.unjudged import judged_difference
from holdfast.study.figures import figure_of, generator

KEY = ("suite", "kind", "wrapper", "prompt_id", "sample")
SEED = 0


def pair(first: pa.Table, second: pa.Table) -> list[PairedRow]:
    """Return the paired difference of every condition that both evaluations have.

    Returns: One record per condition: rates on the rows that both have, the difference
    `second - first` with an interval over requests, and the p-value of a test that
    keeps the rows of a request together. Rates, difference and p-value are None, or are
    bounds and the largest p-value, where rows were not judged.
    """
    before = {_key(row): row for row in first.to_pylist()}
    after = {_key(row): row for row in second.to_pylist()}
    shared = [row for key, row in before.items() if key in after]
    found: list[PairedRow] = []
    for (suite, kind, wrapper), rows in conditions(shared).items():
        others = [after[_key(row)] for row in rows]
        tested = _test(rows, others, f"{suite}/{kind}/{wrapper}")
        names = {"suite": suite, "kind": kind, "wrapper": wrapper}
        found.append({**names, "measure": MEASURES[kind], **tested})  # type: ignore[typeddict-item]
    return found


def _test(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], name: str
) -> dict[str, Any]:
    clusters = [row["request_id"] for row in before]
    one, two = _Side.of(before), _Side.of(after)
    difference = judged_difference(
        two.counts,
        one.counts,
        two.unjudged,
        one.unjudged,
        clusters,
        generator(SEED, f"paired/{name}"),
    )
    read = ~(one.unjudged | two.unjudged)
    test, p_value = _p_value(one, two, clusters, name)
    if difference.value is None:
        p_value = None
    return {
        "rows": len(clusters),
        "requests": len(set(clusters)),
        "unjudged": int((~read).sum()),
        "gained": int((two.counts & ~one.counts & read).sum()),
        "lost": int((one.counts & ~two.counts & read).sum()),
        "a": one.rate(),
        "b": two.rate(),
        "difference": figure_of(difference),
        "test": test,
        "p_value": p_value,
    }


class _Side(NamedTuple):
    """One evaluation on the shared rows: what counts, and what was not judged."""

    counts: Bool[Tensor, "example"]
    unjudged: Bool[Tensor, "example"]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> "_Side":
        """Read one side."""
        unjudged = unread([as_judged(row) for row in rows])
        return cls(torch.tensor([*map(counts_for, rows)]) & ~unjudged, unjudged)

    def rate(self) -> float | None:
        """Return the share that counts, or None where some rows have no verdict."""
        return None if self.unjudged.any() else float(self.counts.double().mean())


def _p_value(
    one: _Side, two: _Side, clusters: Sequence[str], name: str
) -> tuple[str, float | None]:
    """Return the test and the largest p-value that the rows without verdict allow."""
    extremes = (
        (one.counts | one.unjudged, two.counts),
        (one.counts, two.counts | two.unjudged),
    )
    changes = [int(after.sum()) - int(before.sum()) for before, after in extremes]
    exact = len(set(clusters)) == len(clusters)
    # Between a fall and a rise lies "no change", which no test rejects.
    found = [1.0] if changes[0] < 0 < changes[1] else []
    for before, after in extremes[: 1 + bool((one.unjudged | two.unjudged).any())]:
        if exact:
            found.append(mcnemar(after, before, clusters).p_value)
        else:
            draws = generator(SEED, f"flips/{name}")
            found.append(sign_flip(after.double(), before.double(), clusters, draws))
    return "McNemar, exact" if exact else "sign flip by request", max(found)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)
