"""Changes of valid files: how they are drawn, and what they make of a file."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

DEEP: Final = "@deep@"
BYTES, TIME, DECIMAL = "@bytes@", "@time@", "@decimal@"
AGAIN: Final = "@again@"
"""Stand for endless brackets, for what only Parquet has, and for a key said twice."""
ODD: Final = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 1.5, 16.0, 1e308, 10**30, -(2**63)),
    *(float("nan"), float("inf"), "", " ", "x", "7", "\ud800", "a\x00b", "../x", "<"),
    *(
        [],
        {},
        [None],
        [0],
        10**9,
        [""],
        {"": None},
        [{}],
        [[1]],
        DEEP,
        "\u202e",
        "label",
    ),
    *(BYTES, TIME, DECIMAL),
)
OF_ARROW: Final = {
    BYTES: b"\xff\x00",
    TIME: datetime(2020, 2, 2, tzinfo=UTC),
    DECIMAL: Decimal("1.50"),
}

Files = dict[str, Any]
"""Valid content by file name: an object of JSON, rows of a table, or bytes."""


class Change(NamedTuple):
    """One change of a file: what is done where, and with what."""

    file: str
    what: str
    where: tuple[Any, ...] | float = ()
    value: Any = None


def values() -> st.SearchStrategy[Any]:
    leaf = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters())
    )
    inner = st.recursive(
        leaf,
        lambda part: (
            st.lists(part, max_size=3)
            | st.dictionaries(st.text(max_size=5), part, max_size=3)
        ),
        max_leaves=6,
    )
    return st.sampled_from(ODD) | inner


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    keys = range(len(tree)) if isinstance(tree, list) else ()
    for key in tree if isinstance(tree, dict) else keys:
        yield from paths(tree[key], (*path, key))


def change(files: Files) -> st.SearchStrategy[Change]:
    """Draw one change of one of the files; most are of what a file says."""

    def of(name: str) -> st.SearchStrategy[Change]:
        place = st.floats(0, 1, exclude_max=True)
        raw = st.sampled_from(["cut", "flip", "insert", "utf-16", "bom", "gone"])
        damaged = st.builds(Change, st.just(name), raw, place, st.integers(0, 255))
        if isinstance(files[name], bytes):
            return damaged
        told = st.sampled_from(["put", "put", "put", "drop", "twice", "add", "rename"])
        where = st.sampled_from(list(paths(files[name])))
        said = st.builds(Change, st.just(name), told, where, values())
        return st.one_of(said, said, said, said, said, damaged)

    return st.sampled_from(list(files)).flatmap(of)


def changes(files: Files) -> st.SearchStrategy[list[Change]]:
    return st.lists(change(files), min_size=1, max_size=3)


def changed(tree: Any, each: Change) -> Any:
    """Return a tree of JSON with one change; one whose place is gone does nothing."""
    assert isinstance(each.where, tuple)
    if not each.where:
        return each.value if each.what == "put" else tree
    parent = tree
    try:
        for key in each.where[:-1]:
            parent = parent[key]
        last, held = each.where[-1], parent[each.where[-1]]
    except (LookupError, TypeError):
        return tree
    if not isinstance(parent, dict | list):
        return tree
    if each.what == "put":
        parent[last] = each.value
    elif each.what in ("drop", "rename"):
        del parent[last]
        if each.what == "rename" and isinstance(parent, dict):
            parent[str(each.value)] = held
    elif isinstance(parent, list):
        parent.append(held if each.what == "twice" else each.value)
    else:
        name = f"{last}{AGAIN}" if each.what == "twice" else str(each.value)
        parent[name] = each.value
    return tree


def damaged(content: bytes, each: Change) -> bytes:
    """Return bytes with one change."""
    assert isinstance(each.where, float)
    place = int(each.where * len(content))
    if each.what == "cut":
        return content[:place]
    if each.what == "flip":
        return content[:place] + bytes([each.value]) + content[place + 1 :]
    if each.what == "insert":
        return content[:place] + bytes([each.value]) * 3 + content[place:]
    if each.what == "utf-16":
        return content.decode("utf-8", "replace").encode("utf-16")
    return b"\xef\xbb\xbf" + content


def as_json(tree: Any) -> bytes:
    text = json.dumps(tree).replace(AGAIN, "")
    return text.replace(json.dumps(DEEP), "[" * 20_000 + "]" * 20_000).encode()


def as_header(tree: Any, body: bytes) -> bytes:
    header = as_json(tree)
    return len(header).to_bytes(8, "little") + header + body


def as_table(rows: Any, kind: str) -> bytes:
    """Return rows in a format; rows that are none stay as they are where they can."""
    if kind == "json" or not isinstance(rows, list):
        return as_json(rows)
    if kind == "jsonl":
        return b"\n".join(map(as_json, rows))
    rows = [row if isinstance(row, dict) else {"0": row} for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    if kind == "parquet":
        return as_parquet({name: [row.get(name) for row in rows] for name in names})
    text = io.StringIO(newline="")
    sheet = csv.writer(text, delimiter="," if kind == "csv" else "\t")
    sheet.writerow(names)
    sheet.writerows([cell(row.get(name)) for name in names] for row in rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(columns: dict[str, list[Any]]) -> bytes:
    """Return columns as Parquet; as text where the format does not have their kind."""
    names = [name.encode("utf-8", "replace").decode() for name in columns]
    for of in (column, text_column):
        written = io.BytesIO()
        try:
            pq.write_table(pa.table(list(map(of, columns.values())), names), written)
        except pa.ArrowException:
            continue
        return written.getvalue()
    return b""


def column(found: list[Any]) -> Any:
    """Return an Arrow column, of text where its values have no kind in common."""
    for mark, value in OF_ARROW.items():
        if mark in found:
            return pa.array([value] * len(found))
    try:
        return pa.array(found)
    except (pa.ArrowException, UnicodeError, OverflowError):
        return text_column(found)


def text_column(found: list[Any]) -> Any:
    """Return an Arrow column of text, which may be no UTF-8 as in files out there."""
    text = [cell(each).encode("utf-8", "surrogatepass") for each in found]
    return pa.array(text, pa.binary()).view(pa.string())


def cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value)


def apply(
    files: Files, made: list[Change], write: Mapping[str, Callable[[Any], bytes]]
) -> dict[str, bytes | None]:
    """Return the bytes of the files that a case changes; None for one that is gone."""
    found: dict[str, bytes | None] = {}
    for name in dict.fromkeys(each.file for each in made):
        of_file = [each for each in made if each.file == name]
        content = files[name]
        if not isinstance(content, bytes):
            tree = json.loads(json.dumps(content))
            for each in of_file:
                tree = changed(tree, each) if isinstance(each.where, tuple) else tree
            content = write.get(name, as_json)(tree)
        for each in of_file:
            if isinstance(each.where, float):
                content = damaged(content, each)
        is_gone = any(each.what == "gone" for each in of_file)
        found[name] = None if is_gone else content
    return found
