"""Label files: exchanges that people have judged.

Two shapes are read: that of XSTest (`prompt`, `completion`, `final_label`, and two
annotators), and rows of `request`, `response` and `label`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.data.readers import Row, Table
from holdfast.data.sources import load
from holdfast.errors import PromptFileError

OUTCOMES = ("complied", "partial", "refused")
VOCABULARY: Mapping[str, str] = {
    "1_full_compliance": "complied",
    "2_full_refusal": "refused",
    "3_partial_refusal": "partial",
    **{outcome: outcome for outcome in OUTCOMES},
}
SHAPES = (
    ("request", "response", "label"),
    ("prompt", "completion", "final_label"),
)
ANNOTATORS = ("annotation_1", "annotation_2")


@dataclass(frozen=True, slots=True)
class Labelled:
    """One exchange and what people said of it.

    Attributes:
        request: What the user asked.
        response: What a model answered.
        label: The label that counts: complied, partial or refused.
        people: The labels of two annotators, where the file has them.
        place: Where in its file it stands.
    """

    request: str
    response: str
    label: str
    people: tuple[str, str] | None
    place: str


@dataclass(frozen=True, slots=True)
class LabelFile:
    """The labelled rows of one source, with the hash of its bytes."""

    name: str
    sha256: str
    rows: tuple[Labelled, ...]


def read_labels(source: str, revision: str | None = None) -> LabelFile:
    """Read one file of labelled exchanges.

    Args:
        source: Path of a CSV, JSON, JSONL or Parquet file, or `hub:owner/name`.
        revision: Branch, tag or commit of a Hub dataset.

    Raises:
        PromptFileError: If columns are missing, a cell is no text, or a label is not
            in the vocabulary; names the values that were found.
        OfflineError: If the Hub cannot be reached.
    """
    content = load(source, revision)
    shape = _shape(content.table, content.name)
    _check_vocabulary(content.table, shape[2], content.name)
    asked = all(name in content.table.columns for name in ANNOTATORS)
    if asked:
        for name in ANNOTATORS:
            _check_vocabulary(content.table, name, content.name)
    rows = tuple(
        Labelled(
            _text(row, shape[0], content.name),
            _text(row, shape[1], content.name),
            _outcome(row.cells[shape[2]]),
            _people(row) if asked else None,
            row.place,
        )
        for row in content.table.rows
    )
    return LabelFile(content.name, content.sha256, rows)


def _shape(table: Table, name: str) -> tuple[str, str, str]:
    for shape in SHAPES:
        if set(shape) <= set(table.columns):
            return shape
    shapes = " or ".join(", ".join(f"`{column}`" for column in s) for s in SHAPES)
    found = ", ".join(f"`{column}`" for column in table.columns) or "no columns"
    raise PromptFileError(
        f"columns {shapes} in `{name}`", found, "Rename the columns of the file."
    )


def _check_vocabulary(table: Table, column: str, name: str) -> None:
    found = {str(row.cells.get(column, "")).strip() for row in table.rows}
    strange = sorted(value for value in found if value.casefold() not in VOCABULARY)
    if strange:
        shown = ", ".join(f"`{value[:40]}`" for value in strange[:5])
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        raise PromptFileError(
            f"labels {', '.join(f'`{label}`' for label in VOCABULARY)} in column "
            f"`{column}` of `{name}`",
            shown + more,
            "Translate the labels; a row without one is to be left out.",
        )


def _outcome(value: Any) -> str:
    return VOCABULARY[str(value).strip().casefold()]


def _people(row: Row) -> tuple[str, str]:
    first, second = (_outcome(row.cells[name]) for name in ANNOTATORS)
    return first, second


def _text(row: Row, column: str, name: str) -> str:
    value = row.cells.get(column)
    # An empty answer is an answer, and one that judges have to know.
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise PromptFileError(
                f"valid Unicode in column `{column}` of `{name}`",
                f"half a surrogate pair at {row.place}",
                "Write the character itself, or both halves of its escape.",
            ) from error
        return value
    raise PromptFileError(
        f"text in column `{column}` of `{name}`",
        f"{type(value).__name__} at {row.place}",
        "Write every request and response as text.",
    )
