"""Hub datasets, read from a real server on this machine that plays the Hub."""

import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from holdfast.data import hub
from holdfast.data.hub import choose_files
from holdfast.data.prompts import PromptFile, read_prompts
from holdfast.errors import OfflineError, PromptFileError

COMMIT = "c0ffee" + "0" * 34
FILES = {
    "README.md": b"about",
    "dataset_infos.json": b"{}",
    "data/train-00000-of-00002.jsonl": b'{"goal": "Wave."}\n{"goal": "Sing."}\n',
    "data/train-00001-of-00002.jsonl": b'{"goal": "Hum."}\n',
    "data/test.csv": b"goal,topic\nDance.,steps\n",
    "data/broken.csv": b"goal,label\nDance.,safe\nWave.,sad\n",
}  # fmt: skip
TRAIN = (
    FILES["data/train-00000-of-00002.jsonl"] + FILES["data/train-00001-of-00002.jsonl"]
)


class FakeHub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/down/"):
            self.answer(503, b"")
        elif path in {
            "/api/datasets/owner/name",
            "/api/datasets/owner/name/revision/v1",
            f"/api/datasets/owner/name/revision/{COMMIT}",
        }:
            siblings = [{"rfilename": name} for name in FILES]
            body = {"id": "owner/name", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(body).encode())
        elif path.startswith("/api/datasets/owner/name/revision/"):
            self.answer(404, b"", "RevisionNotFound")
        elif path.startswith(f"/datasets/owner/name/resolve/{COMMIT}/"):
            self.answer(200, FILES[path.partition(f"{COMMIT}/")[2]])
        else:
            self.answer(404, b"", "RepoNotFound")

    def answer(self, status: int, body: bytes, code: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tmp_path


@pytest.fixture
def unreachable(cache, monkeypatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    point_at(monkeypatch, port)


@pytest.fixture
def server(cache, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        point_at(monkeypatch, running.server_port)
        yield running
        running.shutdown()
        thread.join()


def point_at(monkeypatch, port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )


def read(source: str, revision: str | None = None) -> PromptFile:
    return read_prompts(source, label="benign", revision=revision)


def said(file: PromptFile) -> list[str]:
    return [prompt.text for prompt in file.prompts]


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_a_split_is_read_from_all_its_shards_at_a_commit(server, revision):
    file = read("hub:owner/name:train", revision)
    assert said(file) == ["Wave.", "Sing.", "Hum."]
    assert file.source == f"hub:owner/name:train@{COMMIT}"
    assert file.prompts[0].source == file.source
    assert file.sha256 == hashlib.sha256(TRAIN).hexdigest()
    assert f"`hub:owner/name:train` was read at commit {COMMIT}." in file.notes


def test_a_file_of_a_dataset_can_be_named_by_its_path(server):
    file = read("hub:owner/name:data/test.csv")
    assert [(p.text, p.topic) for p in file.prompts] == [("Dance.", "steps")]


def test_a_split_that_is_not_named_is_not_guessed(server):
    with pytest.raises(PromptFileError) as caught:
        read("hub:owner/name")
    assert "3 that fit" in caught.value.found
    assert "`hub:owner/name:data/test.csv`" in caught.value.next_step
    assert "README" not in str(caught.value)
    assert "infos" not in str(caught.value)
    with pytest.raises(PromptFileError, match="0 that fit"):
        read("hub:owner/name:validation")


def test_a_fault_in_a_file_of_the_hub_is_named_by_line(server):
    with pytest.raises(PromptFileError, match=r"broken@\w+.*line 3"):
        read("hub:owner/name:broken")


def test_a_dataset_or_revision_that_does_not_exist_is_bad_input(server):
    with pytest.raises(PromptFileError, match="no such dataset"):
        read("hub:owner/other")
    with pytest.raises(PromptFileError, match="revision `v2` of `owner/name`"):
        read("hub:owner/name:train", "v2")
    with pytest.raises(PromptFileError, match="owner, a slash"):
        read("hub:name")


def test_a_hub_that_answers_with_a_fault_is_offline(server):
    with pytest.raises(OfflineError, match="status 503"):
        read("hub:down/name")


def test_an_unreachable_hub_is_an_offline_error(unreachable):
    with pytest.raises(OfflineError, match="no answer: ConnectError") as caught:
        read("hub:owner/name:train")
    assert caught.value.exit_status == 5


def test_a_hub_that_never_answers_is_given_up(cache, monkeypatch):
    monkeypatch.setattr(hub, "REQUEST_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_at(monkeypatch, silent.getsockname()[1])
        with pytest.raises(OfflineError, match="no answer: ReadTimeout"):
            read("hub:owner/name:train")


def test_the_offline_variable_is_respected(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineError, match="HF_HUB_OFFLINE is set"):
        read("hub:owner/name:train")


@pytest.mark.parametrize("offline", [True, False])
def test_without_the_hub_the_cache_answers_and_says_so(server, monkeypatch, offline):
    before = read("hub:owner/name:train")
    server.shutdown()
    server.socket.close()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    after = read("hub:owner/name:train")
    assert (said(after), after.source) == (said(before), before.source)
    assert after.sha256 == before.sha256
    assert any("read from the local cache" in note for note in after.notes)
    assert not any("local cache" in note for note in before.notes)
    with pytest.raises(PromptFileError, match="0 that fit"):
        read("hub:owner/name:data/test.csv")


def test_a_missing_shard_is_noticed():
    with pytest.raises(PromptFileError, match="3 shards"):
        choose_files(["train-00000-of-00003.parquet"], "train", "owner/name")


def test_a_repository_without_rows_lists_the_formats():
    with pytest.raises(PromptFileError, match=r"\.parquet"):
        choose_files(["README.md", "load.py"], "", "owner/name")
