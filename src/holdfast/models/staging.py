"""Model directories that are whole or not there."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from holdfast.errors import InputError, ModelError, StorageError
from holdfast.study import require_place, storing


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """Make a directory beside its final place; it moves there when all ended well.

    When the context ends with an error, nothing is left.

    Args:
        directory: Where it shall lie; it must not exist, or be empty.

    Yields:
        The directory in its temporary place.

    Raises:
        InputError: If the directory has something in it.
        ModelError: If transformers will not write the model's own settings.
        StorageError: If the disk is full or not ours to write.
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
    """Refuse a directory with something in it.

    Raises:
        InputError: If it is a file, or not empty.
    """
    require_place(directory, folder=True)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(
            f"a new directory, or an empty one, at {directory}",
            "one with something in it" if directory.is_dir() else "a file",
            "Choose another place; nothing is overwritten.",
        )


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn what goes wrong while a model is written into errors that say what to do.

    Args:
        directory: Where it shall lie, for the message.

    Raises:
        ModelError: If transformers will not write the model's own settings.
        StorageError: If the disk is full or not ours to write.
    """
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
    # Windows opens no folder for flushing.
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
