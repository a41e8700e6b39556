"""`holdfast decide --engine vllm`: the answers of the model, and never one too few."""

import shutil
import sys

import pytest

from engines.fake_vllm import fake_vllm
from holdfast.cli.app import run
from holdfast.engines.vllm import VllmEngine
from holdfast.models.loading.causal import load
from holdfast.study import Study

ROWS = ["--complied-rows", "3", "--refused-rows", "1", "--benign-rows", "1"]
GREEDY = [
    *ROWS, "--draws", "1", "--draw-temperature", "0", "--widest", "1",
    "--redraw-thinking", "--swap", "wrapper", "--swap-prompts", "2",
]  # fmt: skip
VLLM = ["--engine", "vllm"]
FILES = ("curve.json", "curve.parquet", "draws.parquet", "swap.json")


@pytest.fixture(scope="module")
def ours(audited, tmp_path_factory):
    """A study whose answers behind cuts the model itself has drawn."""
    study = shutil.copytree(audited, tmp_path_factory.mktemp("decide") / "ours")
    assert run(["decide", str(study), *GREEDY]) == 0
    return study


@pytest.fixture
def study(ours, tmp_path):
    return shutil.copytree(ours, tmp_path / "study")


@pytest.fixture
def fake(thinker, monkeypatch):
    modules, started, calls = fake_vllm(load(str(thinker)))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("holdfast.engines.vllm.version", lambda name: "0.0.1")
    return started, calls


def same_files(one, other):
    for name in FILES:
        parts = [(each / f"decide_{name}").read_bytes() for each in (one, other)]
        assert parts[0] == parts[1], name


def test_an_engine_draws_what_the_model_draws_behind_every_cut(ours, study, fake):
    """Closed cuts, thinkings that go on, and the four cells of the wrapper."""
    _, calls = fake
    assert run(["decide", str(study), *GREEDY, *VLLM]) == 0
    same_files(ours, study)
    opened = Study.open(study)
    rows = opened.read_table("decide_draws.parquet").num_rows
    cells = opened.read_table("decide_swap_answers.parquet").num_rows
    assert rows >= 5 * (9 + 8)
    assert cells >= 2 * 4
    # Beside them, the prompts of two proofs.
    assert sum(len(prompts) for prompts, _, _ in calls) >= rows + cells + 2 * 16
    for stage in ("decide_curve", "decide_swap_answers"):
        proof = opened.manifest["stages"][stage]["engine"]["proof"]
        assert proof["equal"] == proof["tokens"] > 0
    before = len(calls)
    assert run(["decide", str(study), *GREEDY, *VLLM]) == 0
    assert len(calls) == before


def test_draws_of_one_cut_have_seeds_of_their_own(study, fake):
    _, calls = fake
    few = ["--draw-tokens", "4"]
    assert run(["decide", str(study), *ROWS, *few, *VLLM]) == 0
    drawn = [
        (tuple(prompt["prompt_token_ids"]), way)
        for prompts, ways, _ in calls
        for prompt, way in zip(prompts, ways, strict=True)
        if way.temperature
    ]
    assert {(way.temperature, way.max_tokens) for _, way in drawn} == {(0.7, 4)}
    assert len({way.seed for _, way in drawn}) == len(drawn)
    assert len(drawn) >= 8 * len({ids for ids, _ in drawn})


def test_a_missing_answer_is_refused_and_not_left_out_of_a_share(
    ours, study, fake, monkeypatch, capsys
):
    real = VllmEngine.draw

    def losing(self, asks, sampling, around):
        for place, part in enumerate(real(self, asks, sampling, around)):
            yield part[1:] if around.thinking_done and place == 0 else part

    monkeypatch.setattr(VllmEngine, "draw", losing)
    assert run(["decide", str(study), *GREEDY, *VLLM]) == 3
    told = " ".join(capsys.readouterr().err.split())
    assert "an answer to each of" in told
    assert "--engine vllm" in told
    assert Study.open(study).record("decide_curve")["state"] != "done"
    monkeypatch.setattr(VllmEngine, "draw", real)
    assert run(["decide", str(study), *GREEDY, *VLLM]) == 0
    same_files(ours, study)
