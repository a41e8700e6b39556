"""Work in batches that survive an interruption, and how long it takes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import pyarrow as pa

from holdfast.report.progress import Advance, Progress, Tick
from holdfast.study.directory import Stage, Study
from holdfast.study.files import (
    DamagedTableError,
    atomic_write_table,
    fingerprint,
    read_table,
)


class Work(NamedTuple):
    """What a step costs, in multiples of what each token of its context adds."""

    fixed: float = 1.0  # Cost of a step whatever its context.
    per_token: float = 0.0  # What a token of the context adds.


class Meter:
    """Told of every pass of a batch: moves the bar on, and keeps the times.

    Attributes:
        reading: Seconds of the passes that read prompts.
        read: Tokens that these read, padding included.
        writing: Seconds of all other passes.
        steps: How many there were.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin with nothing.

        `clock`: Tells the time in seconds.
        """
        self._clock = clock
        self._advance: Advance | None = None
        self._at = clock()
        self.open(0, None)

    def open(self, n_items: int, advance: Advance | None) -> None:
        """Begin a batch of so many items; the times begin anew."""
        self._left, self._advance = n_items, advance
        self._at = self._clock()
        self.reading = self.writing = 0.0
        self.read = self.steps = 0

    def tick(self, tick: Tick) -> None:
        """Take note of a pass.

        `tick`: What it did; items beyond those of the batch are not counted twice.
        """
        now = self._clock()
        took, self._at = now - self._at, now
        if tick.is_prompt:
            self.reading += took
            self.read += tick.read
        else:
            self.writing += took
            self.steps += 1
        steps = min(tick.finished, self._left)
        self._left -= steps
        if self._advance is not None:
            self._advance(steps, tick.written)

    def close(self) -> None:
        """End a batch: whatever of it was not told one by one is done now."""
        if self._advance is not None:
            self._advance(self._left)
        self._left, self._advance = 0, None

    def cost(self, lengths: Sequence[int], first: Sequence[int], work: Work) -> float:
        """Return what a batch costs, in seconds of the passes of the one measured.

        Reading goes by its tokens. Writing takes as many steps as in the batch that
        was measured; a step costs more the longer its context is, and half as much
        less where half of the rows are missing.
        """
        reading = self.reading / max(1, self.read) * len(lengths) * max(lengths)
        contexts = [max(each) + self.steps / 2 for each in (lengths, first)]
        here, there = (work.fixed + work.per_token * each for each in contexts)
        width = (1 + len(lengths) / len(first)) / 2
        return reading + self.writing * here / there * width


T = TypeVar("T")
ROW_ID = "row_id"


class Pace(NamedTuple):
    """How the first batch of a run went, from which the rest is estimated."""

    items: int  # Items in it.
    seconds: float  # What it took.
    left: int  # Items that are still to do.
    rest: float  # Seconds that these take, by what each batch costs beside the first.
    table: pa.Table  # What came of it.


@dataclass(frozen=True)
class Batches:
    """How a stage works through its items: so many at once, each batch kept on disk."""

    stage: Stage
    batch_size: int
    meter: Meter | None = None  # Told by the work of every pass.
    parts: str | None = None  # Folder of the batches; by default the stage's name.

    def run(
        self,
        items: Sequence[T],
        work: Callable[[list[T]], pa.Table],
        *,
        name: Callable[[T], str],
        length: Callable[[T], int],
        label: str,
        paced: Callable[[Pace], None] | None = None,
        cost: Callable[[list[T], list[T]], float] | None = None,
    ) -> pa.Table:
        """Run `work` on batches of items, and return all rows (see `in_batches`)."""
        return in_batches(
            self.stage.study,
            self.parts or self.stage.name,
            items,
            name=name,
            length=length,
            batch_size=self.batch_size,
            work=work,
            progress=self.stage.progress,
            label=label,
            paced=paced,
            meter=self.meter,
            cost=cost,
        )


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

    `length`: Length of an item, by which batches are sorted, the longest first.
    `work`: Turns a batch into a table with a column `row_id`.
    `paced`: Told once, after the first batch that this run works on.
    `meter`: Told by `work` of every pass; the bar then moves within a batch. What is
    done first is then a full batch from the middle, which says more of the others than
    the longest or a short remainder, and the longest second, which shows what does not
    fit.
    `cost`: Of a batch, beside the first one that this run works on (the second
    argument), asked when that is done; by default its items.
    Returns: The parts as one table, in the order of `items`; rows of one item stay in
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
        batches.insert(0, batches.pop(_measured_first(batches)))
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


def _measured_first(batches: Sequence[list[T]]) -> int:
    """Return the place of the middle one of the batches that are as full as any."""
    most = max(map(len, batches))
    full = [place for place, batch in enumerate(batches) if len(batch) == most]
    return full[len(full) // 2]


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
    """Read the parts of a stage; a damaged one is reported and removed."""
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
