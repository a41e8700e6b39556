import time
from types import SimpleNamespace

import pytest
from huggingface_hub import errors as hub_errors

from holdfast.errors import (
    InputError,
    OfflineError,
    StorageError,
    UnsupportedFamilyError,
)
from holdfast.models.loading import checkpoint
from holdfast.models.loading.causal import load
from tiny_models import edit_json


def test_offline_says_so_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(OfflineError, match="owner/name") as caught:
        load("owner/name")
    assert time.monotonic() - start < 5
    assert "hf download owner/name" in caught.value.next_step


def _answer(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint.HfApi, "model_info", fail)


def _status(kind, code):
    import httpx2

    request = httpx2.Request("GET", "https://hub.invalid/owner/name")
    return kind("no", response=httpx2.Response(code, request=request))


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        (hub_errors.RepositoryNotFoundError, 404, "called owner/name"),
        (hub_errors.GatedRepoError, 403, "behind an agreement"),
        (hub_errors.RevisionNotFoundError, 404, "revision v9"),
    ],
)
def test_what_the_hub_refuses_is_told_apart(monkeypatch, kind, code, message):
    _answer(monkeypatch, _status(kind, code))
    with pytest.raises(InputError, match=message):
        load("owner/name", revision="v9")


def test_a_hub_that_fails_counts_as_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    _answer(monkeypatch, _status(hub_errors.HfHubHTTPError, 503))
    with pytest.raises(OfflineError, match="HfHubHTTPError"):
        load("owner/name")


def _hub_with(monkeypatch, directory, files=("config.json", "model.safetensors")):
    siblings = [SimpleNamespace(rfilename=name) for name in files]
    info = SimpleNamespace(sha="c0ffee", siblings=siblings)
    monkeypatch.setattr(checkpoint.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(
        checkpoint, "hf_hub_download", lambda _, file, **__: str(directory / file)
    )
    fetched = []

    def snapshot(_, **named):
        fetched.append(named["revision"])
        return str(directory)

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot)
    return fetched


def test_a_hub_model_of_gguf_files_alone_says_how_to_fetch_one(monkeypatch, tmp_path):
    _hub_with(monkeypatch, tmp_path, ("model.Q4_K.gguf", "model.Q8_0.gguf"))
    with pytest.raises(InputError, match=r"hf download owner/name model\.Q4_K\.gguf"):
        load("owner/name")


def test_a_hub_model_is_pinned_to_its_commit(monkeypatch, saved):
    fetched = _hub_with(monkeypatch, saved)
    adapter = load("owner/name")
    assert fetched == ["c0ffee"]
    assert adapter.identity.revision == "c0ffee"
    assert adapter.identity.model_id == "owner/name"


def test_a_hub_model_that_does_not_fit_is_refused_before_its_weights_come(
    monkeypatch, copy
):
    edit_json(copy / "config.json", model_type="bert")
    fetched = _hub_with(monkeypatch, copy)
    with pytest.raises(UnsupportedFamilyError, match="both ways"):
        load("owner/name")
    assert fetched == []


def test_a_full_disk_is_not_taken_for_the_network(monkeypatch, saved):
    _hub_with(monkeypatch, saved)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "snapshot_download", fail)
    with pytest.raises(StorageError, match="room to store"):
        load("owner/name")
