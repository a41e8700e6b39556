"""Claims: several processes share a list of work without doing any of it twice."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from holdfast.study.files import storing

HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextmanager
def claim(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Claim a piece of work; the claim goes with the process, however it ends.

    Whoever claims it looks again whether it is done: another process may have
    finished it in between. Where the system or the file system knows no locks every
    claim is granted, and work may be done twice; what it writes is whole either way.

    Args:
        path: A lock file of this piece of work; its folder is made if missing.
        wait: Whether to wait until it is free.

    Yields:
        Whether it is ours.

    Raises:
        StorageError: If the disk is full, read-only, or not ours to write.
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
        if not _lock(handle, wait):
            handle.close()
            return None
        if _is_at(path, handle):
            return handle
        # Its last holder took it away between our opening and locking it.
        handle.close()


def _lock(handle: IO[bytes], wait: bool) -> bool:
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
