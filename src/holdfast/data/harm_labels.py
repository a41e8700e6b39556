"""Which rows of a table are harmful, as far as the table itself says so.

A label counts under whatever name its column has, as long as it is about the request:
what is said of an answer or a refusal labels no prompt.
"""

import re
from collections import Counter
from typing import Any, Final, Literal, NamedTuple

from holdfast.data.tables import Table, TableRow, fold
from holdfast.errors import PromptFileError

Label = Literal["harmful", "benign"]
_HARMFUL: Final = "harmful unsafe malicious toxic vanilla_harmful adversarial_harmful"
_BENIGN: Final = (
    "benign,harmless,safe,unharmful,not harmful,non-harmful,nonharmful,not toxic,"
    "non-toxic,vanilla_benign,adversarial_benign"
)
WORDS: Final[dict[str, Label]] = {
    **dict.fromkeys(_HARMFUL.split(), "harmful"),
    **dict.fromkeys(_BENIGN.split(","), "benign"),
}
"""What a label says, case folded."""
_TRUE: Final = {"1", "1.0", "true", "yes"}
_FALSE: Final = {"0", "0.0", "false", "no"}
_HARM: Final = {"label", "harm", "harmful", "harmfulness", "unsafe", "toxic"} | {
    "toxicity",
    "malicious",
}
_SAFE: Final = {"safe", "benign", "harmless", "unharmful"}
_NOT_OF_REQUESTS: Final = re.compile(
    r"respon|complet|answer|output|refus|judg|verdict|predict|target"
)
_ANSWERS: Final = ("response", "completion", "answer", "output")
_CONTRAST: Final = "contrast_"


class Column(NamedTuple):
    """A column of labels, and whether yes or 1 there means harm (None for words)."""

    name: str
    is_harm: bool | None


def read_labels(
    table: Table, label: Label, name: str
) -> tuple[list[Label], tuple[str, ...]]:
    """Return the label of every row, and what to say of where they come from."""
    columns = label_columns(table, name)
    if not columns:
        return [label] * len(table.rows), _left_out(table, label)
    labels = [_of_row(row, columns, label, name) for row in table.rows]
    named = ", ".join(f"`{column.name}`" for column in columns)
    counts = Counter(labels)
    notes = [
        f"column {named} decides: {counts[label]} rows are {label},"
        f" {len(labels) - counts[label]} not."
    ]
    for column in columns:
        if column.is_harm is not None and _base(column.name) == "label":
            notes.append(
                f"warning: column `{column.name}` has no words: 1 or true was read as"
                " harmful, 0 or false as benign."
            )
        if _is_contrast(table, column.name):
            notes.append(
                f"column `{column.name}` tells: {_CONTRAST}… is harmful, and the rest"
                " is safe, as XSTest has it."
            )
    return labels, tuple(notes)


def label_columns(table: Table, name: str) -> list[Column]:
    """Return the columns that label requests."""
    return [found for each in table.columns if (found := _column(table, each, name))]


def _left_out(table: Table, label: Label) -> tuple[str, ...]:
    name = next((each for each in table.columns if _base(each) == "label"), None)
    if name is None or not any(_values(table, name)):
        return ()
    return (
        f"warning: column `{name}` says nothing of harm and was left out: all {label}.",
    )


def _column(table: Table, name: str, file: str) -> Column | None:
    """Return how a column labels requests, None if it does not."""
    values = {value for value in _values(table, name) if value}
    if not values or _NOT_OF_REQUESTS.search(name.casefold()):
        return None
    if _is_contrast(table, name):
        return Column(name, None)
    base = _base(name)
    of_harm = base in _HARM or base in _SAFE
    spoken = values & set(WORDS)
    if spoken and (of_harm or values <= set(WORDS)):
        return Column(name, None)
    if not of_harm or not values <= _TRUE | _FALSE:
        return None
    _require_of_request(table, name, base, file)
    return Column(name, base in _HARM)


def _require_of_request(table: Table, name: str, base: str, file: str) -> None:
    folded = set(map(fold, table.columns))
    own = base == "label" or fold(name).startswith(("prompt", "request"))
    if not own and folded & set(_ANSWERS):
        raise PromptFileError(
            f"a column of `{file}` that says whether a request is harmful",
            f"`{name}` beside answers, which it may be about instead",
            "Call it `label` if it is about the request; else leave it out.",
        )


def _of_row(row: TableRow, columns: list[Column], label: Label, name: str) -> Label:
    said = {
        column.name: found
        for column in columns
        if (found := _said(row, column, name)) is not None
    }
    if len(set(said.values())) > 1:
        raise PromptFileError(
            f"one label a row in `{name}`",
            " and ".join(f"{said[each]} in `{each}`" for each in said)
            + f" at {row.place}",
            "Leave out the column that is no label of the request.",
        )
    return next(iter(said.values()), label)


def _said(row: TableRow, column: Column, name: str) -> Label | None:
    value = cell_text(row.cells.get(column.name)).casefold()
    if not value:
        return None
    if column.is_harm is not None:
        return "harmful" if (value in _TRUE) == column.is_harm else "benign"
    if value in WORDS:
        return WORDS[value]
    if fold(column.name) == "type":
        return "harmful" if value.startswith(_CONTRAST) else "benign"
    raise PromptFileError(
        f"column `{column.name}` of `{name}` to say {', '.join(WORDS)}",
        f"`{cell_text(row.cells.get(column.name))}` at {row.place}",
        "Correct the row, or rename the column if it is no label of harm.",
    )


def _is_contrast(table: Table, name: str) -> bool:
    """Return whether a column is that of XSTest, whose contrasts are the harmful rows.

    Where the file has a column of labels, that one says it.
    """
    if fold(name) != "type":
        return False
    if any(_base(each) == "label" for each in table.columns):
        return False
    return any(value.startswith(_CONTRAST) for value in _values(table, name))


def _base(name: str) -> str:
    """Return what a column's name says without the words around it."""
    folded = re.sub(r"[\s-]+", "_", fold(name))
    folded = re.sub(r"^(prompt|request|user)_", "", folded).removeprefix("is_")
    return folded.removesuffix("_label") if folded != "label" else folded


def _values(table: Table, name: str) -> list[str]:
    return [cell_text(row.cells.get(name)).casefold() for row in table.rows]


def cell_text(value: Any) -> str:
    """Return what a short cell says, without white space around it."""
    return "" if value is None else str(value).strip()
