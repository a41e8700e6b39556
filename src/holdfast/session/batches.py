"""Work in batches that survive an interruption."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import pyarrow as pa

from holdfast.session.progress import Progress
from holdfast.study import (
    DamagedTableError,
    Study,
    atomic_write_table,
    fingerprint,
    read_table,
)

T = TypeVar("T")

ROW_ID = "row_id"


class Pace(NamedTuple):
    """How the first batch of a run went, from which the rest is estimated.

    Attributes:
        items: Items in it.
        seconds: What it took.
        left: Items that are still to do.
        table: What came of it.
    """

    items: int
    seconds: float
    left: int
    table: pa.Table

    @property
    def rest(self) -> float:
        """Seconds that the items left take at this pace."""
        return self.seconds / self.items * self.left


def in_batches(
    study: Study,
    stage: str,
    items: Sequence[T],
    *,
    name: Callable[[T], str],
    length: Callable[[T], int],
    batch_size: int,
    work: Callable[[list[T]], pa.Table],
    progress: Progress,
    label: str,
    paced: Callable[[Pace], None] | None = None,
) -> pa.Table:
    """Run `work` on batches, keep each result on disk, and return all of them.

    The plan depends on the items alone: an interrupted stage that continues runs the
    very batches that an undisturbed one would have run, so its results are the same
    bit for bit. An item whose rows are on disk is not run again, unless the file is
    damaged.

    Args:
        study: Where the parts lie until the stage has finished.
        stage: Name of the stage.
        items: What to work on.
        name: Row id of an item; no two items share one.
        length: Length of an item, by which batches are sorted, the longest first.
        batch_size: Items in a batch.
        work: Turns a batch into a table with a column `row_id`.
        progress: Told of every finished item.
        label: What the bar says.
        paced: Told once, after the first batch that this run works on.

    Returns:
        The parts as one table, in the order of `items`; rows of one item stay in
        the order in which `work` gave them.
    """
    tables = _whole_parts(study, stage, progress)
    done = {each for table in tables for each in table.column(ROW_ID).to_pylist()}
    ordered = sorted(items, key=lambda item: (-length(item), name(item)))
    missing = sum(name(item) not in done for item in items)
    with progress.track(label, len(items)) as advance:
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            left = [item for item in batch if name(item) not in done]
            if left:
                key = fingerprint([name(item) for item in left])[:24]
                begun = time.perf_counter()
                table = work(left)
                took = time.perf_counter() - begun
                atomic_write_table(study.part(stage, key, ".parquet"), table)
                tables.append(table)
                if paced is not None:
                    paced(Pace(len(left), took, missing - len(left), table))
                    paced = None
            advance(len(batch))
    return _in_order(tables, [name(item) for item in items])


def _whole_parts(study: Study, stage: str, progress: Progress) -> list[pa.Table]:
    """Read the parts of a stage; one that is damaged is said, and taken away."""
    tables = []
    for path in study.parts(stage):
        try:
            table = read_table(path)
            if ROW_ID not in table.column_names:
                raise DamagedTableError(f"no column {ROW_ID}")
        except DamagedTableError as error:
            path.unlink(missing_ok=True)
            progress.warn(
                f"{path} is damaged ({error}); what it held is worked out again."
            )
            continue
        tables.append(table)
    return tables


def _in_order(tables: Sequence[pa.Table], names: Sequence[str]) -> pa.Table:
    """Join tables and put their rows in the order of the names."""
    tables = [table for table in tables if table.num_rows]
    if not tables:
        return pa.table({ROW_ID: pa.array([], pa.string())})
    joined = pa.concat_tables(tables)
    rank = {name: index for index, name in enumerate(names)}
    ranks = [rank[name] for name in joined.column(ROW_ID).to_pylist()]
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    return joined.take(pa.array(order, pa.int64()))
