"""Files of prompts and of training rows, in any known format, as a stream of rows.

Every fault is named by file and place, and nothing is repaired in silence: a row
with too many cells, an unfinished quote or a stray byte stops the reading.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from holdfast.errors import PromptFileError

TEXT_CELL: Final = ""
"""Key of the only cell of a row in a format without columns."""
# One cell may hold a whole conversation; the csv module stops at 128 KiB by default.
_FIELD_LIMIT: Final = 2**31 - 1
_BATCH: Final = 256
Cells = dict[str, Any]
Source = Path | bytes


class Raw(NamedTuple):
    """A row that is not parsed yet, and where it stands ("line 7", "item 3")."""

    place: str
    parse: Callable[[], Cells]


class TableRow(NamedTuple):
    """One row, and where it stands ("line 7", "item 3", "row 5")."""

    place: str
    cells: Cells

    @property
    def folded(self) -> Cells:
        """The cells by the names of their columns, case folded."""
        return {fold(column): value for column, value in self.cells.items()}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows in file order; `columns` is empty for a format without columns."""

    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]


def read_table(name: str, data: bytes) -> Table:
    """Read a whole file by the suffix of its name."""
    ending = suffix(name)
    if ending not in READERS:
        raise PromptFileError(
            f"a prompt file that ends in one of {', '.join(READERS)}",
            f"`{name}`",
            "Rename the file to say what it holds, or convert it.",
        )
    if not data.strip():
        raise _empty(name)
    if ending != ".parquet":
        text = decode(name, data)
        if ending in (".jsonl", ".ndjson", ".txt"):
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        data = text.encode()
    rows = tuple(
        TableRow(raw.place, raw.parse()) for raw in READERS[ending](name, data)
    )
    if not rows:
        raise _empty(name, "no row in it")
    columns = dict.fromkeys(column for row in rows for column in row.cells)
    if TEXT_CELL not in columns or ending in (".csv", ".tsv", ".parquet"):
        return Table(tuple(columns), rows)
    # A row of text has one cell without a name; no row of columns stands beside it.
    is_text = [list(row.cells) == [TEXT_CELL] for row in rows]
    if is_text[0] and all(is_text):
        return Table((), rows)
    other = rows[is_text.index(not is_text[0])]
    kind = "object" if is_text[0] else "text"
    raise _mixed(name, f"a JSON {kind} at {other.place}")


def raw_rows(path: Path) -> Iterator[Raw]:
    """Yield the rows of a file, none of them parsed.

    JSONL, CSV, TSV and Parquet are streamed; a JSON document is read whole, since its
    rows cannot be told apart otherwise.
    """
    known = [ending for ending in READERS if ending != ".txt"]
    if suffix(path.name) not in known:
        raise PromptFileError(
            f"a pool that ends in one of {', '.join(known)}",
            f"`{path.name}`",
            "Convert it; Parquet is read fastest.",
        )
    return READERS[suffix(path.name)](path.name, path)


def fold(column: object) -> str:
    """Return the form under which two names of columns count as the same."""
    return str(column).strip().casefold()


def suffix(name: str) -> str:
    """Return the suffix of a name, lower case and with its dot ("" for none)."""
    stem, dot, last = name.replace("\\", "/").rpartition("/")[2].rpartition(".")
    return f".{last.lower()}" if dot and stem else ""


def decode(name: str, data: bytes) -> str:
    """Return UTF-8 bytes as text, without a byte-order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The mark, where there was one, is not part of the reported offset.
        at = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        line = data.count(b"\n", 0, at) + 1
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        origin = "UTF-16" if utf16 else "WINDOWS-1252"
        raise PromptFileError(
            f"`{name}` to be UTF-8 text",
            f"byte 0x{data[at]:02x} at byte offset {at} (line {line})",
            f"Save it as UTF-8, for example `iconv -f {origin} -t UTF-8`.",
        ) from error


def require_unicode(value: Any, name: str, place: str) -> None:
    """Refuse a JSON value with half a surrogate pair, which no text file can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise PromptFileError(
            f"valid Unicode in `{name}`",
            f"half a surrogate pair at {place}",
            "Write the character itself, or both halves of its escape.",
        ) from error


def _require_own_names(name: str, columns: Sequence[str]) -> None:
    """Refuse a table with two columns of one name: it is unclear which is meant."""
    named = [column for column in columns if column]
    for column in named:
        if named.count(column) > 1:
            raise PromptFileError(
                f"each column of `{name}` to have its own name",
                f"two columns called `{column}`",
                "Rename one of them.",
            )


def _empty(name: str, found: str = "an empty file") -> PromptFileError:
    return PromptFileError(
        f"prompts in `{name}`", found, "Give a file with at least one prompt."
    )


def _mixed(name: str, found: str) -> PromptFileError:
    return PromptFileError(
        f"every item of `{name}` to be an object, or every item a text",
        found,
        'Write {"prompt": "..."} for each prompt.',
    )


def _open(source: Source) -> io.BytesIO | io.BufferedReader:
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def _lines(name: str, source: Source) -> Iterator[Raw]:
    with _open(source) as handle:
        for number, line in enumerate(handle, start=1):
            text = decode(name, line).removesuffix("\n")
            if text.strip():
                yield Raw(f"line {number}", partial(dict, {TEXT_CELL: text}))


def _json_lines(name: str, source: Source) -> Iterator[Raw]:
    with _open(source) as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                place = f"line {number}"
                yield Raw(place, partial(_json_line, name, place, line))


def _json_line(name: str, place: str, line: bytes) -> Cells:
    try:
        value = json.loads(decode(name, line))
    except (RecursionError, ValueError) as error:
        raise PromptFileError(
            f"one JSON object a line in `{name}`",
            f"{getattr(error, 'msg', error)} on {place}",
            "Correct that line; a list over several lines is named `.json`.",
        ) from error
    return _cells(name, place, value)


def _cells(name: str, place: str, value: Any) -> Cells:
    """Return the cells of a JSON value; a text has one cell without a name."""
    if not isinstance(value, dict | str):
        raise _mixed(name, f"a JSON {_kind(value)} at {place}")
    require_unicode(value, name, place)
    return {TEXT_CELL: value} if isinstance(value, str) else value


def _kind(value: object) -> str:
    names = {list: "list", str: "text", bool: "boolean"}
    return names.get(type(value), "null" if value is None else "number")


def _json(name: str, source: Source) -> Iterator[Raw]:
    data = source if isinstance(source, bytes) else source.read_bytes()
    try:
        content = json.loads(decode(name, data))
    except json.JSONDecodeError as error:
        raise PromptFileError(
            f"`{name}` to be one JSON document",
            f"{error.msg} on line {error.lineno}, column {error.colno}",
            "Correct that line; a file with one object a line is named `.jsonl`.",
        ) from error
    except (RecursionError, ValueError) as error:
        raise PromptFileError(
            f"`{name}` to be one JSON document", str(error), "Write it more plainly."
        ) from error
    if isinstance(content, dict):
        content = _rows_of_columns(name, content)
    if not isinstance(content, list):
        raise PromptFileError(
            f"`{name}` to hold a list of objects, a list of texts, or one object of"
            " columns",
            f"a JSON {_kind(content)}",
            'Write [{"prompt": "..."}, ...].',
        )
    for number, value in enumerate(content, 1):
        place = f"item {number}"
        yield Raw(place, partial(_cells, name, place, value))


def _rows_of_columns(name: str, content: Cells) -> list[Cells]:
    lengths = {
        column: len(values) if isinstance(values, list) else None
        for column, values in content.items()
    }
    if not content or None in lengths.values() or len(set(lengths.values())) > 1:
        found = ", ".join(
            f"`{column}`: {'no list' if length is None else length}"
            for column, length in list(lengths.items())[:8]
        )
        raise PromptFileError(
            f"the JSON object in `{name}` to hold columns, lists of one length",
            found or "no column",
            'Write [{"prompt": "..."}, ...], or {"prompt": ["...", "..."]}.',
        )
    return [
        dict(zip(content, values, strict=True))
        for values in zip(*content.values(), strict=True)
    ]


def _delimited(delimiter: str) -> Callable[[str, Source], Iterator[Raw]]:
    def read(name: str, source: Source) -> Iterator[Raw]:
        csv.field_size_limit(_FIELD_LIMIT)
        start = 1
        # A quoted cell keeps its own line ends, so newlines are not translated.
        with io.TextIOWrapper(_open(source), "utf-8-sig", newline="") as handle:
            reader = csv.reader(handle, delimiter=delimiter, strict=True)
            try:
                header = [cell.strip() for cell in next(filter(None, reader), [])]
                _require_own_names(name, header)
                start = reader.line_num + 1
                for cells in reader:
                    number, start = start, reader.line_num + 1
                    if cells:  # A blank line has none.
                        parse = partial(_named, name, number, header, cells)
                        yield Raw(f"line {number}", parse)
            except csv.Error as error:
                raise PromptFileError(
                    f"`{name}` to be well-formed CSV",
                    f"{error} in the row that starts on line {start}",
                    "Close the quotes, and write a quote inside a cell twice.",
                ) from error
            except UnicodeDecodeError as error:
                raise PromptFileError(
                    f"`{name}` to be well-formed CSV in UTF-8",
                    f"{error} near line {start}",
                    "Correct the file, or write it again.",
                ) from error

    return read


def _named(name: str, line: int, header: list[str], cells: list[str]) -> Cells:
    if len(cells) > len(header):
        raise PromptFileError(
            f"{len(header)} cells a row in `{name}`, as in its header",
            f"{len(cells)} cells on line {line}",
            "Put quotes around a cell that holds the delimiter.",
        )
    padded = cells + [""] * (len(header) - len(cells))
    return dict(zip(header, padded, strict=True))


def _parquet(name: str, source: Source) -> Iterator[Raw]:
    # Imported here because it is heavy, and most prompt files are text.
    import pyarrow
    import pyarrow.parquet

    data = pyarrow.BufferReader(source) if isinstance(source, bytes) else source
    try:
        with pyarrow.parquet.ParquetFile(data) as file:
            n_before = 0
            _require_own_names(name, file.schema_arrow.names)
            for batch in file.iter_batches(_BATCH, use_threads=False):
                # A batch is turned into rows when the first of them is asked for.
                rows = cache(partial(_batch_rows, batch, name, n_before))
                for index in range(batch.num_rows):
                    place = f"row {n_before + index + 1}"
                    yield Raw(place, partial(_row, rows, index))
                n_before += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _no_parquet(name, "a Parquet file", str(error).splitlines()[0]) from error


def _row(rows: Callable[[], list[Cells]], index: int) -> Cells:
    return rows()[index]


def _batch_rows(batch: Any, name: str, n_before: int) -> list[Cells]:
    try:
        rows: list[Cells] = batch.to_pylist()
    except ValueError as error:
        found = f"{error} in rows {n_before + 1} to {n_before + batch.num_rows}"
        raise _no_parquet(name, "Parquet with text in UTF-8", found) from error
    return rows


def _no_parquet(name: str, expected: str, found: str) -> PromptFileError:
    return PromptFileError(
        f"`{name}` to be {expected}",
        found,
        "Write it again, or give the rows as CSV or JSONL.",
    )


READERS: Final[dict[str, Callable[[str, Source], Iterator[Raw]]]] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".txt": _lines,
}
"""Reader by suffix; the keys are the formats that Holdfast knows."""
