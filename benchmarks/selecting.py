"""What selecting costs: scoring beside plain prefills, and memory over long pools.

Throughput: the scorer on rows of authored text, against prefills of the very same
tokens at the same batch size through the base model; CPU time, interleaved rounds.
Memory: resident size of a process that selects from pools of growing length, scored
by length alone, so that reading, shards and choosing are what is measured.

    python benchmarks/selecting.py --pairs 30 --rows 10000 200000 --json select.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import measure, one_thread, random_model, summarise

from holdfast.analysis.probe import Probe
from holdfast.data.pool import Pool
from holdfast.models.adapter import Adapter, adapt
from holdfast.models.batching import longest_first, pad
from holdfast.organisms.tokenizer import train_tokenizer
from holdfast.organisms.world import World
from holdfast.session.pool_scoring import PoolScorer

N_ROWS, BATCH = 64, 16
LIMIT, FLAT = 0.9, 0.1
PLAIN, AGAIN, SCORED = "plain prefill", "plain again (the noise)", "PoolScorer"

CHILD = """
import resource, sys
from holdfast.cli.running import run
status = run(sys.argv[1:])
print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


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


def variants(adapter: Adapter, pool: Pool) -> dict[str, Callable[[], Any]]:
    """Return what is timed; all read the same tokens in batches of the same size."""
    d = adapter.d_model
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(d, generator=generator).double()
    probe = Probe(weight, 0.0, torch.zeros(d).double(), torch.ones(d).double(), 1.0)
    scorer = PoolScorer(adapter, probe, batch_size=BATCH)
    rows = list(pool.rows(lambda number: number < N_ROWS))
    found = [scorer.render(row).conversation for row in rows]
    tokens = [each.token_ids[: each.spans.answer[0]] for each in found if each]
    order = longest_first(tokens)

    def plain() -> None:
        for start in range(0, len(order), BATCH):
            part = [tokens[i] for i in order[start : start + BATCH]]
            batch = pad(part, "right", adapter.device)
            with torch.inference_mode():
                adapter.base(**batch.inputs(), use_cache=False)

    return {PLAIN: plain, AGAIN: plain, SCORED: lambda: scorer(rows)}


def peak_resident(n: int, folder: Path) -> int:
    """Return the most bytes that a selection of 1 % from `n` rows held."""
    pool = folder / f"pool-{n}.jsonl"
    write_pool(pool, n)
    command = ["select", "organism:cliff", "--pool", str(pool), "--by", "length"]
    command += ["--budget", "100", "--similar", "0", "--shard-rows", "1000"]
    output = folder / f"chosen-{n}.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *command, "-o", str(output)],
        check=True,
        capture_output=True,
        text=True,
    )
    status, kibibytes = done.stdout.split()[-2:]
    if status != "0":
        raise SystemExit(done.stderr)
    return int(kibibytes) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30, help="rounds (30 or more)")
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 200_000])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    result: dict[str, Any] = {"pairs": options.pairs}
    with tempfile.TemporaryDirectory() as name, one_thread():
        folder = Path(name)
        write_pool(folder / "pool.jsonl", N_ROWS)
        adapter = adapt(random_model(), train_tokenizer())
        runs = variants(adapter, Pool(str(folder / "pool.jsonl")))
        seconds = measure(runs, options.pairs)
        for variant in (AGAIN, SCORED):
            # Rates, so the plain time goes on top.
            found = summarise(seconds[PLAIN] / seconds[variant])
            result[variant] = found
            print(
                f"{variant}: {found['ratio']:.3f} [{found['low']:.3f}, "
                f"{found['high']:.3f}] × the rate of plain prefills"
            )
        result["memory"] = {n: peak_resident(n, folder) for n in options.rows}
    for n, size in result["memory"].items():
        print(f"{n} rows: {size / 2**20:.0f} MiB resident at most")
    sizes = list(result["memory"].values())
    if sizes:
        growth = max(sizes) / min(sizes) - 1
        print(f"growth {growth:.1%}; flat within {FLAT:.0%}: {growth <= FLAT}")
    print(f"rate of at least {LIMIT}: {result[SCORED]['low'] >= LIMIT}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
