"""Benchmark suites by name, from files on disk or from the Hub, pinned.

The table `suites.json` holds what is known of each. A revision or a checksum that was
not seen by at least two independent readers of the bytes is not in it: such a suite
is read from a file of yours, or at a revision that you name.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from holdfast.data.columns import Choice, choose_column
from holdfast.data.items import KINDS, Item, Kind, SuiteFile, label_of
from holdfast.data.prompts import Prompt, prompt_id, read_prompts
from holdfast.data.readers import Row
from holdfast.data.sources import Content, load
from holdfast.errors import InputError, PromptFileError, SettingsError

FOLDER: Final = "HOLDFAST_BENCHMARKS"
CONTEXT_RULE: Final = "\n\n---\n\n"
ASK_FOR_NUMBER: Final = (
    "Work it out step by step. End with one line that holds #### and the final"
    " number, without units."
)
_TOPICS: Final = ("topic", "category", "semanticcategory", "type")


@dataclass(frozen=True)
class Suite:
    """What is known of a suite.

    Attributes:
        name: Its name on the command line.
        about: What it is, in a few words.
        licence: Its licence.
        kind: Kind of its rows, unless `kinds` says otherwise.
        column: Column of the prompts.
        files: Names that its file is known by.
        hub: Hub dataset, with the file after a colon.
        revision: Pinned commit; "" where none could be verified.
        sha256: Checksums of the known forms of its file; empty where none is known.
        gated: Whether the Hub asks for consent first.
        only: Column and its values; other rows are left out.
        kinds: Column that tells the kind, and its values.
        context: Column of the text a request refers to; "" for none.
        target: Column of the exact answer; "" for none.
        note: What a reader has to know.
    """

    name: str
    about: str
    licence: str
    kind: Kind
    column: str
    files: tuple[str, ...]
    hub: str
    sha256: tuple[str, ...]
    revision: str = ""
    gated: bool = False
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kinds: Mapping[str, Any] = field(default_factory=dict)
    context: str = ""
    target: str = ""
    note: str = ""


@cache
def suites() -> dict[str, Suite]:
    """Return every suite that has a name, in the order of the table."""
    text = files("holdfast.data").joinpath("suites.json").read_text("utf-8")
    made = {}
    for entry in json.loads(text)["suites"]:
        for key in ("files", "sha256"):
            entry[key] = tuple(entry[key])
        only = entry.pop("only", {})
        entry["only"] = {column: tuple(values) for column, values in only.items()}
        made[entry["name"]] = Suite(**entry)
    return made


def read_suite(
    source: str, *, column: str | None = None, revision: str | None = None
) -> SuiteFile:
    """Read a suite: by name, from a file in its shape, or from a file of one's own.

    Args:
        source: A name; NAME=FILE for a file in the shape of that suite; KIND=FILE or
            a bare file (harmful unless its column `label` says otherwise); or
            hub:owner/name in place of a file.
        column: Column of the prompts, in place of the suite's own.
        revision: Revision on the Hub, in place of the pinned one.

    Returns:
        Items, and the record of where they come from.

    Raises:
        SettingsError: If there is no such suite; lists those there are.
        InputError: If a file is not the pinned one, or nothing is pinned and no
            revision was named.
        PromptFileError: If a file cannot be read.
        OfflineError: If the Hub cannot be reached.
    """
    name, equals, place = source.partition("=")
    if equals and name in suites():
        content = load(place, revision)
        note = "A file of your own in the shape of the suite; no checksum was asked."
        return items_of(suites()[name], content, column, note)
    if equals and name in KINDS and name != "utility":
        return _own(name, place, column, revision)
    if source in suites():
        return _pinned(suites()[source], column, revision)
    if equals or not _is_place(source):
        raise _unknown(source)
    return _own("harmful", source, column, revision)


def _is_place(source: str) -> bool:
    path = Path(source).expanduser()
    return source.startswith("hub:") or path.suffix != "" or path.exists()


def _unknown(source: str) -> SettingsError:
    known = ", ".join(["authored", *suites()])
    return SettingsError(
        f"a suite of {known}",
        f"`{source}`",
        "Choose one of them, or write FILE, NAME=FILE or KIND=FILE with a kind of "
        f"{', '.join(kind for kind in KINDS if kind != 'utility')}.",
    )


def _own(kind: str, place: str, column: str | None, revision: str | None) -> SuiteFile:
    """Read a file of the user's own, with the columns that every prompt file has."""
    chosen: Kind = next(each for each in KINDS if each == kind)
    file = read_prompts(place, label=label_of(chosen), column=column, revision=revision)
    items = tuple(
        Item(
            file.source,
            chosen if prompt.label == label_of(chosen) else _other(prompt.label),
            prompt,
            prompt.text,
        )
        for prompt in file.prompts
    )
    record = {
        "suite": file.source,
        "source": file.source,
        "column": file.column,
        "rows": file.n_rows,
        "duplicates": file.n_duplicates,
        "sha256": file.sha256,
        "notes": list(file.notes),
    }
    return SuiteFile(items, record)


def _other(label: str) -> Kind:
    return "harmful" if label == "harmful" else "benign"


def _pinned(suite: Suite, column: str | None, revision: str | None) -> SuiteFile:
    """Read a suite by name: from the folder of benchmarks, else from the Hub."""
    folder = os.environ.get(FOLDER)
    found = _on_disk(suite, Path(folder).expanduser()) if folder else None
    if found is not None:
        content = load(str(found), None)
        _check(suite, content, f"`{found}`", f"--suite {suite.name}={found}")
        return items_of(
            suite, content, column, f"Read from `{found.name}` in {FOLDER}."
        )
    commit = revision or suite.revision
    if not commit:
        raise InputError(
            f"a file of the suite `{suite.name}`, or the revision to read it at",
            f"no {' or '.join(suite.files)} in {folder or FOLDER + ', which is unset'}"
            f", and no revision of {suite.hub} that could be verified",
            f"Put the file there, give --suite {suite.name}=FILE, or name a commit "
            f"with --data-revision {suite.name}=COMMIT.",
        )
    content = load(f"hub:{suite.hub}", commit)
    if revision in (None, suite.revision):
        _check(suite, content, f"`{suite.hub}` at {commit}", "--data-revision")
    return items_of(suite, content, column, f"Read from `{suite.hub}` at {commit}.")


def _on_disk(suite: Suite, folder: Path) -> Path | None:
    names = [*suite.files, f"{suite.name}.csv", f"{suite.name}.jsonl"]
    places = [folder / suite.name / name for name in names]
    # Names such as test.jsonl say nothing outside of a folder of the suite's own.
    places += [folder / name for name in names if name not in {"test.jsonl"}]
    return next((place for place in places if place.is_file()), None)


def _check(suite: Suite, content: Content, where: str, otherwise: str) -> None:
    """Refuse bytes that are not the pinned ones; what is not pinned passes."""
    if suite.sha256 and content.sha256 not in suite.sha256:
        raise InputError(
            f"the suite `{suite.name}` with SHA-256 "
            f"{' or '.join(each[:12] + '…' for each in suite.sha256)}",
            f"{content.sha256[:12]}… at {where}",
            "It was changed or is another version. Fetch it again, or read it as it "
            f"is with {otherwise}: its hash goes into the record.",
        )


def items_of(
    suite: Suite, content: Content, column: str | None, note: str
) -> SuiteFile:
    """Return the items of a file in the shape of a suite, and its record."""
    table = content.table
    choice = choose_column(table, column or suite.column or None, content.name)
    rows = [row for row in table.rows if _wanted(suite, row, content.name)]
    seen: dict[str, Item] = {}
    for row in rows:
        item = _item(suite, row, choice, content.name)
        seen.setdefault(item.prompt.prompt_id, item)
    if not seen:
        raise PromptFileError(
            f"rows of the suite `{suite.name}` in `{content.name}`",
            f"none of {len(table.rows)} that fits",
            "Check that it is the file of this suite.",
        )
    notes = [note, *content.notes, *choice.notes]
    if suite.note:
        notes.append(suite.note)
    if len(rows) < len(table.rows):
        notes.append(f"{len(table.rows) - len(rows)} rows of other parts left out.")
    if not suite.sha256:
        notes.append("No checksum of this suite is known; the hash is recorded.")
    record = {
        "suite": suite.name,
        "source": content.name,
        "column": choice.column,
        "rows": len(rows),
        "duplicates": len(rows) - len(seen),
        "sha256": content.sha256,
        "notes": notes,
    }
    return SuiteFile(tuple(seen.values()), record)


def _wanted(suite: Suite, row: Row, name: str) -> bool:
    for column, values in suite.only.items():
        if _cell(row, column, name) not in values:
            return False
    return True


def _item(suite: Suite, row: Row, choice: Choice, name: str) -> Item:
    request = choice.text(row, name)
    kind = suite.kind
    if suite.kinds:
        said = _cell(row, suite.kinds["column"], name)
        known = suite.kinds["values"]
        if said not in known:
            raise PromptFileError(
                f"`{suite.kinds['column']}` of {', '.join(known)} in `{name}`",
                f"`{said}` at {row.place}",
                "Check that it is the file of this suite.",
            )
        kind = known[said]
    if not request.strip():
        raise PromptFileError(
            f"a prompt in every row of `{name}`", f"none at {row.place}", "Fill it in."
        )
    context = _cell(row, suite.context, name) if suite.context else None
    text = f"{context}{CONTEXT_RULE}{request}" if context else request
    target = _cell(row, suite.target, name) if suite.target else None
    if target is not None:
        text = f"{text}\n\n{ASK_FOR_NUMBER}"
    folded = {key.casefold(): value for key, value in row.cells.items()}
    topic = next((str(folded[key]) for key in _TOPICS if folded.get(key)), None)
    prompt = Prompt(
        prompt_id=prompt_id(text),
        request_id=prompt_id(text),
        text=text,
        label=label_of(kind),
        source=suite.name,
        wrapper=None,
        topic=topic,
    )
    return Item(suite.name, kind, prompt, request, context or None, target)


def _cell(row: Row, column: str, name: str) -> str:
    folded = {key.strip().casefold(): value for key, value in row.cells.items()}
    if column.casefold() not in folded:
        raise PromptFileError(
            f"a column `{column}` in `{name}`",
            ", ".join(f"`{key}`" for key in row.cells) or "no columns",
            "Check that it is the file of this suite.",
        )
    value = folded[column.casefold()]
    return "" if value is None else str(value).strip()
