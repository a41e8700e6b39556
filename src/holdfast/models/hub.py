"""Fetch a model from the Hub, its configuration first."""

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

from holdfast.errors import InputError, OfflineError, StorageError
from holdfast.models.families import family_of
from holdfast.models.files import ADAPTER_CONFIG, CONFIG, read_config

HUB_TIMEOUT = 10.0
HUB_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")


def fetch(
    name: str,
    revision: str | None,
    *,
    check: Callable[[Mapping[str, Any], str], object] = family_of,
) -> tuple[Path, str | None]:
    """Fetch a model, or find it in the cache when the Hub cannot be reached.

    Args:
        name: Hub id, "owner/name".
        revision: Branch, tag or commit; None for the main branch.
        check: Refuses a configuration that does not fit, given the model's name too.

    Returns:
        Directory of its files, and its commit.

    Raises:
        InputError: If there is no such model or revision, or it may not be read.
        UnsupportedFamilyError: If its architecture does not fit; its weights have
            not been fetched then.
        OfflineError: If the Hub cannot be reached, and the cache has no copy.
        StorageError: If it cannot be stored.
    """
    with _hub_errors(name, revision):
        try:
            info = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except (HTTPError, OSError) as error:
            return _cached(name, revision, error)
        files = {sibling.rfilename for sibling in info.siblings or ()}
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
