"""Files of a checkpoint: configurations, and weights that are whole."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import InputError, ModelError

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
_SETTINGS = (CONFIG, ADAPTER_CONFIG)
GENERATION_CONFIG = "generation_config.json"
ADAPTER_STEM = "adapter_model"
"""What the file with the weights of a PEFT adapter is called, without its ending."""
FINETUNE_RECORD = "holdfast_finetune.json"
"""What `holdfast finetune` writes beside a model or adapter."""
BAKE_RECORD = "holdfast_bake.json"
"""What `holdfast bake` writes beside a checkpoint or adapter."""
STEP_RECORD = "holdfast.json"
"""Written into a checkpoint of training when all of it is on disk and finite."""


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object, such as a model's configuration.

    Raises:
        InputError: If there is no such file, or it holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        inside = sorted(
            {each.parent.name for name in _SETTINGS for each in _beneath(path, name)}
        )
        raise InputError(
            f"a model directory with a {path.name}",
            f"none in {path.parent}",
            f"Name one of the models in it: {', '.join(inside[:5])}."
            if inside
            else "Point to a directory that `save_pretrained` wrote, or give a Hub id.",
        ) from error
    # Brackets within brackets without end are a RecursionError.
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"a readable {path.name}", f"{path}: {error}", "Restore that file."
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"a JSON object in {path}",
            f"a {type(content).__name__}",
            "Restore that file.",
        )
    return content


def _beneath(path: Path, name: str) -> Iterator[Path]:
    """Yield the files of a name in the folders beside another file."""
    return path.parent.glob(f"*/{name}")


def weight_files(directory: Path, stem: str) -> tuple[Path, ...]:
    """Return the weight files of a directory, in order and all whole.

    They are the very files that transformers or PEFT will read: where more than one
    set of weights lies there, nobody can tell which one is meant.

    `stem`: "model", or "adapter_model" for a PEFT adapter.

    Returns:
        One file, or all shards that the index names.

    Raises:
        InputError: If the index cannot be read.
        ModelError: If there is none, or one is missing or cut short, or an index lies
            beside a file that it does not name, or an adapter has shards; names it.
    """
    index, single = (
        directory / f"{stem}.safetensors{end}" for end in (".index.json", "")
    )
    if not index.is_file():
        read_header(single)
        return (single,)
    shard_of = _weight_map(index)
    files = tuple(directory / name for name in sorted(set(shard_of.values())))
    if single.exists() and files != (single,):
        raise ModelError(
            f"one set of weights in {directory}",
            f"{single.name} and, beside it, {index.name}, which names other files",
            "Remove those that are not meant; which of the two are newer, "
            "the files do not say.",
        )
    held = {
        name: file.name
        for file in files
        for name in read_header(file)[0]
        if name != "__metadata__"
    }
    odd = sorted(held.items() ^ shard_of.items())
    if odd:
        raise ModelError(
            f"shards that hold what {index} says",
            f"another place for {', '.join(sorted({name for name, _ in odd})[:3])}",
            "Shards or index are of another model: copy or download all of them again.",
        )
    if stem == ADAPTER_STEM and files != (single,):
        raise ModelError(
            f"the weights of an adapter in one file, {single.name}",
            f"{len(files)} shards in {directory}, which PEFT does not read",
            "Put them into that file, or merge the adapter where it was made.",
        )
    return files


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor, as an index says."""
    found = read_config(index).get("weight_map")
    # A shard is a file beside its index, and a path could lead anywhere.
    if (
        isinstance(found, dict)
        and found
        and all(
            isinstance(name, str) and name == Path(name).name for name in found.values()
        )
    ):
        return found
    raise InputError(
        f"a `weight_map` from tensors to files in {index}",
        f"{json.dumps(found)[:100]}",
        "Restore that file.",
    )


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file and check the length of the file.

    Returns:
        The header, and the offset at which the tensors begin.

    Raises:
        ModelError: If the file is missing, cut short, or no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError(f"{size} bytes, which end inside the header")
            header = json.loads(stream.read(length))
        ends = [_end(name, entry) for name, entry in header.items()]
    except FileNotFoundError as error:
        raise ModelError(
            f"weights in {file.name}",
            f"no such file in {file.parent}",
            "Weights are read from safetensors only: save the model with "
            "`save_pretrained`, or fetch the missing file.",
        ) from error
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise _broken(file, str(error)) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise _broken(file, f"{size} bytes where its header says {expected}")
    return header, 8 + length


def shapes_of(files: tuple[Path, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in safetensors files, without reading them.

    Raises:
        ModelError: As `read_header` does.
    """
    return {
        name: tuple(entry["shape"])
        for file in files
        for name, entry in read_header(file)[0].items()
        if name != "__metadata__"
    }


def _end(name: str, entry: object) -> int:
    """Return where a tensor of a header ends; ValueError if it is none."""
    if name == "__metadata__":
        return 0
    entry = entry if isinstance(entry, Mapping) else {}
    shape, place = entry.get("shape"), entry.get("data_offsets")
    if isinstance(shape, list) and isinstance(place, list) and len(place) == 2:
        if all(type(number) is int and number >= 0 for number in shape + place):
            return int(place[1])
    raise ValueError(f"no shape and place of {name[:60]!r} in its header")


def _broken(file: Path, found: str) -> ModelError:
    return ModelError(
        f"a whole safetensors file {file}",
        found,
        "The file was cut short or damaged: copy or download it again.",
    )
