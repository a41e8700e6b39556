"""What comes from an upstream or goes to one: read along as a whole, or told."""

import asyncio
import json
import math
from pathlib import Path

import httpx
import pytest
from guard_server import LAMP, said

from holdfast.data.chat.template import prompt_token_ids
from holdfast.guard.monitor.bundle import read_bundle
from holdfast.guard.monitor.monitor import Monitor
from holdfast.guard.serve.asks import Verdict
from holdfast.guard.serve.chat import Desk, Refused
from holdfast.guard.serve.moderation import chat_item
from holdfast.guard.serve.settings import ServeSettings
from holdfast.guard.serve.telemetry import Metrics
from holdfast.guard.serve.upstream import (
    Passage,
    Sidecar,
    Stream,
    passed_through,
    whole_answer,
)
from holdfast.guard.serve.web.shapes import ChatRequest, Message
from holdfast.guard.serve.wire import parsed, sendable, unread
from holdfast.models.loading.causal import adapt
from tiny_models import tiny_model

ASKED = {"role": "user", "content": LAMP}


@pytest.fixture(scope="module")
def monitor(organism, word_guard):
    return Monitor(organism, read_bundle(word_guard))


@pytest.fixture(scope="module")
def desk(organism, monitor):
    return Desk(organism, monitor, ServeSettings())


@pytest.fixture
def stream(desk, organism, monitor):
    """An answer on its way that nothing of was read."""
    settings = ServeSettings()
    prompt = prompt_token_ids(organism.tokenizer, LAMP, thinking=organism.thinking)

    async def call(reading):
        return reading()

    sidecar = Sidecar(monitor, prompt, desk)
    verdict = Verdict("stop", True, acts_on="word")
    return Stream(settings, desk, Metrics(), call, sidecar, verdict)


def chunk(finish=None, more=None, **delta):
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "up", "choices": [choice], **(more or {})}


def passed(stream, chunks):
    lines = b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in chunks)

    async def collect():
        response = httpx.Response(200, content=lines + b"data: [DONE]\n\n")
        return [each async for each in passed_through(response, stream)]

    return asyncio.run(collect())


def test_what_stands_beside_the_text_that_fired_does_not_leave(stream, known):
    """A server may repeat its words outside of the choices."""
    row = known(LAMP)
    beside = {"__verbose": {"content": row.answer}}
    found = passed(
        stream,
        [
            chunk(reasoning=row.thinking),
            chunk(content=f"\n\n{row.answer}", more=beside),
            chunk("stop"),
        ],
    )
    assert found[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert found[-1]["id"] == "up"
    assert "whole" not in json.dumps(found)


def test_an_error_of_the_upstream_ends_its_stream_with_the_verdict(stream):
    error = {"message": "the device is lost"}
    text = {"choices": chunk(content="unread")["choices"]}
    chunks = [chunk(reasoning="So"), {"error": error} | text, chunk(content="a")]
    *_, last = passed(stream, chunks)
    assert last["error"] == error
    assert last["holdfast"]["verdict"]["watched"]
    assert "choices" not in last


def test_a_field_for_errors_that_is_empty_ends_nothing(stream):
    none = {"error": None}
    chunks = [chunk(reasoning="So", more=none), chunk("stop", more=none)]
    found = passed(stream, [*chunks, {"choices": [], "usage": {}, **none}])
    assert len(found) == 3
    assert found[1]["holdfast"]["verdict"]["watched"]


@pytest.mark.parametrize(
    "delta",
    [
        {"refusal": "some words"},
        {"tool_calls": [{"id": "a"}]},
        {"content": [{"type": "text", "text": "some words"}]},
        {"reasoning": "one", "reasoning_content": "another"},
    ],
)
def test_a_part_that_nobody_reads_along_is_not_let_out(stream, delta):
    found = passed(stream, [chunk(reasoning="So"), chunk(**delta), chunk("stop")])
    assert found[-1]["holdfast"]["verdict"]["action"] == "stopped"
    assert not found[-1]["holdfast"]["verdict"]["watched"]
    assert len(found) == 2


def test_parts_that_are_empty_or_said_twice_alike_are_read_along():
    empty = {"refusal": None, "tool_calls": [], "annotations": None}
    twice = {"reasoning": "one", "reasoning_content": "one"}
    assert unread({"role": "assistant", "content": "a", **empty, **twice}) == []


def test_an_upstream_whose_json_is_too_deep_is_told(stream):
    deep = b"[" * 100_000
    with pytest.raises(ValueError, match="deeper"):
        parsed(deep)
    with pytest.raises(Refused) as refused:
        asyncio.run(whole_answer(httpx.Response(200, content=deep), stream))
    assert refused.value.status == 502


@pytest.mark.parametrize(
    "odd",
    [{"temperature": math.nan}, {"top_p": math.inf}, {"user": "\ud800"}, {"stream": 1}],
)
def test_what_is_no_json_is_refused_before_an_upstream_is_asked(desk, monitor, odd):
    settings = ServeSettings(guard=Path("b"), upstream="http://127.0.0.1:9/v1")
    assert sendable(said(LAMP))

    async def ask():
        passage = Passage(settings, desk, monitor, Metrics(), ())
        try:
            await passage.open(said(LAMP, **odd), lambda reading: reading)
        finally:
            await passage.client.aclose()

    with pytest.raises(Refused) as refused:
        asyncio.run(ask())
    assert (refused.value.status, refused.value.code) == (400, "invalid_request")


def test_messages_of_which_a_template_takes_more_are_told(desk, tokenizer):
    """This one says an earlier thinking again, and the organism's leaves it out."""
    answer = {"role": "assistant", "content": "b", "reasoning_content": "c"}
    rows, texts = [{**ASKED, "name": "d"}, answer, ASKED], [LAMP, "b", LAMP]
    assert desk.leaves_out(rows, texts)
    other = Desk(adapt(tiny_model(), tokenizer), None, ServeSettings())
    assert not other.leaves_out(rows, texts)
    assert other.leaves_out(rows[:1], texts[:1])


def test_a_thinking_that_nobody_ended_has_no_end_and_is_no_answer(desk, organism):
    thought = "So, here is a new message."
    n = len(organism.tokenizer(thought, add_special_tokens=False)["input_ids"])

    def read(**said):
        answer = Message(role="assistant", **said)
        return chat_item(desk, [Message(**ASKED), answer])

    for said_ in ({"content": f"<think>\n{thought}"}, {"reasoning": thought}):
        assert len(read(**said_).written) == n
        assert read(**said_).abstains is None
    ended = read(content=f"<think>\n{thought}\n</think>\n\n")
    assert len(ended.written) > n
    assert ended.written[:n] == read(reasoning=thought).written
    refused = read(content=None, refusal="No.", reasoning=thought)
    assert refused.written == read(content="No.", reasoning=thought).written


@pytest.mark.parametrize(
    "odd", [{"continuous_usage_stats": True}, {"include_obfuscation": True}, {"new": 1}]
)
def test_options_of_a_stream_that_nobody_meets_are_refused(odd):
    usual = {"include_usage": True, "include_obfuscation": False}
    assert ChatRequest(messages=[ASKED], stream_options=usual)
    with pytest.raises(ValueError, match="stream_options"):
        ChatRequest(messages=[ASKED], stream_options=odd)
