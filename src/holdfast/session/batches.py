"""Work in batches that survive an interruption."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import pyarrow as pa

from holdfast.session.meter import Meter
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
        rest: Seconds that these take, by what each batch costs beside the first.
        table: What came of it.
    """

    items: int
    seconds: float
    left: int
    rest: float
    table: pa.Table


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
    meter: Meter | None = None,
    cost: Callable[[list[T], list[T]], float] | None = None,
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
        meter: Told by `work` of every pass; the bar then moves within a batch. What is
            done first is then a batch from the middle, which says more of the others
            than the longest, and the longest second, which shows what does not fit.
        cost: Of a batch, beside the first one that this run works on (the second
            argument), asked when that is done; by default its items.

    Returns:
        The parts as one table, in the order of `items`; rows of one item stay in
        the order in which `work` gave them.
    """
    tables = _whole_parts(study, stage, progress)
    done = {each for table in tables for each in table.column(ROW_ID).to_pylist()}
    ordered = sorted(items, key=lambda item: (-length(item), name(item)))
    whole = [
        ordered[start : start + batch_size]
        for start in range(0, len(ordered), batch_size)
    ]
    batches = [[item for item in each if name(item) not in done] for each in whole]
    batches = [each for each in batches if each]
    if meter is not None and batches:
        batches.insert(0, batches.pop(len(batches) // 2))
    meter = meter or Meter()
    with progress.track(label, len(items)) as advance:
        advance(len(items) - sum(map(len, batches)))
        for number, batch in enumerate(batches):
            key = fingerprint([name(item) for item in batch])[:24]
            meter.open(len(batch), advance)
            begun = time.perf_counter()
            table = work(batch)
            took = time.perf_counter() - begun
            atomic_write_table(study.part(stage, key, ".parquet"), table)
            tables.append(table)
            meter.close()
            if paced is not None and not number:
                paced(_pace(batches, took, table, cost))
    return _in_order(tables, [name(item) for item in items])


def _pace(
    batches: Sequence[list[T]],
    seconds: float,
    table: pa.Table,
    cost: Callable[[list[T], list[T]], float] | None,
) -> Pace:
    """Estimate what the batches left take, now that the first is done."""
    first, *left = batches
    weigh = cost or (lambda batch, _: float(len(batch)))
    whole = sum(weigh(batch, first) for batch in left)
    share = weigh(first, first)
    rest = seconds / share * whole if share else 0.0
    return Pace(len(first), seconds, sum(map(len, left)), rest, table)


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
