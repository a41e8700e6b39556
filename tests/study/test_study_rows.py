from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import pyarrow as pa
import pytest
import torch

from holdfast.study import Study
from holdfast.study.rows import (
    Column,
    Float32,
    Int32,
    UInt64,
    Word,
    rows_of,
    table_of,
    table_schema,
    vectors,
    vectors_of,
)


class Turn(NamedTuple):
    prompt: str
    n_tokens: Int32 | None


@dataclass(frozen=True)
class Answer:
    row_id: str
    kind: Literal["short", "long"]
    place: int
    hash: UInt64
    group: Word
    is_closed: bool
    gap: float | None
    mass: tuple[Float32, ...]
    turns: tuple[Turn, ...]
    span: Annotated[tuple[int, int], Column(pa.list_(pa.int32(), 2), list, tuple)]
    words: Sequence[str] = ()
    flaw: str | None = None


ROWS = [
    Answer("a", "short", -1, 2**64 - 1, "g", True, None, (), (), (0, 3), ["x"]),
    Answer(
        "b", "long", 2**40, 0, "g", False, 0.1, (0.5, 2.0),
        (Turn("p", 3), Turn("q", None)), (3, 4), [], "loop",
    ),
]  # fmt: skip


def test_the_fields_of_a_row_are_the_columns_of_its_table():
    turn = pa.struct([("prompt", pa.string()), ("n_tokens", pa.int32())])
    assert table_schema(Answer) == pa.schema(
        [
            ("row_id", pa.string()),
            ("kind", pa.string()),
            ("place", pa.int64()),
            ("hash", pa.uint64()),
            ("group", pa.dictionary(pa.int32(), pa.string())),
            ("is_closed", pa.bool_()),
            ("gap", pa.float64()),
            ("mass", pa.list_(pa.float32())),
            ("turns", pa.list_(turn)),
            ("span", pa.list_(pa.int32(), 2)),
            ("words", pa.list_(pa.string())),
            ("flaw", pa.string()),
        ]
    )


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], []])
def test_rows_come_back_from_a_file_as_they_were(rows, tmp_path):
    study = Study.create(tmp_path)
    study.write_table("rows.parquet", table_of(iter(rows), Answer))
    table = study.read_table("rows.parquet")
    assert table.schema == table_schema(Answer)
    assert rows_of(table, Answer) == rows


def test_an_older_table_gets_defaults_and_further_columns_are_passed_over():
    table = table_of(ROWS, Answer).drop_columns(["flaw"])
    table = table.append_column("other", [[1, 2]])
    assert [row.flaw for row in rows_of(table, Answer)] == [None, None]
    with pytest.raises(TypeError, match="row_id"):
        rows_of(table.drop_columns(["row_id"]), Answer)


def test_a_type_without_a_place_in_a_table_is_named():
    @dataclass(frozen=True)
    class Odd:
        what: dict[str, int]

    with pytest.raises(TypeError, match=r"dict\[str, int\] lies in no column"):
        table_schema(Odd)


def test_vectors_come_back_as_they_were_in_any_number_of_chunks():
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    parts = [pa.table({"state": vectors(part)}) for part in (values[:2], values[2:])]
    table = pa.concat_tables(parts)
    assert table.schema.field("state").type == pa.list_(pa.float32(), 3)
    assert torch.equal(vectors_of(table, "state"), values)
    # A chunk that begins within another is read from where it begins.
    assert torch.equal(vectors_of(table.slice(1, 3), "state"), values[1:4])
