"""What servers send that looks like an answer of this row, and is none."""

import json
import sys

import pytest
import torch

from engines.served_organism import LLAMA, OLLAMA, VLLM, reply_of, serving_organism
from engines.test_engines_rounds import PROMPTS
from engines.test_engines_server import asks, engine_at, rows
from holdfast.data.chat.template import prompt_token_ids
from holdfast.data.prompts import Prompt
from holdfast.data.served import Served
from holdfast.data.suites import Item, SuiteFile
from holdfast.engines import proof
from holdfast.engines.adapters import prove_edits
from holdfast.engines.port import PLAINLY, Around, Ask, HfEngine
from holdfast.engines.serving.journal import Journal
from holdfast.engines.serving.replies import Sent, is_text_of, understood
from holdfast.engines.settings import EngineSettings
from holdfast.errors import EndpointError, EngineError, SettingsError
from holdfast.heads import ablate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.interventions import HeadEdit
from holdfast.report.progress import Silent
from holdfast.rollout.engine import OtherEngine
from holdfast.rollout.questions import Question
from holdfast.rollout.rows import to_table
from holdfast.rollout.sampling import Drawing, draw_answers
from holdfast.rollout.session import Session
from holdfast.study import Study
from holdfast.study.directory import Stage

pytest.importorskip("httpx")

FEW = Sampling(temperature=0, max_thinking=7, max_answer=5)
LONG = Sampling(temperature=0, max_thinking=80, max_answer=10)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def spelling(adapter):
    text = f"Hello <|end|> {PROMPTS[1]}"
    ids = prompt_token_ids(adapter.tokenizer, text, thinking=adapter.thinking)
    return Ask(tuple(ids), 1, ({"role": "user", "content": text},))


@pytest.mark.parametrize("flavour", [LLAMA, OLLAMA])
def test_control_tokens_that_a_prompt_spells_are_read_by_no_server_of_texts(
    cliff, flavour
):
    failed = {}
    asked = [next(asks(cliff)), spelling(cliff)]
    with serving_organism(cliff, flavour) as server:
        around = Around(failed=failed.__setitem__)
        made = rows(engine_at(server, cliff), asked, FEW, around)
    assert [each.index for each in made] == [0]
    assert list(failed) == [1]
    assert "control tokens that the prompt spells" in failed[1]


def test_control_tokens_that_a_prompt_spells_stay_text_where_tokens_are_sent(cliff):
    with serving_organism(cliff, VLLM) as server:
        made = rows(engine_at(server, cliff), [spelling(cliff)], FEW)
    assert made == rows(HfEngine(cliff), [spelling(cliff)], FEW)


def test_a_closing_tag_that_a_server_keeps_to_itself_is_no_end_of_the_row(cliff):
    asked = list(asks(cliff))[:2]
    with serving_organism(cliff, VLLM) as server:

        def odd(path, body, number):
            if not body.get("stop"):
                return None
            said = server.complete(body)
            [choice] = said["choices"]
            ids = choice["token_ids"]
            while body["stop"][0] in server.decode(ids):
                ids.pop()
            choice["text"] = server.decode(ids)
            return reply_of(said)

        server.odd = odd
        made = rows(engine_at(server, cliff), asked, LONG)
    assert any(each.closed and not each.forced_close for each in made)
    assert made == rows(HfEngine(cliff), asked, LONG)


@pytest.mark.parametrize(
    ("sent", "thinking", "answer", "closed"),
    [
        # A thinking that was cut, told as if it were the answer.
        (Served("I wonder", "", "reasoning", "length"), "I wonder", "", False),
        (Served("I wonder", None, None, "length"), "I wonder", "", False),
        (Served("Yes", "I wonder", "reasoning", "length"), "I wonder", "Yes", True),
        (Served("Yes", "", "reasoning", "stop"), "", "Yes", True),
        (Served("", "", "reasoning", "length"), "", "", False),
    ],
)
def test_an_empty_field_of_thinking_does_not_make_an_answer(
    cliff, sent, thinking, answer, closed
):
    bare = sent.finish != "length"
    said = understood(sent, cliff.thinking, bare_answers=bare, place="row 0")
    assert said == (thinking, answer, closed, sent.finish)


def test_tokens_are_those_of_the_whole_text(cliff):
    tokenizer, text = cliff.tokenizer, "The capital is Paris"
    ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    end = min(cliff.stop_ids)
    assert is_text_of(tokenizer, ids, text)
    assert is_text_of(tokenizer, (*ids, end), text)
    assert is_text_of(tokenizer, ids, f"{text}{tokenizer.decode([end])}")
    assert is_text_of(tokenizer, ids, text.removesuffix("Paris"), "Paris")
    assert not is_text_of(tokenizer, ids[:2], text)
    assert not is_text_of(tokenizer, ids, "The")
    assert not is_text_of(tokenizer, ids, "A capital is Paris")


def test_rows_are_found_again_whatever_batch_they_were_in(tmp_path):
    with Journal(tmp_path / "one.jsonl") as journal:
        journal.keep("row", [Sent("Yes", token_ids=(1, 2), finish="stop")])
    (tmp_path / "cut.jsonl").write_text(json.dumps({"row": "row"})[:-2])
    known = Journal(tmp_path / "two.jsonl").known("row")
    assert known == [Sent("Yes", token_ids=(1, 2), finish="stop")]


def test_questions_of_an_ablation_are_not_drawn_by_another_model(
    cliff, monkeypatch, tmp_path
):
    """Nothing else of an ablation may need the engine, so that nothing else sees it."""
    monkeypatch.setattr(proof, "THINKING", 6)
    monkeypatch.setattr(proof, "ANSWER", 4)
    settings = {"rollout": {"system_prompt": None, "seed": 0}}
    study = Study(tmp_path, {"settings": settings, "stages": {}})
    stage = Stage(study, "ablation", "redo", Silent())
    prompt = Prompt("p", "p", "How many lamps are two lamps?", "benign", "t", None)
    asked = SuiteFile((Item("own", "utility", prompt, prompt.text),), {})
    with serving_organism(cliff, VLLM) as server:

        def odd(path, body, number):
            if path != "/v1/completions":
                return None
            said = server.complete(body | {"max_tokens": 1})
            [choice] = said["choices"]
            choice["token_ids"] = [40 + n for n in range(body["max_tokens"])]
            text = server.decode(choice["token_ids"])
            choice |= {"text": text, "finish_reason": "length"}
            return reply_of(said)

        server.odd = odd
        session = Session(cliff, engine=EngineSettings("server", server.url))
        with pytest.raises(EngineError, match="another model"):
            ablate.draw_utility(stage, session, asked, FEW)


def test_questions_that_nobody_answers_are_not_called_too_long(
    cliff, monkeypatch, tmp_path
):
    here = sys.modules["holdfast.rollout.engine"]
    monkeypatch.setattr(here, "prove_engine", lambda *_: {})
    study = Study.create(tmp_path / "study")
    [ask] = list(asks(cliff))[:1]
    prompt = Prompt("p", "p", PROMPTS[0], "benign", "t", None)
    question = Question("benign", prompt, 0, 0, ask.token_ids)

    def odd(path, body, number):
        long = body.get("max_tokens", 0) > 2
        return reply_of({"error": {"message": "too long"}}, 400) if long else None

    with serving_organism(cliff, VLLM, odd=odd) as server:
        session = Session(cliff, engine=EngineSettings("server", server.url))
        drawing = Drawing(FEW, lambda made: to_table([]))
        with (
            pytest.raises(EndpointError, match="too long"),
            study.stage("rollout", {}, {}, progress=Silent(), done="") as stage,
        ):
            draw_answers(stage, session, drawing, [question])


def test_a_run_does_not_go_on_with_another_model_of_the_endpoint(
    cliff, monkeypatch, tmp_path
):
    here = sys.modules["holdfast.rollout.engine"]
    study = Study.create(tmp_path / "study")
    prompt = Prompt("p", "p", PROMPTS[0], "benign", "t", None)
    question = Question("benign", prompt, 0, 0, (1, 2))
    settings = EngineSettings("server", "http://127.0.0.1:9/v1")

    def begun(model):
        record = {"name": "server", "model": model}
        monkeypatch.setattr(here, "prove_engine", lambda *_: record)
        session = Session(cliff, engine=settings)
        with study.stage("rollout", {}, {}, progress=Silent(), done="") as stage:
            OtherEngine(stage, session, FEW, [question], None).begin([question])
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            begun("first")
    with pytest.raises(SettingsError, match="by which this stage has begun"):
        begun("second")


@pytest.mark.parametrize(("adapters", "rows_of_each"), [(5, 16), (39, 32), (20, 1)])
def test_every_adapter_is_proved_however_many_rows_there_are(
    cliff, adapters, rows_of_each
):
    """Sixteenths of the rows may all be rows of one adapter."""
    names = [str(n) for n in range(adapters)]
    shape = cliff.n_layers, cliff.n_heads
    edits = {name: HeadEdit(torch.ones(shape)) for name in names}
    prompts = [tuple(cliff.encode(f"Say {n}"))[:3] for n in range(rows_of_each)]
    every = [Ask(ids, 0, condition=name) for ids in prompts for name in names]
    tried = []

    class Faithful(HfEngine):
        def draw(self, asks, sampling, around=PLAINLY):
            tried.extend(asks)
            return super().draw([e._replace(condition=None) for e in asks], sampling)

    one = Sampling(temperature=0, max_thinking=0, max_answer=1)
    found = prove_edits(Faithful(cliff), cliff, every, edits, one)
    assert {each.condition for each in tried} == set(names)
    assert found["rows"] == len(tried) == max(min(16, len(every)), adapters)
