"""Conditions of an ablation that an engine holds as adapters, side by side."""

import json
import shutil
import sys

import pytest

from engines.fake_vllm import fake_vllm
from holdfast.engines.adapters import hold_edits, prove_edits
from holdfast.engines.port import Ask
from holdfast.engines.settings import EngineSettings
from holdfast.errors import EngineError, SettingsError
from holdfast.heads import ablate, bake
from holdfast.heads.conditions import Condition
from holdfast.heads.ranking import Head
from holdfast.heads.settings import AblateSettings
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.interventions import HeadEdit, head_factors
from holdfast.models.loading.causal import load
from holdfast.report.schema import validate
from holdfast.rollout.session import Session
from holdfast.rollout.settings import ModelSettings
from holdfast.study import Study

FEW = AblateSettings(
    fractions=(0.1,),
    scopes=("everywhere", "answer"),
    random_draws=1,
    ablation_prompts=12,
)
GREEDY = Sampling(temperature=0, max_thinking=12, max_answer=8)


@pytest.fixture(scope="module")
def adapter(thinker):
    return load(str(thinker))


@pytest.fixture
def fake(adapter, monkeypatch):
    modules, started, calls = fake_vllm(adapter)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("holdfast.engines.vllm.version", lambda name: "0.0.1")
    return started, calls


def ablated(audited, place, name):
    study = Study.open(shutil.copytree(audited, place / name))
    engine = EngineSettings(engine=name)
    block = ablate.run(study, FEW, Session.of(study, ModelSettings(), engine=engine))
    rows = study.read_table("ablation.parquet").to_pylist()
    return study, block, {row["row_id"]: row for row in rows}


def test_an_engine_draws_what_the_hook_draws_and_says_what_it_does_not(
    audited, tmp_path, fake
):
    started, calls = fake
    _, plain, ours = ablated(audited, tmp_path, "hf")
    study, block, theirs = ablated(audited, tmp_path, "vllm")
    assert ours == theirs
    assert "engine" not in plain
    engine = block["engine"]
    assert engine["conditions"] == 5
    assert engine["proof"]["equal"] == engine["proof"]["rows"] == 16
    edited = {lora.name for _, _, loras in calls for lora in loras if lora is not None}
    sizes = {"top": 1, "random": 1, "positive": 1, "second_round": 2}
    assert edited == {f"everywhere-{name}-{n}-0" for name, n in sizes.items()}
    assert started[-1]["max_loras"] == 5
    assert any("answer: drawn by the model itself" in note for note in block["notes"])
    folders = sorted(path.name for path in study.path(bake.ADAPTERS).iterdir())
    assert folders == sorted(edited)
    report = json.loads((audited / "report.json").read_text())
    validate(report | {"ablation": {**report["ablation"], "engine": engine}})


def test_where_no_adapter_can_be_one_the_model_draws_itself(audited, tmp_path, fake):
    study = Study.open(shutil.copytree(audited, tmp_path / "norm"))
    session = Session.of(study, ModelSettings(), engine=EngineSettings("vllm"))
    none = AblateSettings(renormalise="token")
    held = bake.hold_conditions(study, session, none, (), ())
    assert held.keys == frozenset()
    assert "no adapter restores a norm" in held.notes[0]


def asks(adapter):
    ids = tuple(adapter.tokenizer("tell me").input_ids)
    return [Ask(ids, 0, condition=name) for name in ("a", "b")] * 2


def edits(adapter):
    heads = {"a": ((0, 1), (1, 2)), "b": ((1, 0),)}
    return {name: HeadEdit(head_factors(adapter, each)) for name, each in heads.items()}


def test_adapters_of_another_edit_are_refused_with_the_place(adapter, fake, tmp_path):
    from holdfast.engines.choose import open_engine

    engine = open_engine(EngineSettings(engine="vllm"), adapter)
    meant = edits(adapter)
    assert hold_edits(engine, adapter, meant, tmp_path / "right", {}) == {}
    assert prove_edits(engine, adapter, asks(adapter), meant, GREEDY)["equal"] == 4
    other = {
        name: HeadEdit(1 + 40 * (1 - each.factors)) for name, each in meant.items()
    }
    hold_edits(engine, adapter, other, tmp_path / "wrong", {})
    with pytest.raises(EngineError, match=r"under [ab] at token \d+ with a gap of"):
        prove_edits(engine, adapter, asks(adapter), meant, GREEDY)


def test_a_rank_that_no_server_takes_is_left_to_the_model(
    adapter, fake, tmp_path, monkeypatch
):
    from holdfast.engines.choose import open_engine

    monkeypatch.setattr("holdfast.engines.adapters.VLLM_RANKS", (1, 4))
    engine = open_engine(EngineSettings(engine="vllm"), adapter)
    left_out = hold_edits(engine, adapter, edits(adapter), tmp_path / "adapters", {})
    assert set(left_out) == {"a", "b"}
    assert "of 4 that vLLM takes" in left_out["a"]
    with pytest.raises(SettingsError, match="adapter 'a'"):
        engine.draw(asks(adapter), GREEDY)


def test_an_engine_that_takes_no_adapters_leaves_them_to_the_model(audited, tmp_path):
    """A server holds the adapters that it was started with, and no others."""
    from holdfast.engines.port import HfEngine

    study = Study.open(shutil.copytree(audited, tmp_path / "none"))
    session = Session.of(study, ModelSettings())
    assert isinstance(session.engine, HfEngine)
    condition = Condition("top", "everywhere", 0.1, 0, (Head(0, 1),))
    held = bake.hold_conditions(study, session, FEW, [condition], ())
    assert held.keys == frozenset()
    assert held.record["proof"] is None
    assert held.notes == (
        "everywhere-top-1-0: drawn by the model itself (hf): no place in the engine "
        "(--engine hf).",
    )
    # They were written all the same: a server can be started with them.
    assert (study.path(bake.ADAPTERS) / condition.adapter).is_dir()
