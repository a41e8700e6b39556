"""Completions that were made elsewhere, say by a serving engine."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from holdfast.data.chat.thinking import ThinkingFormat
from holdfast.data.columns import choose_column
from holdfast.data.harm_labels import label_columns
from holdfast.data.prompts import Prompt, is_bare, placed_prompts
from holdfast.data.served import Served, served
from holdfast.data.sources import Content, load
from holdfast.data.tables import Table, TableRow
from holdfast.engines.serving.replies import Understood, has_tags, understood
from holdfast.errors import InputError, PromptFileError, ThinkingFormatError
from holdfast.rollout.prompts import UNNAMED_WRAPPER, place_of, some_of
from holdfast.rollout.questions import Question
from holdfast.rollout.rows import Turn

Bare = Literal["ask", "answer", "thinking"]
WARNING = "warning: "
_SYSTEM = ("system", "developer")


class Imported(NamedTuple):
    """One completion and the prompt it answers."""

    prompt: Prompt  # The prompt.
    role: str  # `harmful`, `wrapped`, `benign` or `benign_wrapped`.
    sample: int  # Which answer to this prompt, counted from 0.
    served: Served  # What was sent.
    place: str  # Where it stands in its file.
    # The turns before, with what the model answered to them.
    earlier: tuple[Turn, ...] = ()


class ImportedFile(NamedTuple):
    """The completions of a file, and what has to be known of it."""

    rows: tuple[Imported, ...]  # Rows with an answer, in their order.
    source: str  # Name of the file.
    column: str | None  # The column of the prompts.
    sha256: str  # Hash of the bytes of the file, and of the requests where apart.
    # Sentences to show to the user; a doubt starts with "warning:".
    notes: tuple[str, ...]


def read_completions(
    path: str,
    requests: str | None = None,
    *,
    accept: bool = False,
    system_prompt: str | None = None,
) -> ImportedFile:
    """Read completions from a JSONL file (or any other table).

    Prompts, labels, wrappers and clusters are read as in every prompt file. The answer
    is a column `completion`, or what an OpenAI-shaped server sent: a message, choices,
    or the line of a batch. Lines that failed are left out and counted.

    `requests`: The requests of a batch, whose lines name them by `custom_id`.
    `system_prompt`: System prompt of the run, which messages may state as well.
    """
    content = load(path, None)
    sha256, name = content.sha256, content.name
    if requests is not None:
        asked = load(requests, None)
        content = _joined(content, asked)
        sha256 = hashlib.sha256(f"{sha256}{asked.sha256}".encode()).hexdigest()
    _require_prompts(content, requests)
    content = _without_system(content, system_prompt)
    choice = choose_column(content.table, None, name, attacked=True, accept=accept)
    prompts = placed_prompts(content, choice, "harmful")
    rows, failed = [], []
    seen: Counter[str] = Counter()
    for prompt, row in prompts.rows:
        prompt = _named(prompt)
        role = place_of("harmful", prompt)
        key = f"{role}/{prompt.prompt_id}"
        for sent in served(row, name):
            if sent.failure is not None:
                failed.append(f"{row.place} ({sent.failure})")
                continue
            earlier = _earlier(prompt, choice.replies(row), row, name)
            rows.append(Imported(prompt, role, seen[key], sent, row.place, earlier))
            seen[key] += 1
    if not rows:
        raise PromptFileError(
            f"completions in `{name}`",
            f"none: every line failed, such as {failed[0]}",
            "Ask these prompts again.",
        )
    notes = [*content.notes, *prompts.notes]
    if not label_columns(content.table, name):
        notes.append(f"No column is a label of harm: all {len(rows)} rows are harmful.")
    if failed:
        notes.append(
            f"{WARNING}{len(failed)} of {len(rows) + len(failed)} answers failed and "
            f"were left out: {some_of(failed)}."
        )
    return ImportedFile(tuple(rows), name, choice.column, sha256, tuple(notes))


def is_own_batch(path: str, requests: str | None) -> bool:
    """Return whether a file holds the answers to a batch that `rollout` has written."""
    columns = set(load(path, None).table.columns) if requests is None else set()
    return "custom_id" in columns and not {"prompt", "messages"} & columns


def read_batch(path: str, questions: Sequence[Question]) -> ImportedFile:
    """Read the answers to a batch of this run's questions, in whatever order they come.

    Lines that failed, and questions without a line, are left out and named.

    Raises:
        PromptFileError: If a line answers none of the questions, or two the same.
    """
    content = load(path, None)
    asked = {each.row_id: each for each in questions}
    found: dict[str, Imported] = {}
    failed: list[str] = []
    for row in content.table.rows:
        key = str(row.cells.get("custom_id"))
        if key not in asked or key in found:
            raise PromptFileError(
                f"a `custom_id` of this run, once, in every row of `{content.name}`",
                f"`{key}` {'twice, again' if key in found else ''} at {row.place}",
                "Give the prompts, limits and seed that the batch was written with; of "
                "a batch of other requests give these with `--import-requests`.",
            )
        question, sent = asked[key], served(row, content.name)[0]
        if sent.failure is not None:
            failed.append(f"{key} at {row.place} ({sent.failure})")
            continue
        prompt, role = question.prompt, question.role
        found[key] = Imported(prompt, role, question.sample, sent, row.place)
    if not found:
        raise PromptFileError(
            f"answers in `{content.name}`",
            f"none: every line failed, such as {failed[0]}",
            "Ask these prompts again.",
        )
    silent = [key for key in asked if key not in found]
    notes = list(content.notes)
    if silent:
        notes.append(
            f"{WARNING}{len(silent)} of {len(asked)} questions have no answer in the "
            f"file and count in no rate: {some_of(failed or silent)}."
        )
    rows = tuple(found[key] for key in asked if key in found)
    return ImportedFile(rows, content.name, None, content.sha256, tuple(notes))


def understand(
    file: ImportedFile, thinking: ThinkingFormat | None, bare: Bare
) -> tuple[list[Understood], list[str]]:
    """Tell thinking from answer in every row of a file.

    `thinking`: Thinking format of the model, None for one that does not think.
    `bare`: What a row is that has neither thinking nor a tag: an answer whose thinking
    was not kept, or thinking that was cut off. `ask` refuses where the rest of the file
    does not tell.
    Returns: One for each row, and what to say of where the thinking was read.
    """
    fields = Counter(row.served.field for row in file.rows if row.served.reasoning)
    if thinking is None:
        if fields:
            raise ThinkingFormatError(
                "a model that thinks, as the rows of the file do",
                f"`{next(iter(fields))}` in {sum(fields.values())} rows, and no "
                "thinking format in the chat template",
                "Name the model that wrote them, or leave that field out.",
            )
        return _all(file, None, bare_answers=True), []
    inline = sum(has_tags(row.served, thinking) for row in file.rows)
    unclear = [
        row
        for row in file.rows
        if not row.served.reasoning and not has_tags(row.served, thinking)
    ]
    bare_is = _resolve(file, unclear, inline, bool(fields), bare)
    made = _all(file, thinking, bare_answers=bare_is)
    n = len(file.rows)
    notes = [
        f"Thinking was read from `{field}` in {count} of {n} rows."
        for field, count in fields.items()
    ]
    if inline:
        notes.append(f"Thinking was read from between tags in {inline} of {n} rows.")
    if unclear:
        what = "answers without thinking" if bare_is else "thinking that never ended"
        notes.append(f"{len(unclear)} of {n} rows without tags were read as {what}.")
    return made, notes


def _all(
    file: ImportedFile, thinking: ThinkingFormat | None, *, bare_answers: bool
) -> list[Understood]:
    return [
        understood(each.served, thinking, bare_answers=bare_answers, place=each.place)
        for each in file.rows
    ]


def _resolve(
    file: ImportedFile,
    unclear: Sequence[Imported],
    inline: int,
    has_fields: bool,
    bare: Bare,
) -> bool:
    """Return whether rows with neither thinking nor tags are answers, or refuse."""
    if bare != "ask" or not unclear:
        return bare != "thinking"
    if not has_fields and inline > len(unclear):
        # Without a parser everything is in the text, and theirs never got to a tag.
        return False
    if has_fields and all(row.served.finish == "stop" for row in unclear):
        return True
    raise InputError(
        f"thinking in the rows of `{file.source}`, since the model thinks",
        f"{len(unclear)} of {len(file.rows)} rows with neither thinking nor its tags, "
        f"the first at {unclear[0].place}",
        "Say what they are: `--import-bare answer` for answers whose thinking was not "
        "kept, `--import-bare thinking` for thinking that was cut off.",
    )


def _named(prompt: Prompt) -> Prompt:
    """Return a prompt with a name for its wrapper, if it has one without."""
    behind = prompt.request
    if prompt.wrapper is not None or not behind:
        return prompt
    bare = is_bare(prompt.said, behind)
    return prompt if bare else replace(prompt, wrapper=UNNAMED_WRAPPER)


def _earlier(
    prompt: Prompt, replies: Sequence[str], row: TableRow, name: str
) -> tuple[Turn, ...]:
    """Return the turns before the last, which is answered by the completion."""
    if len(replies) != len(prompt.earlier):
        raise PromptFileError(
            f"an answer of the model to each turn but the last in `{name}`",
            f"{len(prompt.earlier) + 1} turns of the user and {len(replies)} of the "
            f"model at {row.place}",
            "Write the whole conversation as messages, with the roles user and "
            "assistant in turn; the last answer is the completion.",
        )
    return tuple(
        Turn(said, "", answer, "stop")
        for said, answer in zip(prompt.earlier, replies, strict=True)
    )


def _without_system(content: Content, system_prompt: str | None) -> Content:
    """Leave the system prompt out of messages; it has to be that of the run."""

    def kept(value: Any, row: TableRow) -> Any:
        first = value[0] if isinstance(value, list) and value else None
        if not isinstance(first, dict) or first.get("role") not in _SYSTEM:
            return value
        if first.get("content") != system_prompt:
            raise PromptFileError(
                f"the run's system prompt in the messages of `{content.name}`",
                f"{str(first.get('content'))[:60]!r} at {row.place}",
                "Give it by --system-prompt; each has to be imported apart.",
            )
        return value[1:]

    rows = tuple(
        TableRow(row.place, {key: kept(value, row) for key, value in row.cells.items()})
        for row in content.table.rows
    )
    return content._replace(table=Table(content.table.columns, rows))


def _joined(content: Content, asked: Content) -> Content:
    """Put what was asked beside what was answered, by `custom_id`."""
    known: dict[str, dict[str, Any]] = {}
    for row in asked.table.rows:
        key, cells = str(row.cells.get("custom_id")), dict(row.cells)
        body = cells.pop("body", None)
        if isinstance(body, Mapping):
            cells |= {
                name: body[name] for name in ("messages", "prompt") if name in body
            }
        if known.setdefault(key, cells) is not cells:
            raise PromptFileError(
                f"each `custom_id` once in `{asked.name}`",
                f"`{key}` twice, the second time at {row.place}",
                "Name each request by an id of its own.",
            )
    rows = []
    for row in content.table.rows:
        key = str(row.cells.get("custom_id"))
        if key not in known:
            raise PromptFileError(
                f"a `custom_id` of `{asked.name}` in every row of `{content.name}`",
                f"`{key}` at {row.place}",
                "Give the requests of this very batch.",
            )
        rows.append(TableRow(row.place, known[key] | row.cells))
    columns = dict.fromkeys(key for row in rows for key in row.cells)
    return content._replace(table=Table(tuple(columns), tuple(rows)))


def _require_prompts(content: Content, requests: str | None) -> None:
    columns = set(content.table.columns)
    if "custom_id" not in columns or {"prompt", "messages"} & columns:
        return
    if requests is not None:
        raise PromptFileError(
            f"`messages` or `prompt` in the `body` of every line of `{requests}`",
            "neither",
            "Give requests for chat completions, or write the prompts beside the "
            "answers.",
        )
    raise PromptFileError(
        f"prompts beside the answers of the batch `{content.name}`",
        "`custom_id` alone",
        "Give the file of its requests with `--import-requests`.",
    )
