"""STAR-1 as it is, thinking and answer in one field, through both verbs."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

import tiny_thinker
from holdfast.cli.running import run
from holdfast.organisms.catalogue import bundled

BENCHMARKS = os.environ.get("HOLDFAST_BENCHMARKS")

pytestmark = pytest.mark.skipif(
    BENCHMARKS is None or not Path(BENCHMARKS, "star1", "STAR-1.json").exists(),
    reason="HOLDFAST_BENCHMARKS names no folder with star1",
)


@pytest.fixture(scope="module")
def random_qwen(tmp_path_factory):
    """A tiny random Qwen3 with a context long enough for every row."""
    folder = tmp_path_factory.mktemp("models") / "qwen"
    tokenizer = tiny_thinker.tokenizer()
    from transformers import Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def model(name, random_qwen):
    if name == "random":
        return random_qwen
    if not bundled("cliff").is_dir():
        pytest.skip("no weights of organism:cliff are bundled")
    return "organism:cliff"


@pytest.mark.parametrize("name", ["random", "organism"])
def test_star1_runs_unchanged(name, random_qwen, tmp_path):
    source = Path(str(BENCHMARKS)) / "star1" / "STAR-1.json"
    output, trained = tmp_path / "chosen.jsonl", tmp_path / "trained"
    chosen = model(name, random_qwen)
    command = ["select", chosen, "--pool", str(source), "--by", "length"]
    assert run([*command, "--budget", "1.7%", "-o", str(output)]) == 0
    record = json.loads(output.with_suffix(".selection.json").read_text())
    assert record["pool"]["n_rows"] == 1000
    assert record["eligible"] == 1000
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 17
    assert all("</think>" in row["response"] for row in rows)
    assert all(isinstance(row["score"], dict) for row in rows)
    pytest.importorskip("trl", reason="trl is not installed")
    command = ["finetune", chosen, "--data", str(output), "--steps", "1"]
    assert run([*command, "--train-batch", "1", "-o", str(trained)]) == 0
    found = json.loads((trained / "holdfast_finetune.json").read_text())
    assert found["data"]["data"]["used"] == 17
    assert found["data"]["data"]["left_out"] == 0
