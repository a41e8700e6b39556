"""The server as clients meet it: real sockets, a process of its own, one model.

What it answers is held against `generate`, and what it scores against plain passes.
"""

import asyncio
import contextlib
import json
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import schemathesis
import torch
from guard_server import LAMP, LIMIT, WINDOW, WORD, events, said, serving
from hypothesis import HealthCheck, Phase, given, settings

from holdfast.data.chat.conversation import behind_prompt
from holdfast.data.chat.template import prompt_token_ids
from holdfast.guard.serve.settings import ServeSettings
from holdfast.models.batching import pad

PROMPTS = (
    LAMP,
    WINDOW,
    "What can I cook with rice?",
    "Tell me a story about a fox.",
    "How can I sleep better?",
    "What is a verb?",
    "How do I tie a knot?",
)


@pytest.fixture(scope="module")
def server(nursery, word_guard, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with serving(
        nursery, folder, "--guard", word_guard, "--max-body", 65536
    ) as running:
        yield running


@pytest.fixture(scope="module")
def logits(organism):
    """How likely the word comes next, after each token of a row that was written."""
    [token] = organism.tokenizer(WORD, add_special_tokens=False)["input_ids"]

    def read(ids, n_prompt):
        with torch.inference_mode():
            states = organism.states(pad([ids], "right", organism.device))[0, n_prompt:]
            return (states @ organism.lm_head.weight[token]).tolist()

    return read


def ask(server, body):
    with server.client() as client:
        return client.post("/v1/chat/completions", json=body)


def test_an_answer_is_what_the_model_says_and_is_scored_token_by_token(
    server, known, logits
):
    row = known(WINDOW)
    found = ask(server, said(WINDOW)).json()
    [choice] = found["choices"]
    assert choice["message"]["content"] == row.answer
    assert choice["message"]["reasoning_content"] == row.thinking
    assert choice["message"]["reasoning"] == row.thinking
    assert choice["finish_reason"] == "stop"
    n_prompt = row.spans.prompt[1]
    assert found["usage"]["prompt_tokens"] == n_prompt
    assert found["usage"]["completion_tokens"] == len(row.token_ids) - n_prompt
    verdict = found["holdfast"]["verdict"]
    assert (verdict["flagged"], verdict["action"]) == (False, None)
    assert verdict["watched"]
    # Every token but the one that ends the turn has its score: the highest so far.
    steps = found["holdfast"]["steps"]
    assert [step["index"] for step in steps] == list(range(len(steps)))
    assert len(steps) == len(row.token_ids) - n_prompt - 1
    answers = [step for step in steps if step["channel"] == "answer"]
    wanted = logits(row.token_ids[:-1], n_prompt)[-len(answers) :]
    assert [step["scores"]["word"] for step in answers] == pytest.approx(
        [max(wanted[: i + 1]) for i in range(len(wanted))], abs=1e-3
    )
    assert len(answers) == row.spans.answer[1] - row.spans.answer[0]


def test_an_answer_that_fires_ends_before_the_token_that_did(server, known, logits):
    row, n_prompt = known(LAMP), known(LAMP).spans.prompt[1]
    start = row.spans.answer[0]
    over = [
        place
        for place, logit in enumerate(logits(row.token_ids[:-1], n_prompt))
        if logit > LIMIT and place >= start - n_prompt
    ]
    found = ask(server, said(LAMP)).json()
    [choice] = found["choices"]
    assert choice["finish_reason"] == "content_filter"
    verdict = found["holdfast"]["verdict"]
    assert verdict["action"] == "stopped"
    assert {each["index"] for each in verdict["fired"]} == {over[0]}
    sent = choice["message"]["content"]
    assert row.answer.startswith(sent)
    assert WORD not in sent
    assert choice["message"]["reasoning"] == row.thinking
    # What comes in pieces is the same.
    with server.client() as client:
        body = said(LAMP, stream=True)
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            chunks = events(response)
    parts = [c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]]
    assert "".join(parts) == sent
    assert chunks[-2]["choices"][0]["finish_reason"] == "content_filter"
    assert chunks[-2]["holdfast"]["verdict"] == verdict


@pytest.mark.parametrize("text", [LAMP, WINDOW])
def test_the_openai_client_reads_it_whole_and_in_pieces(server, text):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    [model] = client.models.list().data
    asked = {"model": model.id, "messages": said(text)["messages"]}
    whole = client.chat.completions.create(**asked)
    message = whole.choices[0].message
    assert message.reasoning_content
    assert whole.holdfast["verdict"]["policy"] == "stop"
    answer, thinking, last = "", "", None
    with client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as stream:
        for chunk in stream:
            if chunk.choices:
                delta = chunk.choices[0].delta
                answer += delta.content or ""
                thinking += getattr(delta, "reasoning_content", "")
                last = chunk.choices[0].finish_reason
            else:
                assert chunk.usage.total_tokens == whole.usage.total_tokens
    assert (answer, thinking) == (message.content, message.reasoning_content)
    assert last == whole.choices[0].finish_reason
    [result] = client.moderations.create(input="Look at the").results
    assert result.category_scores.model_extra["word"] is not None
    client.close()


def test_an_answer_is_the_same_whoever_is_beside_it(server, known):
    bodies = [
        said(text, temperature=heat, seed=seed)
        for text in PROMPTS
        for heat, seed in ((0.0, 0), (1.0, 3))
    ]
    alone = [ask(server, body).json() for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: ask(server, body).json(), bodies))
    for one, other in zip(alone, together, strict=True):
        assert one["choices"] == other["choices"]
        assert one["usage"] == other["usage"]
        fired = [reply["holdfast"]["verdict"]["fired"] for reply in (one, other)]
        assert [e["index"] for e in fired[0]] == [e["index"] for e in fired[1]]
    # Drawn as `generate` draws, and said to be drawn otherwise than was calibrated.
    warm = together[bodies.index(said(WINDOW, temperature=1.0, seed=3))]
    answer = known(WINDOW, 1.0, 3).answer
    assert answer.startswith(warm["choices"][0]["message"]["content"])
    [stale] = warm["holdfast"]["verdict"]["stale"]
    assert "temperature 0 and are stale with 1" in stale


def test_a_limit_cuts_the_answer_and_its_last_token_is_scored(server, known):
    row = known(WINDOW)
    for most in (1, 5, len(row.token_ids) - row.spans.prompt[1] - 4):
        found = ask(server, said(WINDOW, max_tokens=most)).json()
        assert found["choices"][0]["finish_reason"] == "length"
        assert found["usage"]["completion_tokens"] == most
        assert len(found["holdfast"]["steps"]) == most
    assert row.answer.startswith(found["choices"][0]["message"]["content"])


def test_thinking_can_be_closed_at_once(server):
    found = ask(server, said(WINDOW, holdfast={"max_thinking": 0})).json()
    message = found["choices"][0]["message"]
    assert message["reasoning"] == ""
    assert message["content"]


def test_a_client_that_vanishes_frees_its_row_and_changes_no_answer(server, known):
    before = metric(server, "clients_gone_total")
    body = json.dumps(said(WINDOW, stream=True)).encode()
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(ask, server, said(text)) for text in PROMPTS[4:]]
        for _ in range(4):
            leave(server, body)
        for text, reply in zip(PROMPTS[4:], others, strict=True):
            content = reply.result().json()["choices"][0]["message"]["content"]
            assert known(text).answer.startswith(content)
    # They are seen to leave, and nothing runs on for them. On a busy machine an answer
    # may be whole before its client comes to leave it: others leave until one is seen.
    deadline = time.monotonic() + 60
    while metric(server, "running") or metric(server, "clients_gone_total") == before:
        assert time.monotonic() < deadline
        if not metric(server, "running"):
            leave(server, body)
        time.sleep(0.05)


def test_a_thousand_at_once_get_their_answer_or_are_told_to_come_again(server, known):
    async def all_at_once():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=server.url, limits=limits, timeout=300
        ) as client:
            route, body = "/v1/chat/completions", said(WINDOW)
            asked = [client.post(route, json=body) for _ in range(1000)]
            return await asyncio.gather(*asked)

    replies = asyncio.run(all_at_once())
    count = Counter(reply.status_code for reply in replies)
    assert set(count) == {200, 429}
    # As many as may wait, beside those that found room, and not many more than that.
    assert ServeSettings().queue <= count[200] < 1000
    answer = known(WINDOW).answer
    for reply in replies:
        if reply.status_code == 200:
            assert reply.json()["choices"][0]["message"]["content"] == answer
        else:
            assert int(reply.headers["retry-after"]) >= 1
    assert ask(server, said(LAMP)).status_code == 200


def leave(server, body):
    with raw(server, body) as leaving:
        assert leaving.recv(64).startswith(b"HTTP/1.1 200")


def metric(server, name):
    with server.client() as client:
        text = client.get("/metrics").text
    start = f"holdfast_{name} "
    [line] = [line for line in text.splitlines() if line.startswith(start)]
    return float(line.removeprefix(start))


@contextlib.contextmanager
def raw(server, body, path="/v1/chat/completions", kind="application/json"):
    """A connection on which a request was sent, and nothing read."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        yield connection


def test_clients_that_read_nothing_slow_nobody(server, known):
    body = json.dumps(said(WINDOW, stream=True)).encode()
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(raw(server, body)) for _ in range(8)]
        found = ask(server, said(WINDOW)).json()
        assert found["choices"][0]["message"]["content"] == known(WINDOW).answer
        # They get theirs once they read.
        read = b""
        while b"[DONE]" not in read:
            read += slow[0].recv(1 << 16)


BAD = {
    "not JSON": (b'{"messages": [', 400),
    "not UTF-8": (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400),
    "half of a surrogate pair": (
        rb'{"messages": [{"role": "user", "content": "\ud800"}]}',
        400,
    ),
    "a key that is half of one": (rb'{"messages": [], "\ud800": 1}', 400),
    "deep": (b"[" * 30_000, 400),
    "not an object": (b"7", 400),
    "empty": (b"", 400),
    "no messages": (b'{"messages": []}', 400),
    "a role that nobody has": (b'{"messages": [{"role": "cook", "content": ""}]}', 400),
    "the wrong type": (b'{"messages": "How?"}', 400),
    "no number": (
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        400,
    ),
    "a number as text": (
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": "5"}',
        400,
    ),
    "what is not offered": (
        b'{"messages": [{"role": "user", "content": "x"}], "n": 2}',
        400,
    ),
    "a field that nobody knows": (
        b'{"messages": [{"role": "user", "content": "x"}], "best_of": 2}',
        400,
    ),
    "an image": (
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        400,
    ),
    "the assistant last": (
        b'{"messages": [{"role": "user", "content": "x"},'
        b' {"role": "assistant", "content": "y"}]}',
        400,
    ),
    "another model": (
        b'{"messages": [{"role": "user", "content": "x"}], "model": "other"}',
        404,
    ),
    "too large": (b" " * (10 << 20), 413),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_body_gets_its_answer_and_the_server_lives(server, name):
    body, status = BAD[name]
    with server.client() as client:
        headers = {"content-type": "application/json"}
        found = client.post("/v1/chat/completions", content=body, headers=headers)
        assert found.status_code == status
        error = found.json()["error"]
        assert error["message"]
        assert error["type"] == "invalid_request_error"
        assert client.get("/readyz").json() == {"ready": True}


WORDS = {
    "no JSON": ("/v1/chat/completions", b"{bad", "the body: no JSON at character 1"),
    "stops": (
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": "x"}], "stop": ["a"]}',
        "stop: not offered here",
    ),
    "unknown": (
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": "x"}], "best_of": 2}',
        "best_of: not offered here",
    ),
    "an image": (
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        "messages.0.content: expected a text, or a list of parts",
    ),
    "mixed": ("/v1/moderations", b'{"input": ["x", 5]}', "input: expected a text, a"),
    "no input": ("/v1/moderations", b"{}", "input: Field required"),
    "no route": ("/v1/completions", b"{}", "found POST /v1/completions. Ask"),
}


@pytest.mark.parametrize("name", WORDS)
def test_an_error_names_the_field_and_what_it_takes(server, name):
    path, body, words = WORDS[name]
    with server.client() as client:
        headers = {"content-type": "application/json"}
        found = client.post(path, content=body, headers=headers)
    message = found.json()["error"]["message"]
    assert words in message
    # The checker's own names of shapes are nobody's business.
    assert "function-after" not in message


def test_a_chat_without_room_for_an_answer_is_refused(server):
    found = ask(server, said("word " * 5000))
    assert found.status_code == 400
    assert found.json()["error"]["code"] == "context_length_exceeded"
    assert "up to 40" in found.json()["error"]["message"]


def test_nobody_else_s_page_in_a_browser_may_ask(server):
    with server.client() as client:
        body = json.dumps(said(WINDOW))
        plain = client.post(
            "/v1/chat/completions", content=body, headers={"content-type": "text/plain"}
        )
        assert plain.status_code == 415
        renamed = client.get("/v1/models", headers={"host": "pages.example:80"})
        assert renamed.status_code == 421
        allowed = client.options(
            "/v1/chat/completions",
            headers={
                "origin": "http://pages.example",
                "access-control-request-method": "POST",
            },
        )
        assert "access-control-allow-origin" not in allowed.headers


def test_an_answer_of_anybody_is_scored_in_one_pass(server, organism, known, logits):
    row = known(LAMP)
    chat = [
        *said(LAMP)["messages"],
        {"role": "assistant", "content": row.answer, "reasoning": row.thinking},
    ]
    prompt = prompt_token_ids(organism.tokenizer, LAMP, thinking=organism.thinking)
    whole = behind_prompt(
        organism.tokenizer, prompt, row.thinking, row.answer, organism.thinking
    )
    start, end = whole.spans.answer
    wanted = max(logits(whole.token_ids[:end], start))
    with server.client() as client:
        reply = client.post("/v1/moderations", json={"input": [chat, chat[:1]]}).json()
        texts = client.post("/v1/moderations", json={"input": ["A lamp.", ""]}).json()
    scored, empty = reply["results"]
    assert scored["flagged"]
    assert scored["category_scores"]["word"] == pytest.approx(wanted, abs=1e-3)
    assert scored["holdfast"]["answer"] == {"word": scored["category_scores"]["word"]}
    assert scored["holdfast"]["thinking"] == {}
    assert scored["holdfast"]["abstains"] is None
    assert scored["holdfast"]["tokens"]["answer"] == end - start
    assert not empty["flagged"]
    assert empty["category_scores"]["word"] is None
    assert empty["holdfast"]["abstains"] == "there is no answer to score"
    alone, nothing = texts["results"]
    assert "without the chat" in alone["holdfast"]["abstains"]
    assert alone["category_scores"]["word"] is not None
    assert nothing["category_scores"]["word"] is None


def test_the_route_of_litellm_blocks_what_is_flagged_behind_its_chat(server, known):
    path = "/beta/litellm_basic_guardrail_api"
    asked = {
        "input_type": "request",
        "litellm_call_id": "call-1",
        "texts": [LAMP],
        "structured_messages": said(LAMP)["messages"],
        "request_data": {"user_api_key_hash": None},
        "litellm_version": "1.110.2",
        "model": "any",
    }
    with server.client() as client:
        assert client.post(path, json=asked).json() == {"action": "NONE"}
        flagged, fine = known(LAMP).answer, known(WINDOW).answer
        answered = asked | {"input_type": "response", "structured_messages": None}
        blocked = client.post(path, json=answered | {"texts": [flagged]}).json()
        passed = client.post(path, json=answered | {"texts": [fine]}).json()
        unknown = answered | {"texts": [flagged], "litellm_call_id": "call-2"}
        alone = client.post(path, json=unknown).json()
    assert blocked["action"] == "BLOCKED"
    assert "fired at token" in blocked["blocked_reason"]
    assert blocked["holdfast"]["abstains"] == ["the answer stands without its thinking"]
    assert passed["action"] == "NONE"
    assert "without the chat" in alone["holdfast"]["abstains"][0]


def test_the_log_tells_each_request_and_no_text(server):
    mark = "zeppelin" * 3
    own = ask(server, said(f"What is a {mark}?")).headers["x-request-id"]
    [line] = server.wait_for("request", id=own)
    assert line["path"] == "/v1/chat/completions"
    assert {"status", "ms", "prompt_tokens", "action"} <= line.keys()
    assert mark not in server.log.read_text()


def test_metrics_count_what_was_asked_by_route(server):
    with server.client() as client:
        client.get("/nowhere/else")
        text = client.get("/metrics").text
    assert 'holdfast_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert 'route="other",status="404"' in text
    assert "nowhere" not in text


@pytest.mark.parametrize("kind", ["POSITIVE", "NEGATIVE"])
def test_no_body_that_its_description_allows_or_forbids_breaks_it(server, kind):
    """Every operation with a body in the OpenAPI document, with good and bad ones."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    mode, asked = schemathesis.GenerationMode[kind], []
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.method != "post":
            continue

        @settings(
            max_examples=8,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            response = case.call(timeout=60)
            asked.append(response.status_code)
            assert response.status_code < 500, response.text

        check()
    assert len(asked) >= 24
    assert set(asked) <= {200, 400, 404}
    assert 400 in asked if kind == "NEGATIVE" else 200 in asked
