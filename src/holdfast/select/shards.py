"""Shards of a pool worked on once each, by one process or by several.

A finished shard is a Parquet file and a marker beside it, both whole or not there.
The folder is named for everything its contents depend on, so nothing in it is ever
out of date, and processes with the same settings meet in the same one.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow as pa

from holdfast.data.pool import Pool, PoolRow, Shard
from holdfast.errors import HoldfastError, InputError, ModelError
from holdfast.report.progress import Progress
from holdfast.study import (
    DamagedTableError,
    atomic_write_json,
    atomic_write_table,
    canonical_json,
    claim,
    fingerprint,
    read_table,
)

WAIT_SECONDS = 0.5
Work = Callable[[int, list[PoolRow]], pa.Table]
"""From the number and the rows of a shard to its table."""
Passing = Callable[[Set[int]], Iterator[int]]
"""Works on shards that are free, and yields each that it has finished."""


class ShardFolder:
    """The finished shards of one pass over a pool."""

    def __init__(
        self, root: Path, name: str, key: Any, n_rows: int, shard_rows: int
    ) -> None:
        """Name the folder; nothing is written yet."""
        self.key = {"pass": name, "shard_rows": shard_rows, **key}
        self.fingerprint = fingerprint(self.key)
        self.folder = root / f"{name}-{self.fingerprint[:12]}"
        self.n_shards = -(-n_rows // shard_rows)
        self.n_rows, self.shard_rows = n_rows, shard_rows

    def path(self, index: int) -> Path:
        """Return where a shard lies, or will lie."""
        return self.folder / f"shard-{index:06d}.parquet"

    def is_done(self, index: int) -> bool:
        """Return whether a shard is finished."""
        return self._marker(index).exists()

    def done(self) -> list[int]:
        """Return the finished shards."""
        return [index for index in range(self.n_shards) if self.is_done(index)]

    def read(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a finished shard; one that is damaged is no longer finished."""
        path = self.path(index)
        try:
            return read_table(path, columns)
        except (DamagedTableError, FileNotFoundError) as error:
            self._marker(index).unlink(missing_ok=True)
            raise InputError(
                f"a Parquet table in {path}",
                f"a damaged file ({str(error).splitlines()[0]})",
                "Run the command again: that shard is worked out anew.",
            ) from error

    def fill(
        self,
        passing: Passing,
        part: tuple[int, int],
        progress: Progress,
        label: str,
    ) -> None:
        """Have the shards of a part that are not done worked on, until all are done.

        `passing`: Works on shards, in this process (see `walk`) or in others.
        `part`: The first shard, and in which steps the others follow.
        """
        own = range(part[0], self.n_shards, part[1])
        for index in own:
            if self.is_done(index):
                self._look_at(index, progress)
        self._describe()
        with progress.track(label, len(own)) as advance:
            seen: set[int] = set()
            while True:
                before = len(seen)
                finished = {index for index in own if self.is_done(index)} - seen
                seen |= finished
                advance(len(finished))
                if len(seen) == len(own):
                    return
                free = {i for i in own if i not in seen and self._is_free(i)}
                # A look through the whole pool is worth it only if one can be had.
                for index in passing(free) if free else ():
                    seen.add(index)
                    advance(1)
                if len(seen) == before:
                    # Another process holds what is left.
                    time.sleep(WAIT_SECONDS)

    def walk(self, pool: Pool, work: Work, free: Set[int]) -> Iterator[int]:
        """Go once through the pool, work on free shards, and yield those worked on."""

        def skip(index: int) -> bool:
            return index not in free or self.is_done(index)

        for shard in pool.shards(self.shard_rows, skip):
            if self.work_on(shard, work):
                yield shard.number

    def work_on(self, shard: Shard, work: Work) -> bool:
        """Work on a shard unless another process does or has, and say whether.

        Raises:
            InputError: If the pool has no longer the rows that it had.
            ModelError: If something else than an error of ours is raised over a row; it
                names the row.
        """
        index = shard.number
        with self._claim(index) as claimed:
            # Another process may have finished it since it was looked at.
            if not claimed or self.is_done(index):
                return False
            rows = shard.read()
            n = min(self.shard_rows, self.n_rows - index * self.shard_rows)
            if len(rows) != n:
                raise InputError(
                    f"{n} rows in shard {index} of the pool",
                    f"{len(rows)}",
                    "Leave the pool as it is while it is scored, and begin anew.",
                )
            table = _worked(index, rows, work)
            atomic_write_table(self.path(index), table)
            marker = {"rows": table.num_rows, "fingerprint": self.fingerprint}
            atomic_write_json(self._marker(index), marker)
        return True

    def _look_at(self, index: int, progress: Progress) -> None:
        """Take the mark of being finished from a shard that is not whole."""
        try:
            mark = json.loads(self._marker(index).read_text(encoding="utf-8"))
            if read_table(self.path(index), []).num_rows == mark["rows"]:
                return
            found = "another number of rows"
        except (DamagedTableError, OSError, ValueError, LookupError) as error:
            found = str(error)
        progress.warn(f"{self.path(index)} is damaged ({found}); it is made again.")
        self._marker(index).unlink(missing_ok=True)

    def _describe(self) -> None:
        """Write down what the folder's contents depend on."""
        path = self.folder / "key.json"
        if not path.exists():
            atomic_write_json(path, json.loads(canonical_json(self.key)))

    def _marker(self, index: int) -> Path:
        return self.path(index).with_suffix(".done.json")

    def _is_free(self, index: int) -> bool:
        with self._claim(index) as claimed:
            return claimed

    def _claim(self, index: int) -> AbstractContextManager[bool]:
        return claim(self.folder / f".shard-{index:06d}.lock")


def _worked(index: int, rows: list[PoolRow], work: Work) -> pa.Table:
    """Return a table with a line for each row; name the first row that has none."""
    try:
        table = work(index, rows)
    except Exception as error:
        if isinstance(error, HoldfastError) and not isinstance(error, ModelError):
            # It is about a file, a setting or the machine, and says so itself.
            raise
        if len(rows) > 1:
            # Half by half, to the one row that it is about.
            middle = len(rows) // 2
            for half in (rows[:middle], rows[middle:]):
                _worked(index, half, work)
        places = f"{rows[0].place}" + (f" to {rows[-1].place}" if rows[1:] else "")
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ModelError(
            f"a score for the row at {places} of the pool",
            said,
            "Leave that row out, or mend it; the shards before it are kept.",
        ) from error
    if table.num_rows != len(rows):
        raise ModelError(
            f"{len(rows)} scores for as many rows from {rows[0].place} on",
            f"{table.num_rows}",
            "Report this: no row may be lost.",
        )
    return table
