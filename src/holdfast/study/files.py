"""Files and directories that are whole or not there, and claims on them."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from holdfast.errors import InputError, ModelError, StorageError

STORAGE_PROBLEMS = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "a read-only file system",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.EIO: "an input/output error of the disk",
}
MISPLACED = {
    errno.ENOTDIR: "a file on the way to it, where a folder would have to be",
    errno.EEXIST: "a file on the way to it, where a folder would have to be",
    errno.EISDIR: "a folder of that name",
    errno.ENAMETOOLONG: "a name that is too long for the file system",
    errno.ELOOP: "a link that leads in circles",
}


class DamagedTableError(ValueError):
    """A Parquet file that is cut off, empty, or something else; says what is wrong."""


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, dataclasses open."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), default=_open_dataclass
    )


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's contents, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn the disk's own errors into one that says what to do."""
    try:
        yield
    except OSError as error:
        # Libraries raise this type for faults of their own, and give no number.
        if error.errno is None:
            raise
        if error.errno in MISPLACED:
            raise _misplaced(path, MISPLACED[error.errno]) from error
        found = STORAGE_PROBLEMS.get(error.errno, str(error.strerror))
        raise StorageError(
            f"room and permission to write {path}",
            found,
            "Free some space or make the study writable, then run the same command "
            "again: what was computed is kept.",
        ) from error


def require_place(path: Path, *, folder: bool, flag: str = "-o") -> None:
    """Refuse, before any work is done, a place where nothing can be written.

    `folder`: Whether it is a folder, and not a file.
    """
    path = path.expanduser().absolute()
    with storing(path):
        above = next(each for each in path.parents if _is_there(each))
        if not above.is_dir():
            found = f"{above} on the way to it, which is no folder"
            raise _misplaced(path, found, flag)
        # A name that no file system takes is an error to look for.
        is_folder = path.exists() and path.is_dir()
    if is_folder and not folder:
        raise _misplaced(path, MISPLACED[errno.EISDIR], flag)


def _is_there(path: Path) -> bool:
    """Return whether a path leads to something, a broken link included."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _misplaced(path: Path, found: str, flag: str | None = None) -> InputError:
    named = "" if flag is None else f" with {flag}"
    return InputError(
        f"a place to write to at {path}", found, f"Choose another place{named}."
    )


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file, and tell a damaged one from a disk that will not do.

    `columns`: The columns to read; all by default.
    """
    with storing(path):
        try:
            return pq.read_table(path, columns=None if columns is None else [*columns])
        except (pa.ArrowException, ValueError, OSError) as error:
            # Arrow's faults of a file have the type of those of a disk, but no number.
            if getattr(error, "errno", None) is not None:
                raise
            raise DamagedTableError(str(error).splitlines()[0]) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name only when it is whole.

    The bytes go to a temporary file beside it, which is flushed to the disk and
    then renamed; the folder is flushed as well, so that the name survives a crash.

    `path`: Where the finished file shall lie; its folder is made if missing.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write bytes atomically (see `atomic_file`)."""
    with atomic_file(path) as handle:
        handle.write(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically (see `atomic_file`)."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; not-a-number is an error, never written."""
    text = json.dumps(
        value, indent=2, ensure_ascii=False, allow_nan=False, default=_open_dataclass
    )
    atomic_write_text(path, text + "\n")


def atomic_write_table(path: Path, table: pa.Table) -> None:
    """Write an Arrow table as Parquet, atomically (see `atomic_file`)."""
    with atomic_file(path) as handle:
        pq.write_table(table, handle)


def _open_dataclass(value: Any) -> Any:
    """Let `json` see into dataclasses and paths."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in a manifest")


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """Make a directory beside its final place; it moves there when all ended well.

    When the context ends with an error, nothing is left.

    `directory`: Where it shall lie; it must not exist, or be empty.
    """
    directory = directory.expanduser().absolute()
    require_empty(directory)
    staged = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        with writing(directory):
            staged.mkdir(parents=True)
        yield staged
        with writing(directory):
            for path in (*staged.rglob("*"), staged):
                _flush(path)
            staged.replace(directory)
            _flush(directory.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def require_empty(directory: Path) -> None:
    """Refuse a directory with something in it."""
    require_place(directory, folder=True)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(
            f"a new directory, or an empty one, at {directory}",
            "one with something in it" if directory.is_dir() else "a file",
            "Choose another place; nothing is overwritten.",
        )


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn what goes wrong while a model is written into errors that say what to do."""
    from safetensors import SafetensorError

    try:
        with storing(directory):
            yield
    except SafetensorError as error:
        raise StorageError(
            f"room and permission to write weights to {directory}",
            str(error),
            "Free some space or choose another place, then run the command again.",
        ) from error
    except ValueError as error:
        raise ModelError(
            "a configuration that transformers will write as it is",
            str(error).splitlines()[0],
            "Repair the model's generation_config.json, then run the command again.",
        ) from error


def _flush(path: Path) -> None:
    """Flush a file, or a folder where the system lets one be opened."""
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextmanager
def claim(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Claim a piece of work; the claim goes with the process, however it ends.

    Whoever claims it looks again whether it is done: another process may have
    finished it in between. Where the system or the file system knows no locks every
    claim is granted, and work may be done twice; what it writes is whole either way.

    `path`: A lock file of this piece of work; its folder is made if missing.
    """
    if sys.platform == "win32":
        yield True
        return
    handle = _locked(path, wait)
    if handle is None:
        yield False
        return
    with handle:
        yield True
        path.unlink(missing_ok=True)


def _locked(path: Path, wait: bool) -> IO[bytes] | None:
    """Return the lock file, open and ours; None if another process holds it."""
    while True:
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("wb")
        if not try_lock(handle, wait=wait):
            handle.close()
            return None
        if _is_at(path, handle):
            return handle
        # Its last holder took it away between our opening and locking it.
        handle.close()


def try_lock(handle: IO[bytes], *, wait: bool = False) -> bool:
    """Take the lock of an open file, if nobody else has it."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return error.errno not in HELD
    return True


def _is_at(path: Path, handle: IO[bytes]) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False
