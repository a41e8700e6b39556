"""Find a checkpoint on disk or on the Hub, and check its files.

Configurations are read, and architectures refused, before weights are fetched.
Weights are read from safetensors only.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from holdfast.errors import InputError, ModelError, OfflineError, StorageError
from holdfast.models.containers import gguf
from holdfast.models.containers.quantised import method_of
from holdfast.models.loading.families import Family, family_of
from holdfast.models.loading.files import (
    ADAPTER_CONFIG,
    ADAPTER_STEM,
    CONFIG,
    read_config,
    weight_files,
)
from holdfast.study import atomic_write_json

Check = Callable[[Mapping[str, Any], str], Family]
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_CACHED = re.compile(r"models--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})")
_ELSEWHERE = "transformers_weights"
"""Key of a configuration that names other files of weights than the usual ones."""


class Place(NamedTuple):
    """Where a model is."""

    name: str  # Hub id, or the directory as it was named.
    revision: str | None  # Commit on the Hub; None for a directory of one's own.
    directory: Path  # Its files.


class Checkpoint(NamedTuple):
    """Where a model's files are."""

    model_id: str  # What the user named.
    revision: str | None  # Commit on the Hub; None for a directory.
    directory: Path  # Files of the model, or of the base of an adapter.
    adapter: Path | None  # Files of a PEFT adapter; None for a whole model.
    config: dict[str, Any]  # The `config.json` of the model.
    family: Family  # Where the parts of its architecture are.
    quantised: str | None = None  # Method that packed its weights; None if none did.

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """Files with weights, those of an adapter last."""
        if self.config.get(_ELSEWHERE):
            raise ModelError(
                f"weights of {self.model_id} under their usual names",
                f"`{_ELSEWHERE}` in its {CONFIG}, which names others",
                "Take that line out, and rename the files if they are meant.",
            )
        files = weight_files(self.directory, "model")
        if self.adapter is None:
            return files
        return (*files, *weight_files(self.adapter, ADAPTER_STEM))


def find_checkpoint(
    id_or_path: str | Path,
    revision: str | None,
    check: Check = family_of,
    *,
    whole: bool = False,
) -> Checkpoint:
    """Find a model by directory or Hub id, and refuse what does not fit.

    `check`: Returns the family of a configuration, or refuses it by name.

    `whole`: Whether an adapter is refused.

    Raises:
        InputError: If it names no model, or its configuration cannot be read.
        ModelError: If weights are missing or no safetensors.
        UnsupportedFamilyError: If the architecture does not fit.
    """
    model = locate(str(id_or_path), revision, check)
    if not (model.directory / ADAPTER_CONFIG).is_file():
        return _checkpoint(model, model, None, check)
    if whole:
        raise _no_whole_model(model.directory)
    base = _find_base(model.directory, check)
    return _checkpoint(model, base, model.directory, check)


def require_whole(checkpoint: Checkpoint) -> None:
    """Refuse an adapter where only whole models are read.

    Raises:
        InputError: If it is one.
    """
    if checkpoint.adapter is not None:
        raise _no_whole_model(checkpoint.adapter)


def locate(name: str, revision: str | None, check: Check) -> Place:
    """Return where a model lies; one on the Hub is fetched, and a GGUF file expanded.

    A directory in the Hub's cache is the model of the Hub that it is a copy of.

    Raises:
        InputError: If it is neither.
        HoldfastError: As `fetch` does.
    """
    path = Path(name).expanduser()
    if (file := gguf.find_file(path)) is not None:
        return Place(name, None, gguf.expanded(file, check))
    if path.is_dir():
        cached = _CACHED.search(path.absolute().as_posix())
        if cached is None:
            return Place(name, None, path)
        return Place(cached["name"].replace("--", "/"), cached["commit"], path)
    if path.exists() or not HUB_ID.fullmatch(name):
        raise InputError(
            "the directory of a model, a GGUF file, or a Hub id such as `owner/name`",
            f"{name}, which is {'a file' if path.exists() else 'neither'}",
            "Check the spelling of the path.",
        )
    directory, commit = fetch(name, revision, check=check)
    return Place(name, commit, directory)


def name_base(adapter: Path, base: Checkpoint | None) -> None:
    """Write into the settings of an adapter which model it lies over.

    Others have neither the folders of this machine nor the one that a command ran in:
    a model of the Hub is named by id and commit, and a directory or a GGUF file by its
    path from the adapter, so that both can be moved together.

    `base`: The model; None for one in memory, which no name leads back to.
    """
    name, revision = None, None
    if base is not None and base.revision is not None and base.adapter is None:
        name, revision = base.model_id, base.revision
    elif base is not None:
        # A path through a link would lead elsewhere: `..` goes up from its target.
        file = gguf.find_file(Path(base.model_id).expanduser())
        under = (base.adapter or file or base.directory).resolve()
        name = Path(os.path.relpath(under, adapter.resolve())).as_posix()
    path = adapter / ADAPTER_CONFIG
    named = {"base_model_name_or_path": name, "revision": revision}
    atomic_write_json(path, read_config(path) | named)


def _checkpoint(
    model: Place, base: Place, adapter: Path | None, check: Check
) -> Checkpoint:
    config = read_config(base.directory / CONFIG)
    family = check(config, base.name)
    method = method_of(config, base.name)
    return Checkpoint(
        model.name, model.revision, base.directory, adapter, config, family, method
    )


def _find_base(adapter: Path, check: Check) -> Place:
    """Return the model under an adapter."""
    config = read_config(adapter / ADAPTER_CONFIG)
    kind, named = config.get("peft_type"), config.get("base_model_name_or_path")
    revision = config.get("revision")
    if not (named and isinstance(named, str) and kind == "LORA"):
        raise InputError(
            "a LoRA adapter that names its base model",
            f"type {kind} over {named or 'no base'} in {adapter / ADAPTER_CONFIG}",
            "Merge the adapter into its base and give the merged model.",
        )
    beside = adapter / named
    try:
        base = locate(
            str(beside.resolve()) if beside.exists() else named,
            revision if isinstance(revision, str) else None,
            check,
        )
    except (InputError, OfflineError) as error:
        raise type(error)(
            f"the base of the adapter in {adapter}",
            error.found if named in error.found else f"{named}: {error.found}",
            f"Put it there, or name it in {ADAPTER_CONFIG} "
            "(`base_model_name_or_path`) by Hub id or by its path from the adapter.",
        ) from error
    if (base.directory / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"a whole model under the adapter in {adapter}",
            f"another adapter, {named}",
            "Merge that one into its base, and name the merged model in "
            f"{ADAPTER_CONFIG} (`base_model_name_or_path`).",
        )
    return base


def _no_whole_model(adapter: Path) -> InputError:
    return InputError(
        "a whole model",
        f"a PEFT adapter in {adapter}",
        "Merge the adapter into its base and give the merged model.",
    )


HUB_TIMEOUT = 10.0
HUB_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")


def fetch(
    name: str,
    revision: str | None,
    *,
    check: Callable[[Mapping[str, Any], str], object] = family_of,
) -> tuple[Path, str | None]:
    """Fetch a model, or find it in the cache when the Hub cannot be reached.

    `check`: Refuses a configuration that does not fit, given the model's name too.

    Returns:
        Directory of its files, and its commit.

    Raises:
        InputError: If there is no such model or revision, or it may not be read.
        UnsupportedFamilyError: If its architecture does not fit; its weights have
            not been fetched then.
        OfflineError: If the Hub cannot be reached, and the cache has no copy.
    """
    with _hub_errors(name, revision):
        try:
            info = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except (HTTPError, OSError) as error:
            return _cached(name, revision, error)
        files = {sibling.rfilename for sibling in info.siblings or ()}
        packed = sorted(each for each in files if each.endswith(gguf.SUFFIX))
        if packed and CONFIG not in files:
            raise InputError(
                f"a model of transformers in {name} on the Hub",
                f"GGUF files alone, such as {packed[0]}",
                f"Fetch the one that is meant with `hf download {name} {packed[0]}`, "
                "and give its path.",
            )
        if ADAPTER_CONFIG not in files:
            config = hf_hub_download(
                name, CONFIG, revision=info.sha, etag_timeout=HUB_TIMEOUT
            )
            # An architecture that does not fit is refused before its weights come.
            check(read_config(Path(config)), name)
        directory = snapshot_download(
            name,
            revision=info.sha,
            allow_patterns=list(HUB_FILES),
            etag_timeout=HUB_TIMEOUT,
        )
        return Path(directory), info.sha


def _cached(
    name: str, revision: str | None, reason: Exception
) -> tuple[Path, str | None]:
    try:
        directory = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(HUB_FILES),
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError as error:
        raise OfflineError(
            f"the Hub, for {name}",
            f"{type(reason).__name__}: {str(reason).splitlines()[0][:200]}",
            "No such directory and no cached copy is here either: connect, or fetch "
            f"it elsewhere with `hf download {name}` and give the directory.",
        ) from error
    # The name of a snapshot's directory is its commit.
    return directory, directory.name


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        raise InputError(
            f"access to {name} on the Hub",
            "a model behind an agreement",
            "Accept the agreement on its page, then run `hf auth login`.",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"a directory or a Hub model called {name}",
            "neither, or a private model",
            "Check the spelling; for a private model run `hf auth login`.",
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"revision {revision} of {name} on the Hub",
            "no such branch, tag or commit",
            "Check the revision.",
        ) from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(name, error) from error
    except EntryNotFoundError as error:
        raise InputError(
            f"a {CONFIG} in {name} on the Hub",
            "none",
            "Choose a repository with a transformers language model.",
        ) from error
    except (HTTPError, OSError) as error:
        if getattr(error, "errno", None) in {errno.ENOSPC, errno.EROFS, errno.EACCES}:
            raise StorageError(
                f"room to store {name}",
                str(error),
                "Free some space, or set HF_HOME to a disk that has some.",
            ) from error
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> OfflineError:
    return OfflineError(
        f"the Hub, for {name}",
        f"{type(error).__name__}: {str(error).splitlines()[0][:200]}",
        "Connect and run it again; what was fetched is kept.",
    )
