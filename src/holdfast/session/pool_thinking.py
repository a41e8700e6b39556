"""Put the thinking that the model drew into the rows of a pool."""

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from holdfast.data.pool import PoolRow


def with_drawn_thinking(rows: Sequence[PoolRow], drawn: pa.Table) -> list[PoolRow]:
    """Return rows whose thinking is the model's; none where it never ended.

    Args:
        rows: Rows of a shard.
        drawn: What the model drew for them, in the same order.
    """
    columns = drawn.select(["row", "thinking", "draw_kind"]).to_pydict()
    made = []
    for row, number, thinking, kind in zip(rows, *columns.values(), strict=True):
        assert row.row == number
        usable = thinking if kind is None and (thinking or "").strip() else None
        made.append(replace(row, thinking=usable))
    return made
