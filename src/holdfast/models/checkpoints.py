"""Find a checkpoint, on disk or on the Hub, and refuse what does not fit.

Configurations are read, and architectures refused, before weights are fetched.
Weights are read from safetensors only.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.errors import InputError
from holdfast.models.families import Family, family_of
from holdfast.models.files import ADAPTER_CONFIG, CONFIG, read_config, weight_files
from holdfast.models.hub import fetch

Check = Callable[[Mapping[str, Any], str], Family]
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


class Checkpoint(NamedTuple):
    """Where a model's files are.

    Attributes:
        model_id: What the user named.
        revision: Commit on the Hub; None for a directory.
        directory: Files of the model, or of the base of an adapter.
        adapter: Files of a PEFT adapter; None for a whole model.
        config: The `config.json` of the model.
        family: Where the parts of its architecture are.
    """

    model_id: str
    revision: str | None
    directory: Path
    adapter: Path | None
    config: dict[str, Any]
    family: Family

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """Files with weights, those of an adapter last."""
        files = weight_files(self.directory, "model")
        if self.adapter is None:
            return files
        return (*files, *weight_files(self.adapter, "adapter_model"))


def find_checkpoint(
    id_or_path: str | Path, revision: str | None, check: Check = family_of
) -> Checkpoint:
    """Find a model by directory or Hub id, and refuse what does not fit.

    Args:
        id_or_path: A directory, of a model or of a PEFT adapter, or a Hub id.
        revision: Branch, tag or commit on the Hub; None for the main branch.
        check: Returns the family of a configuration, or refuses it by name.

    Returns:
        The checkpoint, its files present.

    Raises:
        InputError: If it names no model, or its configuration cannot be read.
        ModelError: If weights are missing or no safetensors.
        UnsupportedFamilyError: If the architecture does not fit.
        OfflineError: If it is on the Hub, and the Hub cannot be reached.
        StorageError: If it cannot be stored.
    """
    name = str(id_or_path)
    directory, commit = _locate(name, revision, check)
    if not (directory / ADAPTER_CONFIG).is_file():
        config = read_config(directory / CONFIG)
        return Checkpoint(name, commit, directory, None, config, check(config, name))
    base, base_revision = _base_of(directory)
    base_directory, _ = _locate(base, base_revision, check)
    config = read_config(base_directory / CONFIG)
    family = check(config, base)
    return Checkpoint(name, commit, base_directory, directory, config, family)


def _base_of(directory: Path) -> tuple[str, str | None]:
    config = read_config(directory / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path")
    kind = config.get("peft_type")
    if not base or kind != "LORA":
        raise InputError(
            "a LoRA adapter that names its base model",
            f"type {kind} over {base or 'no base'} in {directory / ADAPTER_CONFIG}",
            "Merge the adapter into its base and give the merged model.",
        )
    beside = directory / str(base)
    if not Path(str(base)).exists() and beside.is_dir():
        base = beside
    return str(base), config.get("revision")


def _locate(name: str, revision: str | None, check: Check) -> tuple[Path, str | None]:
    path = Path(name).expanduser()
    if path.is_dir():
        return path, None
    if path.exists() or not HUB_ID.fullmatch(name):
        raise InputError(
            "the directory of a model, or a Hub id such as `owner/name`",
            f"{name}, which is {'a file' if path.exists() else 'neither'}",
            "Check the spelling of the path.",
        )
    return fetch(name, revision, check=check)
