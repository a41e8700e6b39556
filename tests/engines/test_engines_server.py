"""A server draws what the model draws: by token ids, by text, and by chats."""

from dataclasses import replace

import pytest

from engines.served_organism import LLAMA, OLLAMA, VLLM, serving_organism
from engines.test_engines_rounds import LONG, NONE, PROMPTS, SHORT, asks_of
from holdfast.engines.port import Around, Ask, HfEngine
from holdfast.engines.serving.server import ServerEngine
from holdfast.engines.settings import EngineSettings
from holdfast.errors import SettingsError

pytest.importorskip("httpx")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def engine_at(server, adapter, **changes):
    named = {"endpoint_timeout": 20.0, "endpoint_attempts": 3, **changes}
    settings = EngineSettings("server", server.url, **named)
    engine = ServerEngine(settings, adapter)
    engine.http.reach = engine.http.reach._replace(backoff=0.001)
    return engine


def asks(adapter):
    for ask, text in zip(asks_of(adapter), PROMPTS, strict=True):
        yield ask._replace(messages=({"role": "user", "content": text},))


def rows(engine, asked, sampling, around=None):
    parts = engine.draw(list(asked), sampling, around or Around())
    made = sorted((each for part in parts for each in part), key=lambda e: e.index)
    return [replace(each, min_top2_gap=0.0, min_margin=0.0) for each in made]


@pytest.mark.parametrize("sampling", [LONG, SHORT, NONE])
def test_token_ids_are_the_rows_of_the_model(cliff, sampling):
    with serving_organism(cliff, VLLM) as server:
        engine = engine_at(server, cliff)
        made = rows(engine, asks(cliff), sampling)
        assert engine.record()["prompts_sent_as"] == "tokens"
        assert engine.record()["prompts_compared_by"] == "tokens"
    assert made == rows(HfEngine(cliff), asks(cliff), sampling)
    assert all(type(each["prompt"]) is list for each in server.written("/completions"))


@pytest.mark.parametrize("sampling", [LONG, SHORT])
def test_text_is_tokenised_again_and_gives_the_same_rows(cliff, sampling):
    with serving_organism(cliff, LLAMA) as server:
        engine = engine_at(server, cliff)
        made = rows(engine, asks(cliff), sampling)
        assert engine.record()["tokens_told_as"] == "text"
    assert {each.tokens for each in made} == {"text"}
    known = [replace(each, tokens="drawn") for each in made]
    assert known == rows(HfEngine(cliff), asks(cliff), sampling)


def test_a_server_that_wraps_prompts_is_asked_by_chats(cliff):
    with serving_organism(cliff, OLLAMA) as server:
        engine = engine_at(server, cliff)
        made = rows(engine, asks(cliff), LONG)
        assert engine.record()["prompts_sent_as"] == "chat"
    for mine, theirs in zip(
        rows(HfEngine(cliff), asks(cliff), LONG), made, strict=True
    ):
        assert (mine.thinking, mine.answer) == (theirs.thinking, theirs.answer)
        assert (mine.finish, mine.closed) == (theirs.finish, theirs.closed)
        # The end token is not told.
        assert mine.token_ids[: len(theirs.token_ids)] == theirs.token_ids
        assert mine.spans == theirs.spans


@pytest.mark.parametrize("flavour", [OLLAMA, {**VLLM, "wraps": True, "ids": False}])
def test_a_thought_that_was_cut_is_no_answer(cliff, flavour):
    few = replace(SHORT, max_thinking=4, max_answer=2)
    with serving_organism(cliff, flavour) as server:
        made = rows(engine_at(server, cliff), asks(cliff), few)
    assert {(e.closed, e.finish, e.answer, e.forced_close) for e in made} == {
        (False, "length", "", False)
    }
    assert {e.spans.thinking[1] - e.spans.thinking[0] for e in made} == {4}


def test_a_chat_cannot_go_on_behind_a_given_thinking(cliff):
    with serving_organism(cliff, OLLAMA) as server:
        engine = engine_at(server, cliff)
        with pytest.raises(SettingsError, match="takes chats alone"):
            rows(engine, asks(cliff), SHORT, Around(thinking_done=True))


def test_a_given_thinking_is_gone_on_from(cliff):
    behind = [
        Ask((*each.token_ids, *cliff.encode("Sure.\n</think>\n\n")), each.seed)
        for each in asks_of(cliff)
    ]
    around = Around(thinking_done=True)
    with serving_organism(cliff, VLLM) as server:
        made = rows(engine_at(server, cliff), behind, SHORT, around)
    assert made == rows(HfEngine(cliff), behind, SHORT, around)


def test_an_adapter_is_asked_for_by_its_name(cliff, tmp_path):
    with serving_organism(cliff, VLLM, names=("tiny", "top")) as server:
        engine = engine_at(server, cliff, endpoint_model="tiny")
        engine.hold({"top": tmp_path})
        asked = [each._replace(condition="top") for each in asks(cliff)]
        rows(engine, asked, NONE)
        with pytest.raises(SettingsError, match="none of the name random-1"):
            engine.hold({"top": tmp_path, "random-1": tmp_path})
    # The server is gone, and its rows may be there.
    gone = EngineSettings("server", "http://127.0.0.1:9/v1", endpoint_attempts=1)
    with pytest.raises(SettingsError, match="none of the name top"):
        ServerEngine(gone, cliff).hold({"top": tmp_path})
    *_, (_, last) = [each for each in server.posted if each[1]]
    assert last["model"] == "top"


def test_defaults_of_the_server_are_switched_off(cliff):
    with serving_organism(cliff, VLLM) as server:
        rows(engine_at(server, cliff), asks(cliff), replace(NONE, temperature=0.7))
    *_, last = server.written("/completions")
    assert (last["top_k"], last["min_p"], last["repetition_penalty"]) == (-1, 0.0, 1.0)
    assert (last["temperature"], last["top_p"]) == (0.7, 1.0)
    assert 0 <= last["seed"] < 2**31
