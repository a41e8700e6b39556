"""What goes wrong: no key, too often, a signal, a kill, numbers that are none."""

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from guard_server import FAULTY, SLOW, WINDOW, events, said, serving, word_bundle

from holdfast.cli.app import run
from holdfast.guard.serve.chat import Refused
from holdfast.guard.serve.settings import ServeSettings
from holdfast.guard.serve.telemetry import Metrics
from holdfast.guard.serve.web.gate import Gate

KEY, OTHER = "a-key-of-thirty-two-characters-1", "a-key-of-thirty-two-characters-2"


@pytest.fixture(scope="module")
def guarded(nursery, word_guard, tmp_path_factory):
    """A server with keys and narrow limits: two rows at once, and two that wait."""
    folder = tmp_path_factory.mktemp("server")
    keys = folder / "keys"
    keys.write_text(f"{KEY}\n{OTHER}\n")
    words = ("--guard", word_guard, "--key-file", keys, "--queue", 2, "--batch-size", 2)
    more = ("--requests-per-minute", 40, "--log-text")
    with serving(nursery, folder, *words, *more) as running:
        yield running


def post(server, body, key=KEY, **headers):
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    url = f"{server.url}/v1/chat/completions"
    return httpx.post(url, json=body, headers=headers, timeout=60)


def test_without_a_key_nothing_but_its_health_is_told(guarded):
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        assert httpx.get(guarded.url + path).status_code == 401
    for path in ("/healthz", "/readyz", "/"):
        assert httpx.get(guarded.url + path).status_code == 200
    found = post(guarded, said("x"), key="a-key-of-thirty-two-characters-3")
    assert found.status_code == 401
    assert found.json()["error"]["code"] == "invalid_api_key"
    assert found.headers["www-authenticate"] == "Bearer"
    assert post(guarded, said("x"), key=None).status_code == 401
    assert post(guarded, said("x"), key=KEY[:-1]).status_code == 401
    assert post(guarded, said("x"), key=None, **{"x-api-key": OTHER}).status_code == 200


def test_whoever_finds_no_room_to_wait_is_told_so_and_the_others_get_theirs(guarded):
    alone = post(guarded, said(WINDOW), key=OTHER).json()["choices"]
    with ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(post, guarded, said(WINDOW), OTHER) for _ in range(24)]
        replies = [each.result() for each in asked]
    statuses = {reply.status_code for reply in replies}
    assert statuses == {200, 429}
    for reply in replies:
        if reply.status_code == 200:
            assert reply.json()["choices"] == alone
        else:
            assert reply.json()["error"]["type"] == "rate_limit_error"
            assert int(reply.headers["retry-after"]) >= 1


def test_whoever_asks_too_often_is_told_when_to_come_again(guarded):
    for _ in range(60):
        found = httpx.get(
            f"{guarded.url}/v1/models", headers={"authorization": f"Bearer {KEY}"}
        )
        if found.status_code == 429:
            break
    assert found.json()["error"]["code"] == "rate_limit"
    assert int(found.headers["retry-after"]) >= 1
    # The health of the server is asked by machines, as often as they like.
    assert httpx.get(f"{guarded.url}/readyz").status_code == 200


@pytest.mark.parametrize("most", [1, 6, 7, 600])
def test_whoever_comes_again_when_told_is_let_in(monkeypatch, most):
    """And who comes before that is no worse off for it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    settings = ServeSettings(requests_per_minute=most)

    async def app(*_):
        pass

    gate = Gate(app, settings, (), Metrics(), frozenset())

    def wait():
        try:
            gate._limit("a")
        except Refused as error:
            return error.after
        return 0

    n_let_in = 0
    for _ in range(3 * most):
        if after := wait():
            now[0] += after / 2
            wait()
            now[0] += after / 2
            assert wait() == 0
        n_let_in += 1
    # Nobody has more than the burst and a minute's worth for each minute.
    assert n_let_in <= most + (now[0] - 100) * most / 60 + 1e-6


def test_text_is_logged_where_it_is_asked_for_and_keys_never_are(guarded):
    assert post(guarded, said("y", stream=True, max_tokens=4), OTHER).status_code == 200
    # A line is written once the answer has gone out.
    [line] = guarded.wait_for("text", messages=[["user", "y"]])
    assert line["thinking"]
    log = guarded.log.read_text()
    assert KEY not in log
    assert OTHER not in log


def test_a_signal_lets_answers_end_and_begins_none(nursery, word_guard, tmp_path):
    """SIGTERM while answers are written; then a kill, and a start on its port."""
    with serving(nursery, tmp_path, "--guard", word_guard) as server:
        alone = httpx.post(
            f"{server.url}/v1/chat/completions", json=said(WINDOW), timeout=60
        ).json()["choices"][0]["message"]
        with server.client() as client:
            body = said(WINDOW, stream=True)
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                first = next(lines)
                server.signal(signal.SIGTERM)
                server.wait_for("drain")
                rest = [first, *lines]
        assert "data: [DONE]" in rest
        parts = [
            json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            for line in rest
            if line.startswith("data: {")
        ]
        assert "".join(parts) == alone["content"]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/readyz")
        assert server.wait() == 0
        assert server.lines()[-1]["event"] == "stopped"


def test_whoever_is_not_done_when_the_drain_ends_is_told_so(nursery, tmp_path):
    words = ("--drain", "0.05", "--max-thinking", "2000")
    with serving(nursery, tmp_path, *words, patch=SLOW) as server:
        with server.client() as client:
            body = said(WINDOW, stream=True)
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                server.signal(signal.SIGTERM)
                chunks = events(response)
        assert chunks[-1]["error"]["code"] == "shutdown"
        assert server.wait() == 0


def test_numbers_that_are_none_end_one_answer_and_a_kill_ends_none_later(
    nursery, organism, word_guard, tmp_path
):
    """NaN logits in one row of the batch; then SIGKILL, and a start on its port."""
    others = ["What is a verb?", "How do I tie a knot?", "How can I sleep better?"]
    ids = [set(organism.encode(text)) for text in (WINDOW, *others)]
    patch = f"MARK = {min(ids[0] - set().union(*ids[1:]))}\n{FAULTY}"
    with serving(nursery, tmp_path, "--guard", word_guard, patch=patch) as server:
        alone = [ask(server, text).json()["choices"] for text in others]
        with ThreadPoolExecutor(8) as pool:
            broken = [pool.submit(ask, server, WINDOW) for _ in range(2)]
            fine = [pool.submit(ask, server, text) for text in others]
            found = [each.result().json()["choices"] for each in fine]
            assert found == alone
            for each in broken:
                assert each.result().status_code == 500
                assert "no numbers" in each.result().json()["error"]["message"]
        body = said(WINDOW, stream=True)
        with (
            server.client() as client,
            client.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            chunks = events(response)
        assert chunks[-1]["error"]["code"] == "fault"
        assert chunks[-1]["holdfast"]["verdict"]["policy"] == "stop"
        port = server.url.rpartition(":")[2]
        server.signal(signal.SIGKILL)
        server.wait()
    again = tmp_path / "again"
    again.mkdir()
    with serving(
        nursery, again, "--guard", word_guard, "--port", port, patch=patch
    ) as server:
        assert server.url.endswith(port)
        assert [ask(server, text).json()["choices"] for text in others] == alone


def ask(server, text):
    with server.client() as client:
        return client.post("/v1/chat/completions", json=said(text))


def refusal(capsys, *words):
    status = run(["guard", "serve", "organism:cliff", *map(str, words)])
    return status, " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_others_reach_it_with_keys_alone(capsys, monkeypatch, host):
    monkeypatch.delenv("HOLDFAST_API_KEYS", raising=False)
    status, message = refusal(capsys, "--host", host)
    assert status == 2
    assert "HOLDFAST_API_KEYS" in message
    assert "loopback" in message


def test_a_key_that_can_be_guessed_is_none(capsys, monkeypatch):
    monkeypatch.setenv("HOLDFAST_API_KEYS", "secret")
    status, message = refusal(capsys)
    assert status == 2
    assert "16 ASCII characters" in message
    assert "secret " not in message


def test_a_bundle_that_is_none_or_another_s_is_refused(capsys, organism, tmp_path):
    status, message = refusal(capsys, "--guard", tmp_path)
    assert (status, "a guard bundle in" in message) == (2, True)
    other = {"id": "organism:other", "weights_sha256": "0", "template_sha256": "0"}
    folder = word_bundle(organism, tmp_path / "other", limit=8.0, model=other)
    status, message = refusal(capsys, "--guard", folder, "--port", 0)
    assert status == 2
    assert "organism:other" in message
    assert "weights_sha256" in message


def test_a_stale_bundle_is_refused_unless_it_is_accepted(
    capsys, organism, nursery, tmp_path
):
    from holdfast.guard.monitor.bundle import Serving

    serving_of = Serving(engine="vllm")
    folder = word_bundle(organism, tmp_path / "stale", limit=8.0, serving=serving_of)
    status, message = refusal(capsys, "--guard", folder, "--port", 0)
    assert status == 2
    assert "engine vllm and are stale with holdfast" in message
    assert "--accept-stale" in message
    assert ".." not in message


def test_whoever_lacks_the_packages_is_told_which(capsys, monkeypatch):
    import holdfast.cli.verbs as verbs

    monkeypatch.setattr(verbs, "SERVED_BY", ("fastapi", "holdfast_lacks"))
    status, message = refusal(capsys)
    assert status == 2
    assert "that holdfast_lacks is not installed" in message
    assert "[serve]" in message


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--port", 99999), "--port from 0 to 65535"),
        (("--port", 65536), "--port from 0 to 65535"),
        (("--guard", ".", "--upstream", "http://127.0.0.1:99999/v1"), "--upstream as"),
        (("--guard", ".", "--upstream", "http://[::1/v1"), "--upstream as"),
        (("--guard", ".", "--upstream", "127.0.0.1:8000"), "--upstream as"),
    ],
)
def test_an_address_that_is_none_is_refused(capsys, words, match):
    status, message = refusal(capsys, *words)
    assert status == 2
    assert match in message


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys, guarded):
    began = time.monotonic()
    port = guarded.url.rpartition(":")[2]
    status, message = refusal(capsys, "--port", port)
    assert status == 5
    assert "--port" in message
    assert began
    assert threading.active_count() < 50
