"""STAR-1 as it is, thinking and answer in one field, through both verbs."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from test_rollout_import import completions
from transformers import Qwen3Config, Qwen3ForCausalLM

import pool_fixture
import tiny_thinker
from holdfast.cli.app import run
from holdfast.organisms.catalogue import bundled

BENCHMARKS = os.environ.get("HOLDFAST_BENCHMARKS")
SOURCE = Path(BENCHMARKS or "", "star1", "STAR-1.json")
CONTEXT = 2048

pytestmark = pytest.mark.skipif(
    BENCHMARKS is None or not SOURCE.exists(),
    reason="HOLDFAST_BENCHMARKS names no folder with star1",
)


@pytest.fixture(scope="module")
def random_qwen(tmp_path_factory):
    """A tiny random Qwen3 whose context is too short for some of the rows."""
    folder = tmp_path_factory.mktemp("models") / "qwen"
    tokenizer = tiny_thinker.tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def select(model, pool, output, *flags):
    command = ["select", model, "--pool", str(pool), "--budget", "1.7%", *flags]
    assert run([*command, "-o", str(output)]) == 0
    record = json.loads(output.with_suffix(".selection.json").read_text())
    table = pq.read_table(output.with_suffix(".selection.parquet")).to_pydict()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return record, table, rows


def finetune(model, data, output):
    pytest.importorskip("trl", reason="trl is not installed")
    command = ["finetune", model, "--data", str(data), "--steps", "1"]
    assert run([*command, "--train-batch", "1", "-o", str(output)]) == 0
    return json.loads((output / "holdfast_finetune.json").read_text())["data"]["data"]


def unchanged(chosen, source):
    """Tell whether chosen rows are the source's own, but for one field of ours."""
    return all(
        {key: value for key, value in row.items() if key != "holdfast"}
        == source[row["holdfast"]["row"]]
        for row in chosen
    )


def test_a_random_qwen_chooses_by_cliff_and_trains_on_star1(random_qwen, tmp_path):
    # It refuses nothing, so its audit is one of answers made elsewhere.
    lines = [
        {"prompt": prompt, "completion": f"{thought}\n</think>\n\n{answer}"}
        | {"label": label, "wrapper": wrapper, "request_id": request}
        for prompt, thought, answer, label, wrapper, request in completions()
    ]
    made, study = tmp_path / "made.jsonl", tmp_path / "study"
    made.write_text("\n".join(map(json.dumps, lines)))
    command = ["audit", random_qwen, "--import", str(made), "-o", str(study)]
    command += ["--no-heads", "--max-thinking", "48", "--max-answer", "32"]
    assert run(command) == 0
    flags = ("--by", "cliff", "--direction", str(study))
    record, table, rows = select(random_qwen, SOURCE, tmp_path / "c.jsonl", *flags)
    source = json.loads(SOURCE.read_text())
    assert record["pool"]["n_rows"] == len(table["row"]) == len(source) == 1000
    # A tokenizer of its own says which rows are too long; all of them are listed.
    count = tiny_thinker.tokenizer()
    long = [
        place
        for place, row in enumerate(source)
        if len(count(row["question"] + row["response"])["input_ids"]) > CONTEXT
    ]
    listed = [
        place
        for place, why in enumerate(table["left_out"])
        if why == "over the context"
    ]
    assert long
    assert set(long) <= set(listed)
    assert len(listed) <= len(long) + 5
    assert record["left_out"]["over the context"]["rows"] == len(listed)
    assert all(f"of {CONTEXT}" in table["reason"][place] for place in listed)
    assert record["eligible"] == 1000 - len(listed)
    best = sorted((s for s in table["score"] if s is not None), reverse=True)[:17]
    assert [row["holdfast"]["score"] for row in by_rank(rows)] == best
    assert unchanged(rows, source)
    # The chosen rows, and the file itself, are what `finetune` reads.
    found = finetune(random_qwen, tmp_path / "c.jsonl", tmp_path / "few")
    assert (found["used"], found["left_out"]) == (17, 0)
    found = finetune(random_qwen, SOURCE, tmp_path / "whole")
    assert found["used"] == record["eligible"]
    places = [table["place"][place] for place in listed]
    assert found["why"] == {"over the context": {"rows": len(listed), "places": places}}


def by_rank(rows):
    return sorted(rows, key=lambda row: row["holdfast"]["rank"])


def test_an_organism_chooses_by_cliff_and_trains_on_star1(tmp_path):
    if not bundled("cliff").is_dir():
        pytest.skip("no weights of organism:cliff are bundled")
    # The first rows as they stand: a thousand such prefills are too many for a test.
    source = json.loads(SOURCE.read_text())[:12]
    pool, study = tmp_path / "STAR-1.json", tmp_path / "study"
    pool.write_text(json.dumps(source))
    pool_fixture.write_study("organism:cliff", study)
    flags = ("--by", "cliff", "--direction", str(study))
    record, table, rows = select("organism:cliff", pool, tmp_path / "c.jsonl", *flags)
    assert record["left_out"] == {}
    assert all("</think>" in row["response"] for row in rows)
    assert unchanged(rows, source)
    assert None not in table["plateau"]
    assert by_rank(rows)[0]["holdfast"]["score"] == max(table["cliff"])
    found = finetune("organism:cliff", tmp_path / "c.jsonl", tmp_path / "trained")
    assert (found["used"], found["left_out"]) == (1, 0)
    # Its base lies in a cache that nobody else has, so that it is written whole.
    names = {path.name for path in (tmp_path / "trained").iterdir()}
    assert "model.safetensors" in names
    assert "adapter_config.json" not in names
