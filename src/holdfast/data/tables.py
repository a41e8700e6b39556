"""Bytes of a prompt file in a known format, to rows that remember their place.

Every fault is named by file and place, and nothing is repaired in silence: a row
with too many cells, an unfinished quote or a stray byte stops the reading.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from holdfast.errors import PromptFileError

TEXT_CELL: Final = ""
"""Key of the only cell of a row in a format without columns."""
# One cell may hold a whole conversation; the csv module stops at 128 KiB by default.
_FIELD_LIMIT: Final = 2**31 - 1


class Row(NamedTuple):
    """One row, and where it stands ("line 7", "item 3", "row 5")."""

    place: str
    cells: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows in file order; `columns` is empty for a format without columns."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def read_table(name: str, data: bytes) -> Table:
    """Read a whole file by the suffix of its name."""
    reader = READERS.get(suffix(name))
    if reader is None:
        raise PromptFileError(
            f"a prompt file that ends in one of {', '.join(READERS)}",
            f"`{name}`",
            "Rename the file to say what it holds, or convert it.",
        )
    if not data.strip():
        raise _empty(name)
    table = reader(name, data)
    if not table.rows:
        raise _empty(name, "no row in it")
    return table


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


def require_own_names(name: str, columns: Sequence[str]) -> None:
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


def _read_text(name: str, data: bytes) -> Table:
    return Table(
        (),
        tuple(
            Row(f"line {number}", {TEXT_CELL: line})
            for number, line in _lines(decode(name, data))
        ),
    )


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not `splitlines`: it also cuts at U+2028 and form feeds, which belong to prompts.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _delimited(delimiter: str) -> Callable[[str, bytes], Table]:
    def read(name: str, data: bytes) -> Table:
        # A quoted cell keeps its own line ends, so newlines are not translated.
        stream = io.StringIO(decode(name, data), newline="")
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        before = csv.field_size_limit(_FIELD_LIMIT)
        start = 1
        lines: list[tuple[int, list[str]]] = []
        try:
            for cells in reader:
                if cells:  # A blank line has none.
                    lines.append((start, cells))
                start = reader.line_num + 1
        except csv.Error as error:
            raise PromptFileError(
                f"`{name}` to be well-formed CSV",
                f"{error} in the row that starts on line {start}",
                "Close the quotes, and write a quote inside a cell twice.",
            ) from error
        finally:
            csv.field_size_limit(before)
        return _with_header(name, lines)

    return read


def _with_header(name: str, lines: list[tuple[int, list[str]]]) -> Table:
    if not lines:
        return Table((), ())
    columns = tuple(cell.strip() for cell in lines[0][1])
    require_own_names(name, columns)
    rows = []
    for number, cells in lines[1:]:
        if len(cells) > len(columns):
            raise PromptFileError(
                f"{len(columns)} cells a row in `{name}`, as in its header",
                f"{len(cells)} cells on line {number}",
                "Put quotes around a cell that holds the delimiter.",
            )
        padded = cells + [""] * (len(columns) - len(cells))
        rows.append(Row(f"line {number}", dict(zip(columns, padded, strict=True))))
    return Table(columns, tuple(rows))


def _read_json(name: str, data: bytes) -> Table:
    text = decode(name, data)
    try:
        content = json.loads(text)
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
    return _objects(name, ((f"item {i}", row) for i, row in enumerate(content, 1)))


def _rows_of_columns(name: str, content: dict[str, Any]) -> list[Any]:
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


def _read_jsonl(name: str, data: bytes) -> Table:
    def values() -> Iterator[tuple[str, Any]]:
        for number, line in _lines(decode(name, data)):
            try:
                yield f"line {number}", json.loads(line)
            except (RecursionError, ValueError) as error:
                reason = getattr(error, "msg", str(error))
                raise PromptFileError(
                    f"one JSON object a line in `{name}`",
                    f"{reason} on line {number}",
                    "Correct that line; a list over several lines is named `.json`.",
                ) from error

    return _objects(name, values())


def _objects(name: str, values: Iterable[tuple[str, Any]]) -> Table:
    rows: list[Row] = []
    columns: dict[str, None] = {}
    kinds: set[type] = set()
    for place, value in values:
        kinds.add(type(value))
        if not isinstance(value, dict | str) or len(kinds) > 1:
            raise PromptFileError(
                f"every item of `{name}` to be an object, or every item a text",
                f"a JSON {_kind(value)} at {place}",
                'Write {"prompt": "..."} for each prompt.',
            )
        require_unicode(value, name, place)
        cells = {TEXT_CELL: value} if isinstance(value, str) else value
        rows.append(Row(place, cells))
        columns.update(dict.fromkeys(cells))
    return Table(() if kinds == {str} else tuple(columns), tuple(rows))


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "boolean"}
    return names.get(type(value), "null" if value is None else "number")


def _read_parquet(name: str, data: bytes) -> Table:
    # Imported here because it is heavy, and most prompt files are text.
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise PromptFileError(
            f"`{name}` to be a Parquet file",
            str(error).splitlines()[0],
            "Write it again, or give the prompts as CSV or JSONL.",
        ) from error
    return Table(
        tuple(table.column_names),
        tuple(Row(f"row {number}", cells) for number, cells in enumerate(rows, 1)),
    )


READERS: Final[dict[str, Callable[[str, bytes], Table]]] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
"""Reader by suffix; the keys are the formats that Holdfast knows."""
