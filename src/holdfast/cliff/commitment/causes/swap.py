"""Thinking or state: outcomes under either thinking, read with an edit and without.

Every row is answered in four cells, and a row whose cells are not all judged counts in
none: all differences are between the same rows.
"""

from jaxtyping import Bool, Float
from torch import Generator, Tensor

from holdfast.stats.bootstrap import (
    Draws,
    Estimate,
    has_no_width,
    include,
    undefined,
)
from holdfast.stats.paired import MIN_DISCORDANT, tango
from holdfast.stats.rates import clustered_mean, clustered_rate

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

    None has an interval of width zero where no row changed, or where so few did that
    resampling would not show those that were not seen.

    `outcomes`: Whether each row has the outcome, in the order of `CELLS`.
    `clusters`: The base request of each row.
    """
    y00, y01, y10, y11 = outcomes.double().unbind(1)
    # Each is within -1 and 1 for a row, and then multiplied.
    changes = {
        "thinking": ((y10 - y00 + y11 - y01) / 2, 1),
        "edit": ((y01 - y00 + y11 - y10) / 2, 1),
        "interaction": ((y11 - y10 - y01 + y00) / 2, 2),
        "thinking_alone": (y10 - y00, 1),
        "edit_alone": (y01 - y00, 1),
        "both": (y11 - y00, 1),
    }
    return {
        name: _mean_change(*changes[name], clusters, draws(name)) for name in EFFECTS
    }


def _mean_change(
    change: Float[Tensor, "example"],
    times: int,
    clusters: list[str],
    generator: Generator,
) -> Estimate:
    """Return the mean of changes from -1 to 1, as `paired_rate_difference` does.

    Where few requests change it is widened to Tango's interval on their number, with
    the part of a row that changes as so much of a row.
    """
    n, n_requests = len(change), len(set(clusters))
    if not n:
        return undefined(0, "there are no rows")
    found = clustered_mean(change, clusters, generator)
    moved = {name for name, one in zip(clusters, change.tolist(), strict=True) if one}
    if found.value is None or len(moved) < MIN_DISCORDANT or has_no_width(found):
        share = n_requests / n
        gained, lost = change.clamp(min=0).sum(), (-change).clamp(min=0).sum()
        ends = tango(share * float(gained), share * float(lost), n_requests)
        plain = Estimate(float(change.mean()), *ends, n)
        found = plain if found.value is None else include(found, ends)
    assert found.value is not None
    assert found.low is not None
    assert found.high is not None
    return found._replace(
        value=times * found.value, low=times * found.low, high=times * found.high
    )
