"""Prompt files of a dataset on the Hugging Face Hub, pinned to one commit."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from holdfast.data.tables import READERS, suffix
from holdfast.errors import OfflineError, PromptFileError

HUB_PREFIX: Final = "hub:"
REQUEST_SECONDS: Final = 10.0
_SHARD: Final = re.compile(r"-(\d{5})-of-(\d{5})(?=\.)")
# Descriptions of a dataset, which lie beside its rows under the same suffix.
_DESCRIPTIONS: Final = {"dataset_infos.json", "dataset_info.json", "state.json"}


class HubFiles(NamedTuple):
    """What was fetched: a name with the commit, and the files as (name, bytes)."""

    source: str
    commit: str
    files: tuple[tuple[str, bytes], ...]
    notes: tuple[str, ...]


class _Listing(NamedTuple):
    commit: str
    paths: tuple[str, ...]
    folder: Path | None  # The cached snapshot, where the Hub was not asked.
    notes: tuple[str, ...]


def fetch(source: str, *, revision: str | None = None) -> HubFiles:
    """Fetch the files of one split of a dataset repository.

    The revision is resolved to a commit before any file is read, so that all files
    are of one commit. Without the Hub, the local cache answers, and the notes say so.

    `revision`: Branch, tag or commit; None is the default branch.
    """
    repo, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise PromptFileError(
            "a Hub dataset written `hub:owner/name` or `hub:owner/name:split`",
            f"`{source}`",
            "Write the owner, a slash, and the name.",
        )
    listing = _list(repo, revision)
    paths = choose_files(listing.paths, split, repo)
    files = tuple((path, _read(repo, listing, path)) for path in paths)
    return HubFiles(f"{source}@{listing.commit}", listing.commit, files, listing.notes)


def choose_files(paths: Iterable[str], split: str, repo: str) -> tuple[str, ...]:
    """Choose the files of one split; what fits more than one way is an error.

    `split`: Name of a split or of a file; "" where the caller named none.
    """
    groups: dict[str, list[str]] = {}
    for path in sorted(paths):
        name = path.rpartition("/")[2]
        known = suffix(path) in READERS and name not in _DESCRIPTIONS
        # Text files of a repository are rarely its rows; one is read if it is named.
        if path == split or (known and suffix(path) != ".txt"):
            groups.setdefault(_SHARD.sub("", path), []).append(path)
    fitting = [group for group in groups if _fits(group, split)]
    if len(fitting) != 1:
        choices = ", ".join(f"`{HUB_PREFIX}{repo}:{group}`" for group in groups)
        raise PromptFileError(
            f"one file or split of `{repo}` that fits `{split or 'no split'}`",
            f"{len(fitting)} that fit",
            f"Choose one of {choices}."
            if groups
            else f"It has no file in a known format: {', '.join(READERS)}.",
        )
    shards = groups[fitting[0]]
    first = _SHARD.search(shards[0])
    if first is not None and len(shards) != int(first[2]):
        raise PromptFileError(
            f"{int(first[2])} shards of `{fitting[0]}` in `{repo}`",
            f"{len(shards)}",
            "Fetch the dataset again with the Hub in reach.",
        )
    return tuple(shards)


def _fits(group: str, split: str) -> bool:
    folder, _, name = group.rpartition("/")
    stem = name.rpartition(".")[0]
    return not split or split in {group, stem, *folder.split("/")}


def _list(repo: str, revision: str | None) -> _Listing:
    try:
        info = HfApi().dataset_info(repo, revision=revision, timeout=REQUEST_SECONDS)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise PromptFileError(
            f"a dataset `{repo}` that may be read",
            "no such dataset on the Hub, or one that is closed to you",
            "Check the spelling; for a gated or private one run `hf auth login`.",
        ) from error
    except RevisionNotFoundError as error:
        raise PromptFileError(
            f"revision `{revision}` of `{repo}`",
            "no such branch, tag or commit",
            "Give one that the dataset's page lists under its files.",
        ) from error
    except HFValidationError as error:
        raise PromptFileError("a Hub dataset id", f"`{repo}`", str(error)) from error
    except (OfflineModeIsEnabled, HTTPError, OSError, ValueError) as error:
        return _list_cache(repo, revision, error)
    return _Listing(
        str(info.sha), tuple(file.rfilename for file in info.siblings or ()), None, ()
    )


def _list_cache(repo: str, revision: str | None, cause: Exception) -> _Listing:
    reason = _reason(cause)
    folder = _snapshot(repo, revision)
    if folder is None:
        raise _offline(repo, reason) from cause
    paths: Sequence[Path] = [path for path in folder.rglob("*") if path.is_file()]
    note = (
        f"the Hub was not asked ({reason}); `{repo}` was read from the local cache at"
        f" commit {folder.name}."
    )
    names = tuple(path.relative_to(folder).as_posix() for path in paths)
    return _Listing(folder.name, names, folder, (note,))


def _snapshot(repo: str, revision: str | None) -> Path | None:
    try:
        return Path(
            snapshot_download(
                repo, repo_type="dataset", revision=revision, local_files_only=True
            )
        )
    except LocalEntryNotFoundError as error:
        # The cache may hold the split that is asked for without the other files.
        if (partial := getattr(error, "snapshot_path", None)) is not None:
            return Path(partial)
    if revision is not None:
        return None
    # Files fetched by commit leave no mark of the branch; of several, none is chosen.
    name = repo_folder_name(repo_id=repo, repo_type="dataset")
    commits = list((Path(constants.HF_HUB_CACHE) / name / "snapshots").glob("*"))
    return commits[0] if len(commits) == 1 else None


def _read(repo: str, listing: _Listing, path: str) -> bytes:
    if listing.folder is not None:
        return (listing.folder / path).read_bytes()
    try:
        local = hf_hub_download(
            repo,
            path,
            repo_type="dataset",
            revision=listing.commit,
            etag_timeout=REQUEST_SECONDS,
        )
    except (HTTPError, EntryNotFoundError, OSError) as error:
        raise _offline(f"{repo}/{path}", _reason(error)) from error
    return Path(local).read_bytes()


def _reason(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"it answered with status {error.response.status_code}"
    return f"no answer: {type(error).__name__}"


def _offline(what: str, reason: str) -> OfflineError:
    return OfflineError(
        f"the Hub dataset `{what}` in reach or in the local cache",
        f"neither ({reason})",
        "Connect and unset HF_HUB_OFFLINE, name a cached commit as the revision, or"
        " download the file and give its path.",
    )
