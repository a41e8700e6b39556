"""Benchmark suites by name, from files on disk or from the Hub, pinned.

The table `suites.json` holds what is known of each. A revision or a checksum that was
not seen by at least two independent readers of the bytes is not in it: such a suite
is read from a file of yours, or at a revision that you name.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from holdfast.data.columns import Choice, choose_column
from holdfast.data.harm_labels import Label, cell_text, label_columns, read_labels
from holdfast.data.prompts import Placed, Prompt, placed_prompts, read_prompts, reworded
from holdfast.data.sources import Content, load, packaged
from holdfast.data.tables import Table, TableRow
from holdfast.errors import InputError, PromptFileError, SettingsError

Kind = Literal["harmful", "safe_lookalike", "benign", "utility"]
KINDS: tuple[Kind, ...] = ("harmful", "safe_lookalike", "benign", "utility")


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt of an evaluation."""

    suite: str  # The suite it comes from.
    # What its answer is counted for: attack success, over-refusal, plain helpfulness or
    # utility.
    kind: Kind
    prompt: Prompt  # What the model is asked; `wrapper` names the attack around it.
    request: str  # The request without its attack, as judges of harm are shown it.
    context: str | None = None  # A text the request refers to.
    target: str | None = None  # The exact answer, for utility.

    @property
    def name(self) -> str:
        """The name of the item within an evaluation."""
        wrapper = self.prompt.wrapper or "plain"
        return f"{self.suite}/{self.kind}/{wrapper}/{self.prompt.prompt_id}"

    def reworded(self, text: str, wrapper: str) -> "Item":
        """Return the item under an attack; request and cluster stay as they are."""
        return replace(self, prompt=reworded(self.prompt, text, wrapper))


@dataclass(frozen=True, slots=True)
class SuiteFile:
    """The items of one suite, and its record for the report."""

    items: tuple[Item, ...]  # Distinct items in the order of the file.
    record: dict[str, Any]  # Suite, source, column, rows, duplicates, sha256, notes.


def label_of(kind: Kind) -> Label:
    """Return the label of the prompts of a kind."""
    return "harmful" if kind == "harmful" else "benign"


FOLDER: Final = "HOLDFAST_BENCHMARKS"
ASK_FOR_NUMBER: Final = (
    "Work it out step by step. End with one line that holds #### and the final"
    " number, without units."
)
_TOPICS: Final = ("topic", "category", "semanticcategory", "type")


class Reading(NamedTuple):
    """How a source is read."""

    column: str | None = None  # Column of the prompts, in place of the suite's own.
    revision: str | None = None  # Revision on the Hub, in place of the pinned one.
    accept: bool = False  # Whether a column is read though its rows look like answers.
    first_turn: bool = False  # Whether of a conversation only its first turn is asked.


PLAINLY: Final = Reading()


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is known of a suite."""

    name: str  # Its name on the command line.
    about: str  # What it is, in a few words.
    kind: Kind  # Kind of its rows, unless `kinds` says otherwise.
    licence: str = ""  # Its licence.
    column: str = ""  # Column of the prompts; "" for the first of a known name.
    files: Sequence[str] = ()  # Names that its file is known by.
    hub: str = ""  # Hub dataset, with the file after a colon.
    # Checksums of the known forms of its file; empty where none is known.
    sha256: Sequence[str] = ()
    revision: str = ""  # Pinned commit; "" where none could be verified.
    gated: bool = False  # Whether the Hub asks for consent first.
    # Column and its values; other rows are left out.
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)
    # Column that tells the kind, and its values.
    kinds: Mapping[str, Any] = field(default_factory=dict)
    context: str = ""  # Column of the text a request refers to; "" for none.
    target: str = ""  # Column of the exact answer; "" for none.
    note: str = ""  # What a reader has to know.


@cache
def suites() -> dict[str, Suite]:
    """Return every suite that has a name, in the order of the table."""
    entries = packaged("suites.json")["suites"]
    return {entry["name"]: Suite(**entry) for entry in entries}


def read_suite(source: str, how: Reading = PLAINLY) -> SuiteFile:
    """Read a suite: by name, from a file in its shape, or from a file of one's own.

    `source`: A name; NAME=FILE for a file in the shape of that suite; KIND=FILE or a
    bare file (harmful unless its column `label` says otherwise); or hub:owner/name in
    place of a file.
    Returns: Items, and the record of where they come from.
    """
    name, equals, place = source.partition("=")
    if equals and name in suites():
        content = load(place, how.revision)
        note = "A file of your own in the shape of the suite; no checksum was asked."
        return items_of(suites()[name], content, how, note)
    if equals and name in KINDS and name != "utility":
        return _own(name, place, how, name)
    if source in suites():
        return _pinned(suites()[source], how)
    if equals or not _is_place(source):
        raise _unknown(source)
    return _own("harmful", source, how, source)


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


def _own(kind: str, place: str, how: Reading, role: str) -> SuiteFile:
    """Read a file of the user's own, with the columns that every prompt file has."""
    chosen: Kind = next(each for each in KINDS if each == kind)
    file = read_prompts(
        place,
        label=label_of(chosen),
        column=how.column,
        revision=how.revision,
        role=role,
        accept=how.accept,
        first_turn=how.first_turn,
    )
    items = tuple(
        Item(
            file.source,
            chosen if prompt.label == label_of(chosen) else prompt.label,
            prompt,
            prompt.request or prompt.said,
        )
        for prompt in file.prompts
    )
    return SuiteFile(items, {"suite": file.source} | file.record)


def _pinned(suite: Suite, how: Reading) -> SuiteFile:
    """Read a suite by name: from the folder of benchmarks, else from the Hub."""
    folder = os.environ.get(FOLDER)
    found = _on_disk(suite, Path(folder).expanduser()) if folder else None
    if found is not None:
        content = load(str(found), None)
        _check(suite, content, f"`{found}`", f"--suite {suite.name}={found}")
        return items_of(suite, content, how, f"Read from `{found.name}` in {FOLDER}.")
    commit = how.revision or suite.revision
    if not commit:
        raise InputError(
            f"a file of the suite `{suite.name}`, or the revision to read it at",
            f"no {' or '.join(suite.files)} in {folder or FOLDER + ', which is unset'}"
            f", and no revision of {suite.hub} that could be verified",
            f"Put the file there, give --suite {suite.name}=FILE, or name a commit "
            f"with --data-revision {suite.name}=COMMIT.",
        )
    content = load(f"hub:{suite.hub}", commit)
    if how.revision in (None, suite.revision):
        _check(suite, content, f"`{suite.hub}` at {commit}", "--data-revision")
    return items_of(suite, content, how, f"Read from `{suite.hub}` at {commit}.")


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


def items_of(suite: Suite, content: Content, how: Reading, note: str) -> SuiteFile:
    """Return the items of a file in the shape of a suite, and its record."""
    table = content.table
    choice = choose_column(
        table,
        how.column or suite.column or None,
        content.name,
        asked=how.column is not None,
        role=suite.name if suite.hub else None,
        accept=how.accept,
    )
    rows = tuple(row for row in table.rows if _wanted(suite, row, content.name))
    if not rows:
        raise PromptFileError(
            f"rows of the suite `{suite.name}` in `{content.name}`",
            f"none of {len(table.rows)} that fits",
            "Check that it is the file of this suite.",
        )
    kinds = _kinds(suite, Table(table.columns, rows), content.name)
    # The suite says what its rows are, whatever labels stand beside them.
    bare = tuple(column for column in table.columns if column == choice.column)
    found = placed_prompts(
        content._replace(table=Table(bare, rows)),
        choice,
        label_of(suite.kind),
        first_turn=how.first_turn,
    )
    seen: dict[str, Item] = {}
    for placed in found.rows:
        item = _item(suite, placed, kinds[placed.row.place], choice, content.name)
        seen.setdefault(item.prompt.prompt_id, item)
    notes = [note, *content.notes, *found.notes]
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
        "rows": len(found.rows),
        "duplicates": len(found.rows) - len(seen),
        "sha256": content.sha256,
        "notes": notes,
    }
    return SuiteFile(tuple(seen.values()), record)


def _wanted(suite: Suite, row: TableRow, name: str) -> bool:
    return all(_cell(row, key, name) in values for key, values in suite.only.items())


def _kinds(suite: Suite, table: Table, name: str) -> dict[str, Kind]:
    """Return the kind of every row, by its place."""
    if not suite.kinds:
        return {row.place: suite.kind for row in table.rows}
    column, known = suite.kinds["column"], suite.kinds["values"]
    folded = {each.strip().casefold() for each in table.columns}
    if column.casefold() not in folded and label_columns(table, name):
        # An older form of the file says it in another column.
        labels, _ = read_labels(table, label_of(suite.kind), name)
        safe = next(kind for kind in known.values() if kind != "harmful")
        return {
            row.place: "harmful" if label == "harmful" else safe
            for row, label in zip(table.rows, labels, strict=True)
        }
    kinds: dict[str, Kind] = {}
    for row in table.rows:
        said = _cell(row, column, name)
        if said not in known:
            raise PromptFileError(
                f"`{column}` of {', '.join(known)} in `{name}`",
                f"`{said}` at {row.place}",
                "Check that it is the file of this suite.",
            )
        kinds[row.place] = known[said]
    return kinds


def _item(suite: Suite, placed: Placed, kind: Kind, choice: Choice, name: str) -> Item:
    prompt, row = placed
    if suite.context:
        _cell(row, suite.context, name)
    bare = choice.turns(row, name)
    request = "\n\n".join(bare[:1] if not prompt.earlier else bare)
    target = _cell(row, suite.target, name) if suite.target else None
    if target is not None:
        prompt = reworded(prompt, f"{prompt.text}\n\n{ASK_FOR_NUMBER}")
    folded = row.folded
    topic = next((str(folded[key]) for key in _TOPICS if folded.get(key)), None)
    prompt = replace(
        prompt,
        request_id=prompt.prompt_id,
        label=label_of(kind),
        source=suite.name,
        wrapper=None,
        topic=topic,
    )
    return Item(suite.name, kind, prompt, request, choice.background(row), target)


def _cell(row: TableRow, column: str, name: str) -> str:
    if column.casefold() not in row.folded:
        raise PromptFileError(
            f"a column `{column}` in `{name}`",
            ", ".join(f"`{key}`" for key in row.cells) or "no columns",
            "Check that it is the file of this suite.",
        )
    return cell_text(row.folded[column.casefold()])
