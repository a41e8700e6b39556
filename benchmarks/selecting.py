"""What selecting costs: scoring beside plain prefills, and memory over long pools.

Throughput: the whole of `select --by cliff` on a pool of authored rows, from reading to
the written choice, and its scorer alone, against prefills of the very same tokens at
the same batch size through the base model; CPU time, interleaved rounds.
Memory: resident size of a process that runs the same command over pools of growing
length with a model of one narrow layer, which costs least; and what each row adds.

    python benchmarks/selecting.py --pairs 30 --rows 10000 200000 --json select.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import measure, one_thread, random_model, summarise

from holdfast.cliff.probe import Probe
from holdfast.cliff.probe_files import model_fingerprint, write_probe
from holdfast.data.pool import Pool, render_row
from holdfast.judges.settings import JudgeSettings
from holdfast.models.batching import longest_first, pad
from holdfast.models.loading.causal import adapt
from holdfast.models.model import Adapter
from holdfast.organisms.text import train_tokenizer
from holdfast.organisms.world import World
from holdfast.rollout.session import Session
from holdfast.rollout.settings import ModelSettings
from holdfast.select import stage
from holdfast.select.scores import PoolScorer
from holdfast.select.settings import SelectSettings
from holdfast.study import Study

BATCH = 16
LIMIT, FLAT = 0.9, 0.1
PLAIN, AGAIN = "plain prefill", "plain again (the noise)"
SCORED, SELECTED = "PoolScorer alone", "select, from file to file"

CHILD = """
import re, sys
from pathlib import Path
from holdfast.cli.app import run
status = run(sys.argv[1:])
found = Path("/proc/self/status").read_text()
print(status, re.search(r"VmHWM:\\s*(\\d+) kB", found).group(1))
"""
"""Linux alone tells it. `ru_maxrss` will not do: it is at least that of the parent."""


def write_pool(path: Path, n: int) -> None:
    """Write authored rows; their number is all that varies."""
    world = World(7)
    with path.open("w", encoding="utf-8") as handle:
        for _ in range(n):
            scene = world.scene("harmful", wrapped=0.5)
            row = {
                "prompt": scene.request,
                "thinking": scene.thinking,
                "response": scene.answer,
            }
            handle.write(json.dumps(row) + "\n")


def random_probe(d: int) -> Probe:
    weight = torch.randn(d, generator=torch.Generator().manual_seed(2)).double()
    return Probe(weight, 0.0, torch.zeros(d).double(), torch.ones(d).double(), 1.0)


def variants(adapter: Adapter, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return what is timed; all read the same tokens in batches of the same size."""
    probe = random_probe(adapter.d_model)
    scorer = PoolScorer(adapter, probe, batch_size=BATCH)
    pool = folder / "pool.jsonl"
    rows = list(Pool(str(pool)).rows(lambda number: True))
    fmt, limit = adapter.thinking, adapter.max_positions
    rendered = [render_row(row, adapter.tokenizer, fmt, limit, None) for row in rows]
    found = [each.conversation for each in rendered]
    tokens = [each.token_ids[: each.spans.answer[0]] for each in found if each]
    order = longest_first(tokens)

    def plain() -> None:
        for start in range(0, len(order), BATCH):
            part = [tokens[i] for i in order[start : start + BATCH]]
            batch = pad(part, "right", adapter.device)
            with torch.inference_mode():
                adapter.base(**batch.inputs(), use_cache=False)

    session = Session(adapter, ModelSettings(batch_size=BATCH))
    study = Study.create(folder / "study")
    session.claim(study)
    write_probe(study, "published", probe, {"model": model_fingerprint(study)})

    def selected() -> None:
        # Fresh scores every time, or nothing would be scored after the first.
        with tempfile.TemporaryDirectory() as fresh:
            chosen = Path(fresh) / "chosen.jsonl"
            settings = SelectSettings(
                str(pool), by="cliff", budget="10%", direction=str(folder / "study")
            )
            stage.run(settings, JudgeSettings(), session, chosen)

    runs: dict[str, Callable[[], Any]] = {PLAIN: plain, AGAIN: plain}
    return runs | {SCORED: lambda: scorer(rows), SELECTED: selected}


def narrow_model(folder: Path) -> tuple[Path, Path]:
    """Write a model of one narrow layer, and a study with a probe of it."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    model, study = folder / "narrow", Study.create(folder / "narrow-study")
    transformers.Qwen3ForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    Session(str(model), ModelSettings()).claim(study)
    facts = {"model": model_fingerprint(study)}
    write_probe(study, "published", random_probe(16), facts)
    return model, study.directory


def peak_resident(n: int, model: Path, study: Path, folder: Path) -> int:
    """Return the most bytes that a selection of 100 from `n` rows held."""
    pool = folder / f"pool-{n}.jsonl"
    write_pool(pool, n)
    command = ["select", str(model), "--pool", str(pool), "--direction", str(study)]
    command += ["--budget", "100", "--shard-rows", "1000"]
    output = folder / f"chosen-{n}.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *command, "-o", str(output)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    status, kibibytes = done.stdout.split()[-2:]
    if status != "0":
        raise SystemExit(done.stderr)
    return int(kibibytes) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30, help="rounds (30 or more)")
    parser.add_argument("--pool", type=int, default=128, help="rows that are timed")
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 200_000])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    result: dict[str, Any] = {"pairs": options.pairs, "pool": options.pool}
    with tempfile.TemporaryDirectory() as name, one_thread():
        folder = Path(name)
        write_pool(folder / "pool.jsonl", options.pool)
        adapter = adapt(random_model(), train_tokenizer())
        seconds = measure(variants(adapter, folder), options.pairs)
        for variant in (AGAIN, SCORED, SELECTED):
            # Rates, so the plain time goes on top.
            found = summarise(seconds[PLAIN] / seconds[variant])
            result[variant] = found
            print(
                f"{variant}: {found['ratio']:.3f} [{found['low']:.3f}, "
                f"{found['high']:.3f}] × the rate of plain prefills"
            )
        narrow = narrow_model(folder)
        result["memory"] = {n: peak_resident(n, *narrow, folder) for n in options.rows}
    for n, size in result["memory"].items():
        print(f"{n} rows: {size / 2**20:.0f} MiB resident at most")
    sizes = list(result["memory"].values())
    if sizes:
        growth = max(sizes) / min(sizes) - 1
        print(f"growth {growth:.1%}; flat within {FLAT:.0%}: {growth <= FLAT}")
    if len(sizes) > 1:
        (first, *_, last) = result["memory"].items()
        each = (last[1] - first[1]) / max(1, last[0] - first[0])
        print(f"{each:.0f} bytes for each further row")
    print(f"rate of at least {LIMIT}: {result[SELECTED]['low'] >= LIMIT}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
