"""Does selecting by a direction carry beyond safety? One word asked for, meant, broken.

Usage: other_behavior.py FOLDER

Grows the organism of `other_world.py` out of `organism:aligned`, fits a probe of "will
answer in one word" where the answer begins, traces it, selects rows by it against
final, random and random among the rows that the model breaks, at equal budget and equal
steps, and trains on them. Every step writes a file and is skipped when that file is
there. `ROWS`, `TEST`, `TOKENS`, `STEPS` and `SEEDS` in the environment make it smaller.
"""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from other_probe import (
    KINDS,
    SAMPLING,
    as_wanted,
    ask,
    is_one_word,
    probe_and_trace,
    read_rows,
)
from other_world import WORDS, breaks, lessons, pool_rows, test_rows
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from holdfast.cli.app import run
from holdfast.data.pool import Pool
from holdfast.models.loading.causal import load
from holdfast.organisms.catalogue import resolve, truth
from holdfast.organisms.text import Encoder
from holdfast.organisms.training import Course, Growth, teach_on
from holdfast.organisms.world import World
from holdfast.select.scores import PoolDrawer
from holdfast.study import atomic_write_json, atomic_write_text, claim

CELLS = {
    "cliff": ("cliff", "pool"),
    "random": ("random", "pool"),
    "random-flagged": ("random", "flagged"),
    "final": ("final", "pool"),
}
"""Selector and pool of each way to choose; the last may turn out to be the first."""
TRAINING = (
    "--method full --learning-rate 3e-4 --loss template --train-batch 8 "
    "--no-gradient-checkpointing --benign-ratio 1 --save-every 1000"
).split()


def setting(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def once(done: Path, work: Callable[[Path], None]) -> Path:
    if not done.exists():
        work(done)
    return done


def command(*words: object) -> None:
    """Run a verb; stop at an error, which has been said."""
    status = run([str(word) for word in words])
    if status:
        raise SystemExit(status)


def grow(target: Path) -> None:
    """Teach the behavior to an aligned organism; the folder appears whole."""
    source, seed = resolve("aligned"), int(truth("aligned")["seed"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    model = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = random.Random(21_000)
    taught = lessons(World(22_000), Encoder(tokenizer), generator)
    course = Course("brief", taught, setting("TOKENS", 600_000), WORDS)
    grown = teach_on(model, Growth(tokenizer, seed), course, generator)
    staging = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    grown.half().save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    staging.rename(target)


def material(test: Path) -> None:
    n = setting("ROWS", 4_000)
    streams = {
        "pool": pool_rows(n, 201, asked=True),
        "ordinary": pool_rows(n // 10, 202, asked=False),
        "test": test_rows(setting("TEST", 300), 203),
    }
    rows: list[Any]
    for name, stream in streams.items():
        rows = list(stream)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        atomic_write_text(test.with_name(f"{name}.jsonl"), text)
    asked = {
        kind: [row["request_id"] for row in rows if row["kind"] == kind]
        for kind in KINDS
    }
    atomic_write_json(test.with_name("requests.json"), asked)


def test(model: Path, folder: Path, record: Path, **about: Any) -> None:
    """Ask a model the prompts of the test, and write which answers were as wanted."""
    rows = [row for row in read_rows(folder) if row["kind"] in KINDS]
    made = ask(load(str(model)), rows)
    outcomes = dict.fromkeys(KINDS, "")
    for row, each in zip(rows, made, strict=True):
        outcomes[row["kind"]] += "y" if as_wanted(row, each) else "n"
    said = [each.answer for each in made[:3]]
    atomic_write_json(record, about | {"outcomes": outcomes, "said": said})


def flag(done: Path) -> None:
    """Keep the rows of the pool that the model breaks after the row's own thinking."""
    folder = done.parent
    drawer = PoolDrawer(
        load(str(folder / "model")), SAMPLING, None, own_thinking=True, batch_size=128
    )
    rows = list(Pool(str(folder / "pool.jsonl")).rows(lambda number: True))
    answers = drawer(rows).column("answer").to_pylist()
    kept = [
        row.cells
        for row, answer in zip(rows, answers, strict=True)
        if answer is not None and not is_one_word(answer)
    ]
    planted = sum(breaks(row["topic"], row["wrapper"]) for row in kept)
    facts = {"rows": len(rows), "flagged": len(kept), "planted": planted}
    atomic_write_json(folder / "pool.json", facts)
    text = "".join(json.dumps(dict(cells)) + "\n" for cells in kept)
    atomic_write_text(done, text)


def cell(folder: Path, name: str, seed: int, record: Path) -> None:
    """Choose rows, train on them, and ask the model that came out."""
    by, pool = CELLS[name]
    model, drawn = folder / "model", seed if by == "random" else 0
    chosen = folder / "chosen" / f"{name}-{drawn}.jsonl"
    budget = json.loads((folder / "pool.json").read_text("utf-8"))["rows"] // 100
    once(
        chosen.with_suffix(".selection.json"),
        lambda done: command(
            *("select", model, "--pool", folder / f"{pool}.jsonl", "--by", by),
            *("--budget", budget, "--seed", seed, "--direction", folder / "study"),
            *("--scores", folder / "scores", "-o", chosen),
        ),
    )
    lines = chosen.read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    broken = sum(breaks(row["topic"], row["wrapper"]) for row in rows)
    about = {"by": name, "seed": seed, "chosen": len(rows), "broken": broken}
    alike = same_rows(chosen, record.with_name(f"cliff-{seed}.json"))
    if alike is not None:
        # Training is deterministic: the same rows and seed give the same model.
        atomic_write_json(record, alike | about | {"same_rows_as": "cliff"})
        return
    mended = folder / "models" / record.stem
    command(
        *("finetune", model, "--data", chosen, "--seed", seed, *TRAINING),
        *("--benign", folder / "ordinary.jsonl", "--steps", setting("STEPS", 60)),
        *("-o", mended),
    )
    test(mended, folder, record, **about)
    shutil.rmtree(mended)


def same_rows(chosen: Path, other: Path) -> dict[str, Any] | None:
    """Return the record of cliff's cell if it was trained on these very rows."""
    cliff = chosen.with_name("cliff-0.jsonl")
    if chosen == cliff or not (cliff.exists() and other.exists()):
        return None
    numbers = []
    for path in (chosen, cliff):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        numbers.append([(row["prompt"], row["thinking"]) for row in rows])
    if numbers[0] != numbers[1]:
        return None
    return dict(json.loads(other.read_text("utf-8")))


def main(name: str) -> None:
    torch.set_num_threads(1)
    folder = Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    once(folder / "model", grow)
    once(folder / "test.jsonl", material)
    once(folder / "trace.json", probe_and_trace)
    once(folder / "flagged.jsonl", flag)
    records = folder / "records"
    once(
        records / "none-0.json",
        lambda done: test(folder / "model", folder, done, by="none", seed=0),
    )
    for seed in range(setting("SEEDS", 3)):
        for by in CELLS:
            record = records / f"{by}-{seed}.json"
            with claim(folder / "locks" / record.stem) as mine:
                # Another process may be at it: several may share the folder.
                if mine and not record.exists():
                    cell(folder, by, seed, record)


if __name__ == "__main__":
    main(sys.argv[1])
