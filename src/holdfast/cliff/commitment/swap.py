"""Thinking or state: outcomes under either thinking, read with an edit and without.

Every row is answered in four cells, and a row whose cells are not all judged counts in
none: all differences are between the same rows.
"""

from jaxtyping import Bool
from torch import Generator, Tensor, stack

from holdfast.stats.bootstrap import Draws, Estimate
from holdfast.stats.paired import paired_rate_difference
from holdfast.stats.rates import clustered_rate

CELLS = (("own", "off"), ("own", "on"), ("other", "off"), ("other", "on"))
"""Whose thinking is read, and whether the edit acts, in the order of the columns."""
EFFECTS = ("thinking", "edit", "interaction", "thinking_alone", "edit_alone", "both")


def cell_name(thinking: str, edit: str) -> str:
    """Return the name of a cell."""
    return f"{thinking}_{edit}"


def rates(
    outcomes: Bool[Tensor, "example 4"], clusters: list[str], draws: Draws
) -> dict[str, Estimate]:
    """Return the share of rows with the outcome in each cell.

    `outcomes`: Whether each row has it, in the order of `CELLS`.
    """
    return {
        cell_name(*cell): clustered_rate(
            outcomes[:, place], clusters, draws(cell_name(*cell))
        )
        for place, cell in enumerate(CELLS)
    }


def effects(
    outcomes: Bool[Tensor, "example 4"], clusters: list[str], draws: Draws
) -> dict[str, Estimate]:
    """Return what thinking and edit do to the share, with paired intervals.

    With `y` the share in a cell, own thinking without the edit being `y00`:

    - `thinking`: main effect, `((y10 - y00) + (y11 - y01)) / 2`
    - `edit`: main effect, `((y01 - y00) + (y11 - y10)) / 2`
    - `interaction`: `(y11 - y10) - (y01 - y00)`
    - `thinking_alone`: the other thinking, read without the edit, `y10 - y00`
    - `edit_alone`: the edit, on the row's own thinking, `y01 - y00`
    - `both`: `y11 - y00`, which is the sum of the two and the interaction

    Each is a difference of two rates over the same rows, so that none has an interval
    of width zero where no row changed; main effects and interaction count each row
    twice, in two pairs of cells that its base request keeps together.

    `outcomes`: Whether each row has the outcome, in the order of `CELLS`.
    `clusters`: The base request of each row.
    """
    y00, y01, y10, y11 = outcomes.unbind(1)
    found = {
        "thinking": _pairs([(y10, y00), (y11, y01)], clusters, draws("thinking")),
        "edit": _pairs([(y01, y00), (y11, y10)], clusters, draws("edit")),
        "thinking_alone": _pairs([(y10, y00)], clusters, draws("thinking_alone")),
        "edit_alone": _pairs([(y01, y00)], clusters, draws("edit_alone")),
        "both": _pairs([(y11, y00)], clusters, draws("both")),
    }
    half = _pairs([(y11, y10), (y00, y01)], clusters, draws("interaction"))
    found["interaction"] = _twice(half)
    return {name: found[name] for name in EFFECTS}


def _pairs(
    pairs: list[tuple[Tensor, Tensor]],
    clusters: list[str],
    generator: Generator,
) -> Estimate:
    """Return the mean difference over pairs of columns."""
    after = stack([pair[0] for pair in pairs]).flatten()
    before = stack([pair[1] for pair in pairs]).flatten()
    found = paired_rate_difference(after, before, clusters * len(pairs), generator)
    return found._replace(n=len(clusters))


def _twice(found: Estimate) -> Estimate:
    if found.value is None or found.low is None or found.high is None:
        return found
    return found._replace(value=2 * found.value, low=2 * found.low, high=2 * found.high)
