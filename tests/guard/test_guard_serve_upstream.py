"""In front of another server: its stream passes, is read along, and can be stopped."""

import contextlib
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from guard_server import LAMP, WINDOW, events, said, serving

from holdfast.cli.app import run
from holdfast.data.chat.rendering import render

FIELDS = {"vllm": "reasoning", "sglang": "reasoning_content", "plain": None}


@pytest.fixture(scope="module")
def rows(known):
    return {text: known(text) for text in (LAMP, WINDOW)}


class Upstream(ThreadingHTTPServer):
    """Speaks as vLLM, SGLang or llama.cpp do; `flavour` may be set at any time."""

    daemon_threads = True

    def __init__(self, adapter, rows):
        super().__init__(("127.0.0.1", 0), Handler)
        self.adapter, self.rows = adapter, rows
        self.flavour, self.dies_after, self.pause = "vllm", None, 0.0
        self.sent, self.template = [], None
        self.beside, self.tail, self.size = {}, [], None
        self.left = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def pieces(self, text):
        """What a stream holds, token by token: what is thought, and what is said."""
        row, decode = self.rows[text], self.adapter.tokenizer.decode
        start, field = row.spans.answer[0], FIELDS[self.flavour]
        thinking = row.token_ids[slice(*row.spans.thinking)]
        answer = row.token_ids[slice(*row.spans.answer)]
        if field is None:
            whole = row.token_ids[row.spans.thinking[0] : row.spans.answer[1]]
            if self.size:
                text = decode(whole)
                cuts = range(0, len(text), self.size)
                return [{"content": text[at : at + self.size]} for at in cuts]
            return [{"content": decode([token])} for token in whole]
        assert start
        # As vLLM's parsers do, newlines stay where they were.
        said = [{field: decode([token])} for token in thinking] + [{field: "\n"}]
        said += [{"content": "\n\n"}, *({"content": decode([t])} for t in answer)]
        return said + self.tail


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply({"data": [{"id": "up"}]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/apply-template":
            own = render(server.adapter.tokenizer, body["messages"])
            return self.reply({"prompt": server.template or own})
        server.sent.append((self.headers.get("authorization"), body))
        text = body["messages"][-1]["content"]
        if text not in server.rows:
            return self.reply({"error": {"message": "no such prompt"}}, 422)
        pieces = server.pieces(text)
        if not body.get("stream"):
            message = {"role": "assistant"}
            for piece in pieces:
                for name, part in piece.items():
                    message[name] = message.get(name, "") + part
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            choice |= server.beside
            return self.reply({"id": "up-1", "choices": [choice], "usage": {}})
        return self.stream(pieces)

    def stream(self, pieces):
        server = self.server
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        choices = [{"index": 0, "delta": piece} for piece in pieces]
        choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
        try:
            for number, choice in enumerate(choices):
                if number == server.dies_after:
                    return
                chunk = {"id": "up-1", "model": "up", "choices": [choice]}
                chunk |= server.beside
                # As vLLM does, in UTF-8 and not in ASCII.
                data = json.dumps(chunk, ensure_ascii=False)
                self.wfile.write(f"data: {data}\n\n".encode())
                self.wfile.flush()
                time.sleep(server.pause)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            server.left.set()


@pytest.fixture(scope="module")
def upstream(organism, rows):
    with Upstream(organism, rows) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def server(nursery, upstream, word_guard, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    words = ("--guard", word_guard, "--upstream", upstream.url)
    with serving(nursery, folder, *words) as running:
        yield running


@pytest.fixture(autouse=True)
def as_usual(upstream):
    upstream.flavour, upstream.dies_after, upstream.pause = "vllm", None, 0.0
    upstream.beside, upstream.tail, upstream.size = {}, [], None
    upstream.left.clear()
    upstream.sent.clear()


@contextlib.contextmanager
def streamed(server, text):
    body = said(text, model="up", stream=True, extra=[1])
    with (
        server.client() as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        yield response


def texts(chunks):
    found = {"content": "", "reasoning": "", "reasoning_content": ""}
    for chunk in chunks:
        if chunk and "choices" in chunk:
            for name, part in chunk["choices"][0]["delta"].items():
                found[name] += part
    return found


@pytest.mark.parametrize("flavour", FIELDS)
def test_a_stream_passes_as_it_is_with_scores_beside_it(
    server, upstream, rows, flavour
):
    upstream.flavour = flavour
    with streamed(server, WINDOW) as response:
        chunks = events(response)
    assert chunks[-1] is None
    found = texts(chunks)
    wanted = {"content": "", "reasoning": "", "reasoning_content": ""}
    for piece in upstream.pieces(WINDOW):
        for name, part in piece.items():
            wanted[name] += part
    assert found == wanted
    # What the client sent has reached the upstream as it was.
    [(_, body)] = upstream.sent
    assert body["extra"] == [1]
    verdict = chunks[-2]["holdfast"]["verdict"]
    assert verdict["watched"]
    assert not verdict["flagged"]
    steps = [s for c in chunks[:-1] for s in c["holdfast"]["steps"]]
    row = rows[WINDOW]
    n_written = row.spans.answer[1] - row.spans.thinking[0]
    assert [step["index"] for step in steps] == list(range(n_written))


@pytest.mark.parametrize("flavour", FIELDS)
def test_scores_are_those_of_the_finished_answer(server, upstream, rows, flavour):
    upstream.flavour = flavour
    with streamed(server, WINDOW) as response:
        chunks = events(response)
    row = rows[WINDOW]
    answer = {
        "role": "assistant",
        "content": row.answer,
        "reasoning": row.thinking,
    }
    chat = [*said(WINDOW)["messages"], answer]
    with server.client() as client:
        scored = client.post("/v1/moderations", json={"input": chat}).json()
    [result] = scored["results"]
    verdict = chunks[-2]["holdfast"]["verdict"]
    found = verdict["scores"]["answer"]["word"]
    assert found == pytest.approx(result["category_scores"]["word"], abs=1e-3)


@pytest.mark.parametrize("flavour", FIELDS)
def test_an_answer_that_fires_is_stopped_there_and_upstream(
    server, upstream, rows, flavour
):
    upstream.flavour, upstream.pause = flavour, 0.1
    with streamed(server, LAMP) as response:
        chunks = events(response)
    assert chunks[-1] is None
    last = chunks[-2]
    assert last["choices"][0]["finish_reason"] == "content_filter"
    assert last["holdfast"]["verdict"]["action"] == "stopped"
    content = texts(chunks)["content"]
    assert " parts" not in content
    assert rows[LAMP].answer.startswith(content.rpartition("\n\n")[2])
    # It is told by the connection, and writes no further.
    assert upstream.left.wait(timeout=30)


def test_a_whole_answer_is_withheld_where_it_fires(server, upstream, rows):
    with server.client() as client:
        fine = client.post("/v1/chat/completions", json=said(WINDOW)).json()
        fired = client.post("/v1/chat/completions", json=said(LAMP)).json()
    assert fine["choices"][0]["message"]["content"] == f"\n\n{rows[WINDOW].answer}"
    assert fine["holdfast"]["verdict"]["watched"]
    assert fired["choices"][0]["message"] == {"role": "assistant", "content": ""}
    assert fired["choices"][0]["finish_reason"] == "content_filter"


def test_nothing_of_a_withheld_answer_leaves_beside_its_text(server, upstream, rows):
    """Probabilities and numbers of tokens spell the answer out."""
    spelt = [{"token": " parts", "logprob": -0.1}]
    upstream.beside = {"logprobs": {"content": spelt}, "token_ids": [1, 2]}
    with server.client() as client:
        fired = client.post("/v1/chat/completions", json=said(LAMP)).json()
    message = {"role": "assistant", "content": ""}
    assert fired["choices"] == [
        {"index": 0, "message": message, "finish_reason": "content_filter"}
    ]
    assert "parts" not in json.dumps(fired)


def test_a_second_answer_in_a_stream_does_not_pass_unread(server, upstream):
    beside = [
        {"index": 0, "delta": {"content": "a"}},
        {"index": 1, "delta": {"content": "unread"}},
    ]
    for choices in (beside, beside[1:]):
        upstream.beside = {"choices": choices}
        with streamed(server, WINDOW) as response:
            chunks = events(response)
        assert chunks[-1]["error"]["code"] == "upstream"
        assert "unread" not in json.dumps(chunks)


def test_a_text_with_other_ends_of_lines_passes(server, upstream, rows):
    """Only a line feed ends a line of events, and JSON may hold all others."""
    upstream.tail = [{"content": "one\u2028two\x85three"}]
    with streamed(server, WINDOW) as response:
        data = [line for line in response.read().decode().split("\n") if line]
    chunks = [json.loads(line.removeprefix("data: ")) for line in data[:-1]]
    assert texts(chunks)["content"].endswith("one\u2028two\x85three")


def test_numbers_that_are_none_end_a_stream_with_an_error(server, upstream):
    upstream.beside = {"odd": float("nan")}
    with streamed(server, WINDOW) as response:
        chunks = events(response)
    assert chunks[-1]["error"]["code"] == "upstream"


def test_a_token_that_becomes_another_is_told_once(server, upstream, rows):
    """The end of the thinking comes letter by letter, and is read as it is at last."""
    upstream.flavour, upstream.size = "plain", 1
    with streamed(server, WINDOW) as response:
        chunks = events(response)
    steps = [s for c in chunks[:-1] for s in c["holdfast"]["steps"]]
    assert [step["index"] for step in steps] == list(range(len(steps)))


def test_a_signal_lets_answers_of_an_upstream_end_watched(
    nursery, upstream, word_guard, tmp_path
):
    upstream.pause = 0.02
    words = ("--guard", word_guard, "--upstream", upstream.url)
    with serving(nursery, tmp_path, *words) as own:
        with streamed(own, WINDOW) as response:
            lines = response.iter_lines()
            next(lines)
            own.signal(signal.SIGTERM)
            own.wait_for("drain")
            found = [line.removeprefix("data: ") for line in lines if line]
        assert own.wait() == 0
    assert found[-1] == "[DONE]"
    last = json.loads(found[-2])
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["holdfast"]["verdict"]["watched"]


def test_an_answer_that_is_observed_is_counted_once(
    nursery, upstream, word_guard, tmp_path
):
    # In pieces of one letter, what fires is read again with every piece behind it.
    upstream.size = 1
    words = ("--guard", word_guard, "--upstream", upstream.url, "--policy", "observe")
    with serving(nursery, tmp_path, *words) as own:
        with streamed(own, LAMP) as response:
            chunks = events(response)
        with own.client() as client:
            lines = client.get("/metrics").text.splitlines()
    assert chunks[-2]["holdfast"]["verdict"]["fired"]
    counted = [line for line in lines if line.startswith("holdfast_fired_total{")]
    assert counted == ['holdfast_fired_total{channel="answer",policy="observe"} 1.0']


def test_an_upstream_that_dies_is_told_and_the_server_lives(server, upstream, rows):
    with ThreadPoolExecutor(2) as pool:
        upstream.dies_after = 12
        with streamed(server, WINDOW) as response:
            chunks = events(response)
        assert chunks[-1]["error"]["code"] == "upstream"
        assert chunks[-1]["holdfast"]["verdict"]["watched"]
        upstream.dies_after = None
        again = pool.submit(lambda: list(map(len, [texts(events_of(server))])))
        assert again.result()
    with server.client() as client:
        refused = client.post("/v1/chat/completions", json=said("Unknown"))
    assert refused.status_code == 422
    assert "no such prompt" in refused.json()["error"]["message"]


def events_of(server):
    with streamed(server, WINDOW) as response:
        return events(response)


def test_a_client_that_leaves_ends_the_upstream_too(server, upstream):
    upstream.pause = 0.05
    with streamed(server, WINDOW) as response:
        next(response.iter_lines())
    assert upstream.left.wait(timeout=30)


CALLING = {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}
# The upstream is given another prompt, or hides what it thinks.
UNREAD = (
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"chat_template": "{{ messages }}"},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"include_reasoning": False},
    {"separate_reasoning": False},
    {"reasoning_effort": "none"},
    {"continue_final_message": True},
)


def test_what_changes_no_prompt_passes(server, upstream):
    usual = {"tools": [], "chat_template": None, "include_reasoning": True}
    with server.client() as client:
        found = client.post("/v1/chat/completions", json=said(WINDOW, **usual))
    assert found.json()["holdfast"]["verdict"]["watched"]


def test_what_cannot_be_watched_is_not_asked_for(server, upstream):
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    asked = said(WINDOW)["messages"]
    with server.client() as client:
        for body in (
            {"messages": image},
            {"messages": 7},
            said(WINDOW, n=2),
            *(said(WINDOW, **each) for each in UNREAD),
            {"messages": [*asked, CALLING, *asked]},
        ):
            found = client.post("/v1/chat/completions", json=body)
            assert found.status_code == 400
            assert found.json()["error"]["code"] == "not_watched"
    assert upstream.sent == []


def refusal(capsys, *words):
    status = run(["guard", "serve", "organism:cliff", "--port", "0", *map(str, words)])
    return status, " ".join(capsys.readouterr().err.split())


def test_an_upstream_with_another_template_is_refused(capsys, upstream, word_guard):
    upstream.template = "<|im_start|>user\nHello.<|im_end|>\n"
    try:
        status, said = refusal(
            capsys, "--guard", word_guard, "--upstream", upstream.url
        )
    finally:
        upstream.template = None
    assert status == 3
    assert "another prompt" in said


def test_an_upstream_that_is_not_there_is_told(capsys, word_guard):
    url = "http://127.0.0.1:9/v1"
    status, said = refusal(capsys, "--guard", word_guard, "--upstream", url)
    assert status == 5
    assert url in said
    assert "--upstream" in said
    assert "drawn" not in said


def test_heads_of_another_server_s_model_cannot_be_scaled(capsys, word_guard, upstream):
    words = ("--guard", word_guard, "--upstream", upstream.url, "--policy", "steer")
    status, said = refusal(capsys, *words)
    assert status == 2
    assert "--policy" in said
