"""What was found out about files and models, kept for the next start.

Hashing, looking for numbers that are none, and proving read every weight, and take
most of a start. Nothing of that changes while files, code and machine stay the same.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import constants

from holdfast.errors import InputError, StorageError
from holdfast.study.files import atomic_write_text, canonical_json, fingerprint

T = TypeVar("T")
PLACE = "HOLDFAST_CACHE"
"""Variable that names another folder for what is kept; empty to keep nothing."""
SETTLED_NS = 2_000_000_000
"""Age of a file from which on a further change is sure to have another time."""
_FORMAT = "holdfast-kept/1"
_LIBRARIES = (
    *("torch", "transformers", "accelerate", "kernels", "flash-attn", "peft", "gguf"),
    *("bitsandbytes", "compressed-tensors", "torchao"),
)


def cache_directory() -> Path | None:
    """Return where things are kept: beside the Hub's cache, or where `PLACE` says."""
    named = os.environ.get(PLACE)
    if named is None:
        return Path(constants.HF_HOME) / "holdfast"
    return Path(named).expanduser().absolute() if named else None


def kept(
    kind: str,
    key: Mapping[str, Any],
    compute: Callable[[], T],
    *,
    read: Callable[[Any], T] = lambda value: value,
    files: Sequence[Path] = (),
) -> T:
    """Return what was computed for this key before, or compute it and keep it.

    A record that is damaged, of another key or not ours is passed by and written anew.
    Where nothing can be written, everything is computed as if nothing were kept.

    `kind`: Folder of such records.
    `key`: All that the value depends on, as JSON, beside `files`.
    `compute`: Returns something that JSON holds; what it raises is not kept.
    `read`: Turns what JSON gave back into a value; ValueError or TypeError if it is
        none.
    `files`: Files that the value was read from. They count as unchanged while path,
        size, inode and both times of each, of contents and of inode, are the same, as
        git does it. Whoever sets the first time back by hand moves the second. A file
        younger than two seconds is not trusted: one more change within the same tick
        of the file system's clock would not show.
    """
    folder = cache_directory()
    stamps = _stamps(files)
    if folder is None or stamps is None:
        return compute()
    whole = {**key, "files": stamps}
    path = folder / kind / f"{fingerprint(whole)}.json"
    try:
        return read(_value(path, whole))
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        value = compute()
    if _stamps(files) == stamps:
        record = {"format": _FORMAT, "key": whole, "value": value}
        text = json.dumps(record | {"sha256": fingerprint(record)})
        try:
            atomic_write_text(path, text)
        except (StorageError, InputError):
            pass  # It costs the next start some seconds, and is no fault of this one.
    return value


def _value(path: Path, key: Mapping[str, Any]) -> Any:
    """Return the value of a record; one of several errors if it is none of this key."""
    record = json.loads(path.read_text(encoding="utf-8"))
    signed = record.pop("sha256")
    if record["format"] != _FORMAT or fingerprint(record) != signed:
        raise ValueError("a record that was changed, or is not ours")
    if canonical_json(record["key"]) != canonical_json(key):
        raise ValueError("a record of another key")
    return record["value"]


def _stamps(files: Sequence[Path]) -> list[list[Any]] | None:
    """Return what tells files from changed ones; None if they are still too young."""
    found: list[list[Any]] = []
    for file in files:
        seen = file.stat()
        if max(seen.st_mtime_ns, seen.st_ctime_ns) > time.time_ns() - SETTLED_NS:
            return None
        times = [seen.st_mtime_ns, seen.st_ctime_ns]
        found.append([str(file.resolve()), seen.st_size, seen.st_ino, *times])
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the result of a computation depends on beside the model itself."""
    on_cuda = device.type == "cuda"
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "code": _code(),
        "versions": versions(),
        "device": torch.cuda.get_device_name(device) if on_cuda else device.type,
        "processor": [platform.machine(), capability],
        "float32": torch.get_float32_matmul_precision(),
        # Another number of threads may add the same numbers in another order.
        "threads": torch.get_num_threads(),
    }


@cache
def _code() -> str:
    """Return the SHA-256 of our own source of models, tables included."""
    digest = sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*")):
        if path.suffix in {".py", ".json", ".toml"}:
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def versions() -> Mapping[str, str | None]:
    """Return the versions of the libraries that read and run models; None if absent."""
    return {name: _version(name) for name in _LIBRARIES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
