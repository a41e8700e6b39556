"""Shards of a pool worked on once each, by one process or by several.

A finished shard is a Parquet file and a marker beside it, both whole or not there.
The folder is named for everything its contents depend on, so nothing in it is ever
out of date, and processes with the same settings meet in the same one.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow as pa

from holdfast.data.pool import Pool, PoolRow
from holdfast.errors import InputError
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
        self._shard_rows = shard_rows

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
        pool: Pool,
        work: Work,
        part: tuple[int, int],
        progress: Progress,
        label: str,
    ) -> None:
        """Work on the shards of a part that are not done, until all of them are.

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
                worked = bool(free) and self._pass(pool, work, free, seen, advance)
                if not worked and len(seen) == before:
                    # Another process holds what is left.
                    time.sleep(WAIT_SECONDS)

    def _pass(
        self,
        pool: Pool,
        work: Work,
        free: set[int],
        seen: set[int],
        advance: Callable[[int], None],
    ) -> bool:
        """Go once through the pool, and return whether anything was done."""
        worked = False

        def skip(index: int) -> bool:
            return index not in free or self.is_done(index)

        for shard in pool.shards(self._shard_rows, skip):
            with self._claim(shard.number) as claimed:
                # Another process may have finished it since it was looked at.
                if claimed and not self.is_done(shard.number):
                    table = work(shard.number, shard.read())
                    atomic_write_table(self.path(shard.number), table)
                    marker = {"rows": table.num_rows, "fingerprint": self.fingerprint}
                    atomic_write_json(self._marker(shard.number), marker)
                    seen.add(shard.number)
                    advance(1)
                    worked = True
        return worked

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
