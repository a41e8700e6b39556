"""Prompt rows, and the readers that make them from files and Hub datasets."""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from holdfast.data.columns import Choice, choose_column
from holdfast.data.harm_labels import Label, cell_text, read_labels
from holdfast.data.sources import Content, load
from holdfast.data.tables import Table, TableRow, fold
from holdfast.errors import PromptFileError

_PLAIN: Final = {"none", "plain", "null", "n/a"}
_STRAIGHT: Final = str.maketrans("‘’‚‛“”„‟", "''''\"\"\"\"")
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Prompt:
    """One thing a user says to a model.

    Attributes:
        prompt_id: First 16 hex digits of the hash of the normalised text, or of the
            texts of all turns.
        request_id: The request without its wrapper; the cluster of every interval.
        text: What the user's turn says, exactly; of a conversation the last one.
        label: Whether the request is harmful.
        source: Name of the file or dataset it comes from.
        wrapper: Name of the jailbreak wrapper around the request, None for plain.
        topic: What the request is about, where the source says so.
        earlier: What the user says in the turns before, each of which the model that
            is asked answers itself.
        request: The request behind an attack, where the source says so; the prompt
            itself where the source says that nothing is around it.
    """

    prompt_id: str
    request_id: str
    text: str
    label: Label
    source: str
    wrapper: str | None
    topic: str | None = None
    earlier: tuple[str, ...] = ()
    request: str | None = None

    @property
    def said(self) -> str:
        """All that the user says, turn after turn."""
        return "\n\n".join((*self.earlier, self.text))


@dataclass(frozen=True)
class PromptFile:
    """The distinct prompts of one source, and what the user has to know of it."""

    prompts: tuple[Prompt, ...]  # Distinct prompts in file order.
    source: str  # Name of the source; a Hub dataset's carries its commit.
    column: str | None  # Column that was read, None for a format without columns.
    columns: tuple[str, ...]  # All columns of the source.
    n_rows: int  # Rows with a prompt, before duplicates were left out.
    n_duplicates: int  # Rows that repeat the normalised text of an earlier one.
    sha256: str  # Hash of the bytes that were read.
    # Sentences to show to the user; a doubt starts with "warning:".
    notes: tuple[str, ...]

    @property
    def record(self) -> dict[str, Any]:
        """What a report says of the source."""
        return {
            "source": self.source,
            "column": self.column,
            "rows": self.n_rows,
            "duplicates": self.n_duplicates,
            "sha256": self.sha256,
            "notes": list(self.notes),
        }


def normalise(text: str) -> str:
    """Return the form under which two texts count as the same.

    Unicode NFKC, case folded, quotes straightened, white space collapsed.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_STRAIGHT)
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def content_hash(text: str) -> str:
    """Return the SHA-256 of the normalised text, as 64 hex digits."""
    data = normalise(text).encode("utf-8", errors="surrogatepass")
    return hashlib.sha256(data).hexdigest()


def prompt_id(text: str) -> str:
    """Return the first 16 hex digits of `content_hash`."""
    return content_hash(text)[:16]


def conversation_id(turns: Sequence[str]) -> str:
    """Return the id of what a user says: of one text `prompt_id`, of more their own."""
    if len(turns) == 1:
        return prompt_id(turns[0])
    return prompt_id(json.dumps([normalise(turn) for turn in turns]))


def reworded(prompt: Prompt, text: str, wrapper: str | None = None) -> Prompt:
    """Return a prompt whose last turn says something else; its request stays.

    `wrapper`: Name of the attack that this is, None to keep what is there.
    """
    key = conversation_id((*prompt.earlier, text))
    name = prompt.wrapper if wrapper is None else wrapper
    return replace(prompt, prompt_id=key, text=text, wrapper=name)


class Placed(NamedTuple):
    """A prompt, and the row that it comes from."""

    prompt: Prompt
    row: TableRow


class PlacedPrompts(NamedTuple):
    """The prompts of a table row by row, repeats and all, and how they were read."""

    rows: tuple[Placed, ...]
    choice: Choice
    notes: tuple[str, ...]


def read_prompts(
    source: str,
    *,
    label: Label,
    column: str | None = None,
    revision: str | None = None,
    attacked: bool = False,
    role: str | None = None,
    accept: bool = False,
    first_turn: bool = False,
) -> PromptFile:
    """Read the distinct prompts of a file or of a Hub dataset.

    Formats: CSV, TSV, JSON (a list of objects or of texts, or one object of columns),
    JSONL, Parquet, plain text (one prompt a line), and "hub:owner/name[:split]". A
    list of turns is a conversation. Optional columns: `wrapper`, `request_id`, a label
    of harm, a text that the request refers to, and `topic` or `category`.

    `column`: Column with the prompts; None chooses the first known name.
    `attacked`: Whether the prompts are jailbreak prompts: a column `prompt` beside a
    `goal` is the attack then, and `goal` the request behind it. So they are where the
    file names wrappers.
    `first_turn`: Whether of a conversation only its first turn is asked.
    """
    content = load(source, revision)
    table = content.table
    choice = choose_column(
        table,
        column,
        content.name,
        attacked=attacked or any(_wrapper(row) for row in table.rows),
        role=role,
        accept=accept,
    )
    found = placed_prompts(content, choice, label, first_turn=first_turn)
    prompts = distinct_prompts(found.rows, content.name)
    n_rows, n_duplicates = len(found.rows), len(found.rows) - len(prompts)
    repeats = (
        f"{n_duplicates} of {n_rows} rows repeat an earlier prompt and were left out.",
    )
    return PromptFile(
        prompts=prompts,
        source=content.name,
        column=choice.column,
        columns=table.columns,
        n_rows=n_rows,
        n_duplicates=n_duplicates,
        sha256=content.sha256,
        notes=(*content.notes, *found.notes, *(repeats if n_duplicates else ())),
    )


def placed_prompts(
    content: Content, choice: Choice, label: Label, *, first_turn: bool = False
) -> PlacedPrompts:
    """Return the prompt of every row that has one, with its label and its cluster.

    Prompt files and imported completions are both read here, so that one row means
    the same in either.

    `first_turn`: Whether of a conversation only its first turn is asked.
    """
    name, table = content.name, content.table
    asked = [(row, choice.turns(row, name)) for row in table.rows]
    kept = [(row, turns) for row, turns in asked if turns]
    empty = [row for row, turns in asked if not turns]
    if not kept:
        where = f" in column `{choice.column}`" if choice.column else ""
        raise PromptFileError(
            f"prompts{where} of `{name}`",
            f"none in {len(empty)} rows",
            "Check which column holds the prompts, and choose it with `--column`.",
        )
    # The columns of a table count even where its first rows hold no prompt.
    whole = Table(table.columns, tuple(row for row, _ in kept))
    labels, label_notes = read_labels(whole, label, name)
    made = [
        _prompt(row, turns[:1] if first_turn else turns, choice, each, name)
        for (row, turns), each in zip(kept, labels, strict=True)
    ]
    _require_one_label(made, name)
    joined, cluster_notes = _with_clusters(made)
    notes = (
        *choice.notes,
        *label_notes,
        *_empty_notes(empty, len(asked)),
        *_turn_notes([turns for _, turns in kept], first_turn),
        *_wrapper_notes(table, choice),
        *cluster_notes,
    )
    return PlacedPrompts(joined, choice, notes)


def distinct_prompts(rows: Sequence[Placed], name: str) -> tuple[Prompt, ...]:
    """Return every prompt once, in the order of the rows."""
    first: dict[str, Prompt] = {}
    for prompt, _ in rows:
        first.setdefault(prompt.prompt_id, prompt)
    if len(first) == 1 and len(rows) > 1:
        raise PromptFileError(
            f"different prompts in `{name}`",
            f"{len(rows)} rows that all say the same",
            "Check which column holds the prompts, and choose it with `--column`.",
        )
    return tuple(first.values())


def _prompt(
    row: TableRow, turns: tuple[str, ...], choice: Choice, label: Label, name: str
) -> Placed:
    turns = (choice.with_background(turns[0], row), *turns[1:])
    key = conversation_id(turns)
    behind = choice.request and _cell(row, choice.request)
    own = _cell(row, "request_id") or (prompt_id(behind) if behind else key)
    wrapper, said = _wrapper(row), "\n\n".join(turns)
    if wrapper is None and not behind and _cell(row, "wrapper"):
        behind = said
    prompt = Prompt(
        prompt_id=key,
        request_id=own,
        text=turns[-1],
        label=label,
        source=name,
        wrapper=None if is_bare(said, behind or None) else wrapper,
        topic=_cell(row, "topic", "category"),
        earlier=turns[:-1],
        request=behind or None,
    )
    return Placed(prompt, row)


def is_bare(said: str, request: str | None) -> bool:
    """Return whether what is said is the request behind it, with nothing around it."""
    return request is not None and normalise(said) == normalise(request)


def _wrapper(row: TableRow) -> str | None:
    """Return the name of the wrapper of a row; a word for none is none."""
    wrapper = _cell(row, "wrapper")
    return None if wrapper is None or wrapper.casefold() in _PLAIN else wrapper


def _cell(row: TableRow, *names: str) -> str | None:
    """Return the first optional cell of a row that says something."""
    for name in names:
        shown = _shown(row.folded.get(fold(name)))
        if shown:
            return shown
    return None


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(filter(None, map(_shown, value)))
    return json.dumps(value) if isinstance(value, dict) else cell_text(value)


def _require_one_label(rows: Iterable[Placed], name: str) -> None:
    first: dict[str, Placed] = {}
    for placed in rows:
        known = first.setdefault(placed.prompt.prompt_id, placed)
        if known.prompt.label != placed.prompt.label:
            raise PromptFileError(
                f"one label a prompt in `{name}`",
                f"{known.prompt.label} at {known.row.place} and "
                f"{placed.prompt.label} at {placed.row.place}",
                "Both rows say the same; keep one of them.",
            )


def _with_clusters(
    rows: Sequence[Placed],
) -> tuple[tuple[Placed, ...], tuple[str, ...]]:
    """Join the requests that share a prompt, so that none is fitted on and tested on.

    Serving engines name every call by an id of its own, whatever was asked in it.
    """
    parents: dict[str, str] = {}

    def root(request: str) -> str:
        while parents.setdefault(request, request) != request:
            request = parents[request]
        return request

    first: dict[str, str] = {}
    n_joined = 0
    for prompt, _ in rows:
        own = root(prompt.request_id)
        known = root(first.setdefault(prompt.prompt_id, prompt.request_id))
        if own == known:
            continue
        if known == prompt.prompt_id:
            # The earlier row had no name for its request but the prompt's own.
            parents[known] = own
        else:
            parents[own] = known
            n_joined += own != prompt.prompt_id
    made = tuple(
        Placed(replace(prompt, request_id=root(prompt.request_id)), row)
        for prompt, row in rows
    )
    if not n_joined:
        return made, ()
    note = (
        f"warning: {n_joined} values of `request_id` name prompts that another value"
        " names as well; each such group counts as one request."
    )
    return made, (note,)


def _empty_notes(empty: Sequence[TableRow], n_rows: int) -> tuple[str, ...]:
    if not empty:
        return ()
    more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
    places = ", ".join(row.place for row in empty[:_SHOWN])
    return (
        f"warning: {len(empty)} of {n_rows} rows hold no prompt and were left out:"
        f" {places}{more}.",
    )


def _turn_notes(
    conversations: Sequence[Sequence[str]], first_turn: bool
) -> tuple[str, ...]:
    longer = [len(turns) for turns in conversations if len(turns) > 1]
    if not longer:
        return ()
    if first_turn:
        return (f"{len(longer)} rows have several turns, of which the first is asked.",)
    return (
        f"{len(longer)} rows are conversations of up to {max(longer)} turns: each turn"
        " is asked after the model's own answers, and the last answer is judged.",
    )


def _wrapper_notes(table: Table, choice: Choice) -> tuple[str, ...]:
    named = set(map(fold, table.columns))
    if "wrapper" in named and "request_id" not in named and choice.request is None:
        return (
            "warning: column `wrapper` without `request_id`: every row counts as a"
            " request of its own, so intervals may be too narrow.",
        )
    return ()
