"""Rows of a study's tables: declared once as a dataclass, stored as Arrow.

```python
@dataclass(frozen=True)
class Mass:
    row_id: str
    layer: Int32
    mass: Sequence[Float32]
    reason: str | None = None

stage.write_table("mass.parquet", table_of(rows, Mass))
rows = rows_of(study.read_table("mass.parquet"), Mass)
```

Columns stand in the order of the fields. An `int` lies as int64 and a `float` as
float64 unless `Annotated` says another Arrow type; a tuple or sequence lies as a list,
a dataclass or named tuple as a struct. Anything else is annotated with a `Column`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

Int32 = Annotated[int, pa.int32()]
UInt64 = Annotated[int, pa.uint64()]
Float32 = Annotated[float, pa.float32()]
Word = Annotated[str, pa.dictionary(pa.int32(), pa.string())]
"""A text that many rows share, stored once."""
PLAIN = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
Row = TypeVar("Row")


class Column(NamedTuple):
    """How the values of a field lie in a table; null is kept as null."""

    type: pa.DataType
    pack: Callable[[Any], Any] | None = None  # None where Arrow takes them as they are.
    unpack: Callable[[Any], Any] | None = None


def table_schema(row_class: type) -> pa.Schema:
    """Return the Arrow schema of the rows of a dataclass."""
    return pa.schema(_struct(row_class).type)


def table_of(rows: Iterable[Row], row_class: type[Row]) -> pa.Table:
    """Return rows as a table, in their order."""
    rows = list(rows)
    packed = {
        name: _each(column.pack, [getattr(row, name) for row in rows])
        for name, column in _columns(row_class).items()
    }
    return pa.table(packed, schema=table_schema(row_class))


def rows_of(table: pa.Table, row_class: type[Row]) -> list[Row]:
    """Return the rows of a table that `table_of` made.

    A column that an older table lacks is left to the default of its field; columns of
    no field are passed over.
    """
    unpacked = {
        name: _each(column.unpack, table.column(name).to_pylist())
        for name, column in _columns(row_class).items()
        if name in table.column_names
    }
    return [
        row_class(**dict(zip(unpacked, values, strict=True)))
        for values in zip(*unpacked.values(), strict=True)
    ]


def vectors(values: Float[Tensor, "example _"]) -> pa.FixedSizeListArray:
    """Return a column with one vector of 32-bit floats per example."""
    flat = pa.array(values.float().numpy().reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def vectors_of(table: pa.Table, name: str) -> Float[Tensor, "example _"]:
    """Return the vectors of a column that `vectors` made."""
    flat = table.column(name).combine_chunks().flatten().to_numpy()
    return torch.from_numpy(np.array(flat).reshape(table.num_rows, -1))


def _columns(row_class: type) -> dict[str, Column]:
    """Return how each field of a dataclass or named tuple lies in a table."""
    hints = get_type_hints(row_class, include_extras=True)
    if dataclasses.is_dataclass(row_class):
        names = [each.name for each in dataclasses.fields(row_class)]
    else:
        names = list(row_class._fields)  # type: ignore[attr-defined]
    return {name: _column(hints[name]) for name in names}


def _column(hint: Any) -> Column:
    """Return how the values of a type lie in a table."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        for note in arguments[1:]:
            if isinstance(note, Column | pa.DataType):
                return note if isinstance(note, Column) else Column(note)
        return _column(arguments[0])
    if origin is Literal:
        return _column(type(arguments[0]))
    if origin in (Union, UnionType):
        [inner] = [each for each in arguments if each is not NoneType]
        return _column(inner)
    if origin in (list, Sequence) or (origin is tuple and arguments[1:] == (...,)):
        return _list(_column(arguments[0]), tuple if origin is tuple else list)
    if hint in PLAIN:
        return Column(PLAIN[hint])
    if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
        return _struct(hint)
    raise TypeError(f"{hint} lies in no column; annotate it with a Column")


def _list(inner: Column, kind: Callable[[Sequence[Any]], Any]) -> Column:
    return Column(
        pa.list_(inner.type),
        lambda values: _each(inner.pack, values),
        lambda values: kind(_each(inner.unpack, values)),
    )


def _struct(row_class: Any) -> Column:
    columns = _columns(row_class)

    def pack(row: Any) -> dict[str, Any]:
        return {
            name: _change(column.pack, getattr(row, name))
            for name, column in columns.items()
        }

    def unpack(record: Mapping[str, Any]) -> Any:
        return row_class(
            **{
                name: _change(column.unpack, record[name])
                for name, column in columns.items()
            }
        )

    kind = pa.struct([(name, column.type) for name, column in columns.items()])
    return Column(kind, pack, unpack)


def _each(change: Callable[[Any], Any] | None, values: Sequence[Any]) -> Sequence[Any]:
    return values if change is None else [_change(change, value) for value in values]


def _change(change: Callable[[Any], Any] | None, value: Any) -> Any:
    return value if change is None or value is None else change(value)
