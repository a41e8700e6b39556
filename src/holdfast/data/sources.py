"""Where prompts and pools come from: a path or a Hub dataset, read as rows."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from holdfast.data.tables import (
    READERS,
    Row,
    Table,
    decode,
    read_table,
    require_own_names,
    require_unicode,
    suffix,
)
from holdfast.errors import PromptFileError

_HUB_PREFIX: Final = "hub:"
_SHOWN: Final = 5


class Content(NamedTuple):
    """A short name, the rows, the hash of the bytes, and what to say of them."""

    name: str
    table: Table
    sha256: str
    notes: tuple[str, ...]


def load(source: str, revision: str | None) -> Content:
    """Read the table of a file or of a Hub dataset.

    `source`: Path of a file, or "hub:owner/name[:split]".
    """
    if not source.startswith(_HUB_PREFIX):
        return _load_path(source)
    # Imported here so that reading a local file needs no network library.
    from holdfast.data import hub

    fetched = hub.fetch(source, revision=revision)
    digest = hashlib.sha256()
    for _, data in fetched.files:
        digest.update(data)
    return Content(
        fetched.source,
        _join([(name, read_table(name, data)) for name, data in fetched.files]),
        digest.hexdigest(),
        (f"`{source}` was read at commit {fetched.commit}.", *fetched.notes),
    )


def _load_path(source: str) -> Content:
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            raise _folder(path)
        data = path.read_bytes() if suffix(path.name) in READERS else b""
        path.stat()
    except FileNotFoundError as error:
        is_id = source.count("/") == 1 and not suffix(source)
        hint = f" For a Hub dataset write `hub:{source}`." if is_id else ""
        raise PromptFileError(
            f"a prompt file at `{source}`",
            "no such file",
            f"Check the path; it counts from the folder you are in.{hint}",
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PromptFileError(
            f"a prompt file at `{source}` that can be read",
            reason,
            "Check the path and its permissions.",
        ) from error
    table = read_table(path.name, data)
    return Content(path.name, table, hashlib.sha256(data).hexdigest(), ())


def _folder(path: Path) -> PromptFileError:
    names = sorted(entry.name for entry in path.iterdir() if suffix(entry.name))
    fitting = [f"`{name}`" for name in names if suffix(name) in READERS][:_SHOWN]
    return PromptFileError(
        "a prompt file",
        f"the folder `{path}`",
        f"Name one file in it, such as {', '.join(fitting)}."
        if fitting
        else f"Give a file that ends in one of {', '.join(READERS)}.",
    )


def _join(tables: list[tuple[str, Table]]) -> Table:
    if len(tables) == 1:
        return tables[0][1]
    columns = dict.fromkeys(name for _, table in tables for name in table.columns)
    return Table(
        tuple(columns),
        tuple(
            Row(f"{name}, {row.place}", row.cells)
            for name, table in tables
            for row in table.rows
        ),
    )


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


def _stream_delimited(delimiter: str) -> Callable[[Path], Iterator[Raw]]:
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
    ".csv": _stream_delimited(","),
    ".tsv": _stream_delimited("\t"),
    ".parquet": _parquet,
    ".json": _json,
}
