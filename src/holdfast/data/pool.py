"""Pools of training rows, read shard by shard, however long they are.

A row is a prompt with a safe answer, and with a thinking or without: in fields of
their own, or both in one field with tags around the thinking.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from holdfast.data.chat.conversation import (
    Conversation,
    build_conversation,
    split_completion,
)
from holdfast.data.chat.rendering import ChatTokenizer
from holdfast.data.chat.thinking import ThinkingFormat
from holdfast.data.chat.thinking_formats import ANSWERS, TAGS
from holdfast.data.columns import context_choice
from holdfast.data.tables import Raw, TableRow, raw_rows
from holdfast.errors import PromptFileError, SettingsError

OWN: Final = "holdfast"
"""Field in which a chosen row says what was found and drawn."""
FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "prompt": ("prompt", "question", "instruction", "vanilla", "goal", "request"),
    "response": ("response", "completion", "answer", "output"),
    "thinking": ("thinking", "reasoning", "reasoning_content", "cot"),
    "category": ("category", "topic"),
}
"""Names under which a field is looked for, the first that exists being read."""
UNENDED: Final = "thinking that never ends"
NO_ANSWER: Final = "no answer after the thinking"
TWO_THOUGHTS: Final = "thinking in a field and in the answer"
TAGS_INSIDE_THINKING: Final = "tags inside the thinking"
TAGS_INSIDE_ANSWER: Final = "tags inside the answer"
_FORMATS: Final = tuple(
    ThinkingFormat(
        each.open,
        each.close,
        each.end_template,
        True,
        each.open_template,
        each.answer_end,
    )
    for each in TAGS
)


@dataclass(frozen=True, slots=True)
class PoolRow:
    """One row of a pool."""

    row: int  # Its number in the pool, from 0.
    place: str  # Where it stands, for messages.
    prompt: str  # What the user says.
    # The thinking that the row brings, without tags; None for none.
    thinking: str | None
    response: str  # The safe answer, without the thinking.
    category: str | None  # Its category, where the pool says so.
    cells: Mapping[str, Any]  # The row as it was read.
    # Why the row is not to be trained on, None where it is whole.
    broken: str | None = None

    @property
    def content(self) -> int:
        """64 bits of the hash of what the row says; they break ties."""
        parts = json.dumps([self.prompt, self.thinking, self.response])
        digest = hashlib.sha256(parts.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big")


class Shard(NamedTuple):
    """Rows that are worked on together; `read` parses them."""

    number: int
    read: Callable[[], list[PoolRow]]


class Survey(NamedTuple):
    """What a first pass over a pool found: rows, and the hash of all its bytes."""

    n_rows: int
    sha256: str


class Pool:
    """A pool on disk: one file, or a folder of Parquet or JSONL files.

    Attributes:
        source: As the user named it.
        files: Its files, in the order of their names.
    """

    def __init__(self, source: str, columns: Mapping[str, str] | None = None) -> None:
        """Find the files; nothing is read yet."""
        unknown = sorted(set(columns or {}) - set(FIELDS))
        if unknown:
            raise SettingsError(
                f"--column FIELD=NAME with a field of {', '.join(FIELDS)}",
                ", ".join(unknown),
                "Name one of these fields.",
            )
        self.source = source
        self.files = _files(source)
        self._columns = dict(columns or {})

    @cached_property
    def survey(self) -> Survey:
        """Rows and hash, from one pass without parsing."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as handle:
                while block := handle.read(1 << 20):
                    digest.update(block)
        n_rows = sum(1 for _ in self._raw())
        if not n_rows:
            raise PromptFileError(
                f"rows in `{self.source}`", "none", "Give a pool with rows."
            )
        return Survey(n_rows, digest.hexdigest())

    def shards(self, size: int, skip: Callable[[int], bool]) -> Iterator[Shard]:
        """Yield the shards in their order; of skipped ones nothing is parsed.

        `skip`: Whether a shard, by its number, is not wanted.
        """
        held: list[tuple[int, Raw]] = []
        index, wanted = 0, not skip(0)
        for number, raw in enumerate(self._raw()):
            if number // size != index:
                if held:
                    yield self._shard(index, held)
                index, held = number // size, []
                wanted = not skip(index)
            if wanted:
                held.append((number, raw))
        if held:
            yield self._shard(index, held)

    def rows(self, wanted: Callable[[int], bool]) -> Iterator[PoolRow]:
        """Yield chosen rows in the order of the pool; only these are parsed."""
        for number, raw in enumerate(self._raw()):
            if wanted(number):
                yield self._row(number, raw)

    def _raw(self) -> Iterator[Raw]:
        for path in self.files:
            # A line of one file among several is no place without the file.
            name = f"{path.name}, " if self.files[1:] else ""
            for raw in raw_rows(path):
                yield raw._replace(place=name + raw.place) if name else raw

    def _shard(self, index: int, held: list[tuple[int, Raw]]) -> Shard:
        return Shard(index, lambda: [self._row(number, raw) for number, raw in held])

    def _row(self, number: int, raw: Raw) -> PoolRow:
        cells = raw.parse()
        row = TableRow(raw.place, cells)
        prompt = self._text(row, "prompt")
        column = self._name(row, "prompt") or ""
        prompt = context_choice(tuple(cells), column).with_background(prompt, row)
        response = self._text(row, "response")
        own = cells.get(OWN)
        drawn = own.get("thinking") if isinstance(own, dict) else None
        found = self._cell(row, "thinking")
        split = split_thought(response)
        given = _text(drawn) or _text(found)
        return PoolRow(
            row=number,
            place=raw.place,
            prompt=prompt,
            thinking=given or split.thinking,
            response=split.answer,
            category=_shown(self._cell(row, "category")),
            cells=cells,
            broken=_fault(given or split.thinking, given, split),
        )

    def _name(self, row: TableRow, field: str) -> str | None:
        if field in self._columns:
            return self._columns[field]
        return next((name for name in FIELDS[field] if name in row.cells), None)

    def _cell(self, row: TableRow, field: str) -> Any:
        return row.cells.get(self._name(row, field) or "")

    def _text(self, row: TableRow, field: str) -> str:
        name, value = self._name(row, field), self._cell(row, field)
        if (text := _text(value)) is not None:
            return text
        known = ", ".join(FIELDS[field])
        raise PromptFileError(
            f"a text `{name or field}` in every row of `{self.source}`",
            f"{type(value).__name__ if name else 'no such field'} at {row.place} "
            f"(fields: {', '.join(map(str, row.cells))})",
            f"Name the field with --column {field}=NAME; known are {known}.",
        )


class Split(NamedTuple):
    """Thinking and answer of a text, or what is wrong with its thinking."""

    thinking: str | None
    answer: str
    broken: str | None = None


def split_thought(text: str) -> Split:
    """Cut an answer at the end of the thinking inside it.

    A closing tag ends a thinking where the text begins with the opening one, or where
    it has a line of its own, as models write it whose template opens the thinking. A
    text that speaks of tags is no thinking.

    Returns: The thinking, None where there is none, and the answer.
    """
    for fmt in _FORMATS:
        opens = text.lstrip().startswith(fmt.open)
        if opens and fmt.close not in text:
            return Split(None, text, UNENDED)
        if opens or _own_line(fmt.close).search(text):
            found = split_completion(text, fmt)
            answer = _unmarked(found.answer.strip())
            return Split(found.thinking.strip("\n") or None, answer)
    return Split(None, text)


def _unmarked(answer: str) -> str:
    """Return an answer without the marks that some models write around it."""
    for marks in ANSWERS:
        begin, end = marks.begin.strip(), marks.end.strip()
        if answer.startswith(begin) and answer.endswith(end):
            return answer.removeprefix(begin).removesuffix(end).strip()
    return answer


def _own_line(tag: str) -> re.Pattern[str]:
    return re.compile(rf"^[ \t]*{re.escape(tag)}[ \t]*$", re.MULTILINE)


def _fault(thinking: str | None, given: str | None, split: Split) -> str | None:
    """Return what is wrong with a row after the split; None where all is right."""
    if split.broken is not None:
        return split.broken
    if given is not None and split.thinking is not None:
        return TWO_THOUGHTS
    if not split.answer.strip():
        return NO_ANSWER
    for fmt in _FORMATS:
        for tag in (fmt.open, fmt.close):
            if tag in (thinking or ""):
                return TAGS_INSIDE_THINKING
            if tag in split.answer:
                return TAGS_INSIDE_ANSWER
    return None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _shown(value: Any) -> str | None:
    if isinstance(value, list):
        return ", ".join(str(each) for each in value) or None
    return None if value in (None, "") else str(value)


def _files(source: str) -> tuple[Path, ...]:
    path = Path(source).expanduser()
    if path.is_dir():
        kinds = (".parquet", ".jsonl", ".ndjson")
        files = tuple(
            sorted(each for each in path.iterdir() if each.suffix.lower() in kinds)
        )
        if files:
            return files
        raise PromptFileError(
            f"Parquet or JSONL files in the folder `{path}`",
            "none",
            "Name a folder that holds the pool, or one file.",
        )
    if not path.is_file():
        raise PromptFileError(
            f"a pool at `{source}`",
            "no such file or folder",
            "Check the path. A Hub dataset is downloaded first: "
            "`hf download --repo-type dataset`.",
        )
    return (path,)


NO_THINKING, TOO_LONG = "no thinking", "over the context"


class Rendered(NamedTuple):
    """A row as tokens, or the reason why it is left out."""

    conversation: Conversation | None
    kind: str | None = None
    reason: str | None = None


def render_row(
    row: PoolRow,
    tokenizer: ChatTokenizer,
    form: ThinkingFormat | None,
    limit: int,
    system_prompt: str | None,
) -> Rendered:
    """Return a row as tokens, or why it is left out.

    A row without thinking is left out where the model thinks: its template would
    stand after nothing. So is one whose thinking is broken, in any model. The
    thinking of a row is left off where the model does not think.

    `form`: The model's thinking format; None if it does not think.
    """
    thinking = row.thinking
    if row.broken is not None:
        return Rendered(None, row.broken, "the row's thinking is broken")
    if form is None:
        thinking = ""
    elif thinking is None:
        return Rendered(None, NO_THINKING, "the row has no thinking")
    made = build_conversation(
        tokenizer,
        row.prompt,
        thinking,
        row.response,
        form,
        system_prompt,
    )
    n = len(made.token_ids)
    if n > limit:
        reason = f"{n} tokens, over the context of {limit}"
        return Rendered(None, TOO_LONG, reason)
    return Rendered(made)
