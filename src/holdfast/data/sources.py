"""Where prompts come from: a path or a Hub dataset, read as a table."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple

from holdfast.data.tables import READERS, Table, TableRow, read_table, suffix
from holdfast.errors import PromptFileError

_HUB_PREFIX: Final = "hub:"
_SHOWN: Final = 5


def packaged(name: str) -> Any:
    """Return what a JSON file that comes with Holdfast holds."""
    return json.loads(files("holdfast.data").joinpath(name).read_text("utf-8"))


class Content(NamedTuple):
    """A short name, the rows, the hash of the bytes, and what to say of them."""

    name: str
    table: Table
    sha256: str
    notes: tuple[str, ...]


def load(source: str, revision: str | None) -> Content:
    """Read the table of a file or of a Hub dataset.

    `source`: Path of a file, or "hub:owner/name[:split]".
    """
    if not source.startswith(_HUB_PREFIX):
        return _load_path(source)
    # Imported here so that reading a local file needs no network library.
    from holdfast.data import hub

    fetched = hub.fetch(source, revision=revision)
    digest = hashlib.sha256()
    for _, data in fetched.files:
        digest.update(data)
    return Content(
        fetched.source,
        _join([(name, read_table(name, data)) for name, data in fetched.files]),
        digest.hexdigest(),
        (f"`{source}` was read at commit {fetched.commit}.", *fetched.notes),
    )


def _load_path(source: str) -> Content:
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            raise _folder(path)
        data = path.read_bytes() if suffix(path.name) in READERS else b""
        path.stat()
    except FileNotFoundError as error:
        is_id = source.count("/") == 1 and not suffix(source)
        hint = f" For a Hub dataset write `hub:{source}`." if is_id else ""
        raise PromptFileError(
            f"a prompt file at `{source}`",
            "no such file",
            f"Check the path; it counts from the folder you are in.{hint}",
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PromptFileError(
            f"a prompt file at `{source}` that can be read",
            reason,
            "Check the path and its permissions.",
        ) from error
    table = read_table(path.name, data)
    return Content(path.name, table, hashlib.sha256(data).hexdigest(), ())


def _folder(path: Path) -> PromptFileError:
    names = sorted(entry.name for entry in path.iterdir() if suffix(entry.name))
    fitting = [f"`{name}`" for name in names if suffix(name) in READERS][:_SHOWN]
    return PromptFileError(
        "a prompt file",
        f"the folder `{path}`",
        f"Name one file in it, such as {', '.join(fitting)}."
        if fitting
        else f"Give a file that ends in one of {', '.join(READERS)}.",
    )


def _join(tables: list[tuple[str, Table]]) -> Table:
    if len(tables) == 1:
        return tables[0][1]
    columns = dict.fromkeys(name for _, table in tables for name in table.columns)
    return Table(
        tuple(columns),
        tuple(
            TableRow(f"{name}, {row.place}", row.cells)
            for name, table in tables
            for row in table.rows
        ),
    )
