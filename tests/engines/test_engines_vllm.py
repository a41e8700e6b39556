"""Rows that vLLM draws, against a package that stands in its place."""

import math
import sys
from dataclasses import replace

import pytest

from engines.fake_vllm import fake_vllm
from engines.test_engines_rounds import SHORT, asks_of, reference
from holdfast.engines.choose import open_engine
from holdfast.engines.port import Around
from holdfast.engines.settings import EngineSettings
from holdfast.errors import EngineError, EnvironmentProblem, SettingsError
from holdfast.models.decoding.generate import generate
from holdfast.models.export import baking
from holdfast.models.interventions import HeadEdit, head_factors

HEADS = {"top": ((3, 1), (3, 4), (5, 0)), "random": ((0, 5), (5, 1))}
VLLM = EngineSettings(engine="vllm")


@pytest.fixture
def fake(cliff, monkeypatch):
    modules, started, calls = fake_vllm(cliff)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("holdfast.engines.vllm.version", lambda name: "0.0.1")
    return started, calls


def rows(engine, asks, sampling, around=None):
    parts = engine.draw(asks, sampling, around or Around())
    made = sorted((each for part in parts for each in part), key=lambda e: e.index)
    return [replace(each, min_margin=0.0) for each in made]


def test_rows_are_those_of_the_model_and_have_their_gaps(cliff, fake):
    started, _ = fake
    ticks = []
    engine = open_engine(VLLM, cliff)
    made = rows(engine, list(asks_of(cliff)), SHORT, Around(told=ticks.append))
    assert {each.min_top2_gap for each in made} == {2.5}
    assert [replace(each, min_top2_gap=0.0) for each in made] == reference(cliff, SHORT)
    assert sum(tick.finished for tick in ticks) == len(made)
    # An organism's own config names no class, and vLLM would read it as an embedder.
    assert started[0]["hf_overrides"] == {"architectures": ["Qwen3ForCausalLM"]}
    assert "enable_lora" not in started[0]
    assert engine.identity()["version"] == "0.0.1"


def test_drawn_rows_send_the_seeds_of_their_rounds(cliff, fake):
    _, calls = fake
    hot = replace(SHORT, temperature=0.7, top_p=0.9)
    made = rows(open_engine(VLLM, cliff), list(asks_of(cliff)), hot)
    assert all(math.isnan(each.min_top2_gap) for each in made)
    ways = [way for _, ways, _ in calls for way in ways]
    assert {(way.temperature, way.top_p) for way in ways} == {(0.7, 0.9)}
    assert len({way.seed for way in ways}) == len(ways)


def test_adapters_side_by_side_are_the_hooks(cliff, fake, tmp_path):
    started, calls = fake
    asks, places = list(asks_of(cliff)), {}
    for name, heads in HEADS.items():
        places[name] = tmp_path / name
        edit = HeadEdit(head_factors(cliff, heads))
        with baking(cliff, edit, places[name], provenance={}, form="adapter"):
            pass
    engine = open_engine(VLLM, cliff)
    engine.hold(places)
    wanted = [name for name in (*HEADS, None) for _ in asks]
    asked = [
        ask._replace(condition=name) for ask, name in zip(asks * 3, wanted, strict=True)
    ]
    made = rows(engine, asked, SHORT)
    assert len(started) == 1
    assert len(calls[0][0]) == len(asked)
    # A place more than adapters, and the rank of two heads in one layer.
    assert (started[0]["max_loras"], started[0]["max_lora_rank"]) == (3, 16)
    assert started[0]["lora_target_modules"] == ["o_proj"]
    prompts = [(ask.token_ids, ask.seed) for ask in asks]
    hooked = []
    for heads in (*HEADS.values(), ()):
        edit = HeadEdit(head_factors(cliff, heads))
        parts = generate(cliff, prompts, SHORT, edit=edit)
        hooked += sorted((e for p in parts for e in p), key=lambda e: e.index)
    assert [each.token_ids for each in made] == [each.token_ids for each in hooked]
    n = len(asks)
    texts = [[each.token_ids for each in made[i : i + n]] for i in (0, n, 2 * n)]
    assert texts[0] != texts[2] != texts[1]


def test_an_adapter_that_is_not_held_is_refused(cliff, fake):
    asks = [each._replace(condition="top") for each in asks_of(cliff)]
    with pytest.raises(SettingsError, match="adapter 'top'"):
        open_engine(VLLM, cliff).draw(asks, SHORT)


def test_what_vllm_raises_is_an_error_of_ours(cliff, fake, monkeypatch):
    def broken(**_):
        raise ValueError("No available memory for the cache blocks.")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", broken)
    with pytest.raises(EngineError, match="No available memory") as raised:
        rows(open_engine(VLLM, cliff), list(asks_of(cliff)), SHORT)
    assert raised.value.exit_status == 3


def test_vllm_that_is_missing_is_named_with_the_next_step(cliff):
    with pytest.raises(EnvironmentProblem, match="vllm serve") as raised:
        open_engine(VLLM, cliff)
    assert raised.value.exit_status == 5


@pytest.mark.parametrize("text", ["[1]", "{", "8"])
def test_arguments_that_are_no_object_are_refused(cliff, fake, text):
    with pytest.raises(SettingsError, match="--vllm-arguments"):
        open_engine(replace(VLLM, vllm_arguments=text), cliff)
