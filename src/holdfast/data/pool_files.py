"""Rows of a long file one by one, parsed only when they are asked for."""

import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from holdfast.data.readers import (
    decode,
    read_table,
    require_own_names,
    require_unicode,
    suffix,
)
from holdfast.errors import PromptFileError

_BATCH: Final = 256
_FIELD_LIMIT: Final = 2**31 - 1


class Raw(NamedTuple):
    """A row that is not parsed yet, and where it stands."""

    place: str
    parse: Callable[[], dict[str, Any]]


def raw_rows(path: Path) -> Iterator[Raw]:
    """Yield the rows of a file, none of them parsed.

    JSONL, CSV, TSV and Parquet are streamed; a JSON document is read whole, since its
    rows cannot be told apart otherwise.

    Args:
        path: The file.

    Raises:
        PromptFileError: If the format is unknown, or the file is malformed.
    """
    reader = _READERS.get(suffix(path.name))
    if reader is None:
        raise PromptFileError(
            f"a pool that ends in one of {', '.join(_READERS)}",
            f"`{path.name}`",
            "Convert it; Parquet is read fastest.",
        )
    return reader(path)


def _jsonl(path: Path) -> Iterator[Raw]:
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                place = f"line {number}"
                yield Raw(place, partial(_object, path.name, place, line))


def _object(name: str, place: str, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(decode(name, line))
    except (RecursionError, ValueError) as error:
        raise _malformed(
            name, "one JSON object a line", f"{error} at {place}"
        ) from error
    if not isinstance(value, dict):
        raise _malformed(
            name, "one JSON object a line", f"a {type(value).__name__} at {place}"
        )
    require_unicode(value, name, place)
    return value


def _delimited(delimiter: str) -> Callable[[Path], Iterator[Raw]]:
    def read(path: Path) -> Iterator[Raw]:
        csv.field_size_limit(_FIELD_LIMIT)
        start = 1
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.reader(handle, delimiter=delimiter, strict=True)
            try:
                header = [cell.strip() for cell in next(reader, [])]
                require_own_names(path.name, header)
                start = reader.line_num + 1
                for cells in reader:
                    place, start = f"line {start}", reader.line_num + 1
                    if cells:
                        parse = partial(_cells, path.name, place, header, cells)
                        yield Raw(place, parse)
            except (csv.Error, UnicodeDecodeError) as error:
                raise _malformed(
                    path.name, "well-formed CSV in UTF-8", f"{error} near line {start}"
                ) from error

    return read


def _cells(
    name: str, place: str, header: list[str], cells: list[str]
) -> dict[str, Any]:
    if len(cells) > len(header):
        raise _malformed(
            name, f"{len(header)} cells a row", f"{len(cells)} cells on {place}"
        )
    return dict(zip(header, cells, strict=False))


def _parquet(path: Path) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            require_own_names(path.name, file.schema_arrow.names)
            for batch in file.iter_batches(_BATCH, use_threads=False):
                lazy = _Lazy(batch, path.name, number)
                for place in range(batch.num_rows):
                    number += 1
                    yield Raw(f"row {number}", partial(lazy.row, place))
    except (pyarrow.ArrowException, OSError) as error:
        found = str(error).splitlines()[0]
        raise _malformed(path.name, "a Parquet file", found) from error


class _Lazy:
    """A batch that is turned into rows when the first of them is asked for."""

    def __init__(self, batch: Any, name: str, before: int) -> None:
        self._batch, self._name, self._before = batch, name, before
        self._rows: list[dict[str, Any]] | None = None

    def row(self, place: int) -> dict[str, Any]:
        """Return one row."""
        if self._rows is None:
            try:
                self._rows = self._batch.to_pylist()
            except ValueError as error:
                last = self._before + self._batch.num_rows
                raise _malformed(
                    self._name,
                    "Parquet with text in UTF-8",
                    f"{error} in rows {self._before + 1} to {last}",
                ) from error
        return self._rows[place]


def _json(path: Path) -> Iterator[Raw]:
    for row in read_table(path.name, path.read_bytes()).rows:
        yield Raw(row.place, partial(dict, row.cells))


def _malformed(name: str, expected: str, found: str) -> PromptFileError:
    return PromptFileError(
        f"`{name}` to be {expected}", found, "Correct the file, or write it again."
    )


_READERS: Final[dict[str, Callable[[Path], Iterator[Raw]]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": _parquet,
    ".json": _json,
}
