"""Which columns of a table make a prompt, and what their cells say."""

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from holdfast.data.tables import TEXT_CELL, Table, TableRow, fold
from holdfast.errors import PromptFileError

KNOWN_COLUMNS: Final = tuple(
    "goal prompt question instruction behavior forbidden_prompt turns messages "
    "conversation conversations".split()
)
"""Names of a prompt column, case folded, the first that exists being read."""
ATTACK_COLUMNS: Final = tuple(
    "prompt jailbreak_prompt jailbroken_prompt adversarial_prompt test_case "
    "adversarial jailbreak attack".split()
)
"""Names of a column of jailbreak prompts; what they stand around is in another one."""
REQUEST_COLUMNS: Final = tuple(
    "goal behavior forbidden_prompt vanilla request question".split()
)
"""Names of a column that says what a jailbreak prompt is about."""
CONTEXTS: Final[Mapping[str, tuple[str, ...]]] = {
    "contextstring": (),
    "context": ("question", "instruction", "behavior", "goal", "prompt"),
    "input": ("instruction",),
}
"""Columns that belong to the request, and beside which columns ( any) they do."""
CONTEXT_RULE: Final = "\n\n---\n\n"
_TALKS: Final = ("turns", "messages", "conversation", "conversations")
_USER: Final = ("user", "human")
_MODEL: Final = ("assistant", "gpt", "model", "bot")
_ANSWER: Final = re.compile(
    r"\W*(sure|certainly|absolutely|of course)\b\W*[,!.:]|\W*here('s|’s| is| are)\b",
    re.IGNORECASE,
)
_MOSTLY: Final = 0.8
_LISTED: Final = 12
_LISTED_LENGTH: Final = 40


class Choice(NamedTuple):
    """The columns that are read."""

    column: str | None  # Column of the prompts, None for a format without columns.
    notes: tuple[str, ...]  # What to say of it; a doubt starts with "warning:".
    # Column of the request behind an attack, None where there is none.
    request: str | None = None
    # Column of a text that the request refers to, None for none.
    context: str | None = None

    def turns(self, row: TableRow, name: str) -> tuple[str, ...]:
        """Return what the user says in a row, turn by turn, exactly.

        Returns: One text a turn; none for a cell that is empty or not there. Turns of
        the model are left out, since the model that is asked gives its own.
        """
        column = TEXT_CELL if self.column is None else self.column
        value = row.cells.get(column)
        if fold(column) in _TALKS and isinstance(value, str):
            value = _unpacked(value, column, row, name)
        if value is None:
            return ()
        if isinstance(value, list | tuple):
            return _turns(value, column, row, name)
        if isinstance(value, str):
            return (value,) if value.strip() else ()
        raise PromptFileError(
            f"text in column `{column}` of `{name}`",
            f"{type(value).__name__} at {row.place}",
            "Choose the column of the prompts with `--column`; a conversation is a"
            " list of texts.",
        )

    def replies(self, row: TableRow) -> tuple[str, ...]:
        """Return what the model says in a row, turn by turn; none where it does not."""
        value = row.cells.get(TEXT_CELL if self.column is None else self.column)
        turns = value if isinstance(value, list | tuple) else ()
        return tuple(
            str(_content(turn) or "")
            for turn in turns
            if isinstance(turn, dict) and _speaker(turn) in _MODEL
        )

    def background(self, row: TableRow) -> str | None:
        """Return the text that a row's request refers to, None for none."""
        value = None if self.context is None else row.cells.get(self.context)
        return value if isinstance(value, str) and value.strip() else None

    def with_background(self, text: str, row: TableRow) -> str:
        """Return a request with the text that it refers to.

        An `input` stands behind its instruction, as Alpaca has it; any other text
        stands before the request. A request that holds the text already stays as it
        is.
        """
        found = self.background(row)
        if found is None or found.strip() in text:
            return text
        if fold(self.context or "") == "input":
            return f"{text}\n\n{found}"
        return f"{found}{CONTEXT_RULE}{text}"


def choose_column(
    table: Table,
    column: str | None,
    name: str,
    *,
    attacked: bool = False,
    asked: bool = True,
    role: str | None = None,
    accept: bool = False,
) -> Choice:
    """Choose the column of the prompts, and say which and why.

    `column`: The column that is wanted, None for the first known name.
    Returns: The columns as the table spells them, with notes.
    """
    if not table.columns:
        if column is not None:
            raise PromptFileError(
                f"column `{column}` in `{name}`",
                "a format without columns",
                "Leave out `--column`.",
            )
        return Choice(None, ())
    request = _match(table.columns, REQUEST_COLUMNS) if attacked else None
    known = (*ATTACK_COLUMNS, *KNOWN_COLUMNS) if attacked else KNOWN_COLUMNS
    chosen = _match(table.columns, known if column is None else (column,))
    if chosen is None:
        raise _no_column(table, column, name)
    if column is None and request not in (None, chosen) and fold(chosen) != "prompt":
        _require_attacks(table, chosen, str(request), name)
    if column is None:
        note = f"column `{chosen}` was chosen out of {_listed(table.columns)}."
    else:
        note = f"column `{chosen}` was read, as asked."
    context = context_choice(table.columns, chosen).context
    made = Choice(chosen, (), None if request == chosen else request, context)
    sure = accept or (column is not None and asked)
    swap = _swap_notes(table, chosen, name, role, sure)
    return made._replace(notes=(note, *_beside(table, made), *swap))


def context_choice(columns: tuple[str, ...], column: str) -> Choice:
    """Return a choice of a column with the text that belongs to its requests."""
    for name, beside in CONTEXTS.items():
        found = _match(columns, (name,))
        if found not in (None, column) and (not beside or fold(column) in beside):
            return Choice(column, (), context=found)
    return Choice(column, ())


def _require_attacks(table: Table, column: str, request: str, name: str) -> None:
    """Refuse a column that names attacks, as `jailbreak` does in some benchmarks."""
    about: dict[str, set[str]] = {}
    for row in table.rows:
        text, asked = row.cells.get(column), row.cells.get(request)
        if isinstance(text, str) and text.strip() and isinstance(asked, str):
            about.setdefault(text, set()).add(asked)
    for text, requests in about.items():
        if len(requests) > 1 and not any(asked in text for asked in requests):
            raise PromptFileError(
                f"jailbreak prompts in column `{column}` of `{name}`",
                f"`{text[:_LISTED_LENGTH]}` beside {len(requests)} requests of"
                f" `{request}`, none of which it holds: a name of an attack",
                "Name the column of the prompts with `--column`, or call it `prompt`.",
            )


def _no_column(table: Table, column: str | None, name: str) -> PromptFileError:
    wanted = f"column `{column}`" if column else "a column of prompts"
    return PromptFileError(
        f"{wanted} in `{name}`"
        if column
        else f"{wanted} in `{name}`, called one of {', '.join(KNOWN_COLUMNS)}",
        f"columns {_listed(table.columns)}",
        "Name the column that holds the prompts with `--column`"
        + _header_hint(table.columns),
    )


def _beside(table: Table, choice: Choice) -> tuple[str, ...]:
    """Say which other columns have a part in the prompt, or might have had one."""
    notes = []
    if choice.request is not None:
        notes.append(
            f"column `{choice.request}` is the request behind the attack in"
            f" `{choice.column}`."
        )
    if choice.context is not None:
        count = sum(choice.background(row) is not None for row in table.rows)
        notes.append(f"column `{choice.context}` was put into {count} prompts.")
    talk = _match(table.columns, _TALKS)
    if talk is not None and fold(choice.column or "") not in _TALKS:
        longer = sum(
            isinstance(value := row.cells.get(talk), list) and len(value) > 1
            for row in table.rows
        )
        if longer:
            notes.append(
                f"warning: column `{talk}` holds conversations in {longer} rows and"
                f" was not read: `{choice.column}` was asked alone."
            )
    return tuple(notes)


def _match(columns: tuple[str, ...], wanted: tuple[str, ...]) -> str | None:
    for name in wanted:
        if name in columns:
            return name
        for column in columns:
            if fold(column) == fold(name) and column:
                return column
    return None


def _listed(columns: tuple[str, ...]) -> str:
    named = [column for column in columns if column]
    shown = [
        f"`{name if len(name) <= _LISTED_LENGTH else name[:_LISTED_LENGTH] + '…'}`"
        for name in named[:_LISTED]
    ]
    more = f" and {len(named) - _LISTED} more" if len(named) > _LISTED else ""
    return (", ".join(shown) + more) or "without names"


def _header_hint(columns: tuple[str, ...]) -> str:
    if len(columns) == 1:
        for delimiter, word in ((";", "semicolons"), ("\t", "tabs")):
            if delimiter in columns[0]:
                return f"; this file seems to be cut by {word}: cut it by commas."
    if len(columns) == 1 or any(len(name.split()) > 3 for name in columns):
        return "; a table without a header needs a first line, such as `prompt`."
    return "."


def _unpacked(value: str, column: str, row: TableRow, name: str) -> Any:
    # CSV has no lists; the usual way to put one into a cell is JSON.
    if not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise PromptFileError(
            f"a JSON list in column `{column}` of `{name}`",
            f"{error} at {row.place}",
            'Write the turns as ["first", "second"].',
        ) from error


def _turns(
    value: list[Any] | tuple[Any, ...], column: str, row: TableRow, name: str
) -> tuple[str, ...]:
    """Return the user's turns of a conversation."""
    said = [_said(each, column, row, name) for each in value]
    # Tables pad the shorter conversations of a column.
    while said and said[-1] == "":
        said.pop()
    turns = tuple(each for each in said if each is not None)
    if all(turns):
        return turns
    raise PromptFileError(
        f"a text in every turn of column `{column}` of `{name}`",
        f"an empty turn at {row.place}",
        "Fill it in, or leave it out.",
    )


def _said(turn: Any, column: str, row: TableRow, name: str) -> str | None:
    """Return the text of a turn of the user's; None for one of the model's."""
    who = "user"
    if isinstance(turn, dict):
        who, turn = _speaker(turn), _content(turn)
    if who in _MODEL:
        return None
    if who in _USER and (turn is None or isinstance(turn, str)):
        return turn if turn and turn.strip() else ""
    found = f"a turn of `{who}`" if who not in _USER else type(turn).__name__
    raise PromptFileError(
        f"turns of the user as texts in column `{column}` of `{name}`",
        f"{found} at {row.place}",
        "Write the turns as texts; a system prompt is given by `--system-prompt`.",
    )


def _speaker(turn: Mapping[str, Any]) -> str:
    return str(turn.get("role", turn.get("from", ""))).casefold()


def _content(turn: Mapping[str, Any]) -> Any:
    """Return what a turn says; parts of text as the text that they make up."""
    value = turn.get("content", turn.get("value"))
    parts = value if isinstance(value, list) else []
    found = [part.get("text") for part in parts if isinstance(part, dict)]
    texts = [text for text in found if isinstance(text, str)]
    return "".join(texts) if texts and len(texts) == len(parts) else value


def _swap_notes(
    table: Table, chosen: str, name: str, role: str | None, accept: bool
) -> tuple[str, ...]:
    """Warn of a column that seems to hold answers; refuse it where nobody chose it."""
    if _answer_share(table, chosen) < _MOSTLY:
        return ()
    others = [
        column
        for column in table.columns
        if column != chosen
        and _answer_share(table, column) <= 1 - _MOSTLY
        and _mean_words(table, column) > 2
    ]
    if not others:
        return ()
    best = max(others, key=lambda column: len(set(_texts(table, column))))
    doubt = (
        f"the rows of column `{chosen}` start like answers and those of `{best}` do"
        " not: the headers may be swapped"
    )
    otherwise = (
        f"To read the other column, give `--column {role}={best}`"
        if role
        else "To read the other column, rename the two"
    )
    if not accept:
        raise PromptFileError(
            f"prompts in column `{chosen}` of `{name}`",
            doubt,
            f"{otherwise}; to read this one all the same, give --yes.",
        )
    return (f"warning: {doubt}. {otherwise}.",)


def _texts(table: Table, column: str) -> list[str]:
    cells = (row.cells.get(column) for row in table.rows)
    return [cell for cell in cells if isinstance(cell, str) and cell.strip()]


def _answer_share(table: Table, column: str) -> float:
    texts = _texts(table, column)
    return sum(_ANSWER.match(text) is not None for text in texts) / max(len(texts), 1)


def _mean_words(table: Table, column: str) -> float:
    texts = _texts(table, column)
    return sum(len(text.split()) for text in texts) / max(len(texts), 1)
