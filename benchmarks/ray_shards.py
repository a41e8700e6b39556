"""What spreading costs: `select --workers` on Ray beside a plain loop in one process.

Once, with a worker killed by SIGKILL after its first shard: every row is there once, in
the order of the pool, equal to the plain loop's, and the sizes of all processes are
watched. Then interleaved rounds of one worker beside the loop on an organism: the CPU
time that the command, its worker and Ray's own processes spend from the first shard to
the last, as if the machine were quiet. The clock would say nothing: where others use
the machine, Ray's processes have a share of it of their own.

    python benchmarks/ray_shards.py --rows 20000 --pairs 5 --json ray.json
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from measure import summarise
from selecting import narrow_model, random_probe, write_pool

from holdfast.cliff.probe_files import model_fingerprint, write_probe
from holdfast.rollout.session import Session
from holdfast.rollout.settings import ModelSettings
from holdfast.study import Study

LIMIT = 1.15
SHARDS = 40
ORGANISM = "organism:cliff"


def organism(folder: Path) -> tuple[str, Path]:
    """Return an organism, and a study with a probe of it."""
    study = Study.create(folder / "organism-study")
    session = Session(ORGANISM, ModelSettings())
    session.claim(study)
    facts = {"model": model_fingerprint(study)}
    write_probe(study, "published", random_probe(session.adapter.d_model), facts)
    return ORGANISM, study.directory


def command(
    model: str | Path, study: Path, pool: Path, output: Path, shard: int
) -> list[str]:
    words = ["select", str(model), "--pool", str(pool), "--direction", str(study)]
    words += ["--budget", "100", "--shard-rows", str(shard), "-o", str(output)]
    return [sys.executable, "-m", "holdfast", *words]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def n_done(output: Path) -> int:
    return len(list(output.with_suffix(".scores").glob("scores-*/*.done.json")))


def spent(process: psutil.Process) -> tuple[float, float]:
    """Return the CPU seconds of a command and its worker, and of what else is Ray's."""
    work = own = 0.0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            seconds = sum(each.cpu_times()[:2])
            named = " ".join(each.cmdline()[:1])
            if each.pid == process.pid or named.startswith("ray::MapWorker"):
                work += seconds
            else:
                own += seconds
    return work, own


def between(words: Sequence[str], output: Path, n_shards: int) -> dict[str, float]:
    """Return what was spent from the first finished shard to the last.

    Returns: `work`, CPU seconds a shard of the command and its worker; `own`, those of
    Ray's own processes for each second of the clock, since they do not know of shards.
    """
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    ) as process:
        known, first, last = psutil.Process(process.pid), None, None
        while process.poll() is None:
            time.sleep(0.02)
            done = n_done(output)
            if done and last is None:
                now = done, time.perf_counter(), *spent(known)
                first = first or now
                last = now if done == n_shards else None
    if first is None or last is None:
        raise SystemExit(f"{' '.join(words)} failed")
    steps, clock, work, own = (b - a for a, b in zip(first, last, strict=True))
    return {"work": work / steps, "own": own / clock}


def resident(pid: int) -> int:
    found = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmRSS:\s*(\d+) kB", found)[0]) * 1024


def workers(output: Path) -> list[int]:
    """Return the processes that have answered."""
    for path in output.with_suffix(".scores").glob("scores-*/readers.json"):
        crews = json.loads(path.read_text(encoding="utf-8"))
        return [int(name.split("/")[-1]) for crew in crews for name in crew["by"]]
    return []


def watched(words: Sequence[str], output: Path) -> Iterator[dict[int, int]]:
    """Run a command, kill the first worker that answers, and yield sizes meanwhile."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment())
        killed = 0
        while process.poll() is None:
            time.sleep(0.5)
            found = workers(output)
            if found and not killed:
                killed = found[0]
                os.kill(killed, signal.SIGKILL)
            sizes = {}
            for pid in {process.pid, *found} - {killed}:
                try:
                    sizes[pid] = resident(pid)
                except (OSError, IndexError):
                    continue
            yield sizes
        log.seek(0)
        if process.returncode or not killed:
            raise SystemExit(log.read().decode())


def growth(seen: Sequence[dict[int, int]]) -> dict[int, float]:
    """Return by how much each process grew from a third of its life to the end."""
    found = {}
    for pid in {pid for sizes in seen for pid in sizes}:
        sizes = [each[pid] for each in seen if pid in each]
        if len(sizes) > 9:
            first = max(sizes[: len(sizes) // 3])
            found[pid] = max(sizes) / first - 1
    return found


def rows_of(output: Path) -> list[dict[str, Any]]:
    table = pq.read_table(output.with_suffix(".selection.parquet"))
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def killed(folder: Path, model: Path, study: Path, n: int) -> dict[str, Any]:
    """Score a pool with and without workers, one of which is killed, and compare."""
    pool = folder / "pool.jsonl"
    write_pool(pool, n)
    alone, spread = folder / "alone.jsonl", folder / "spread.jsonl"
    shard = n // SHARDS
    plain = command(model, study, pool, alone, shard)
    subprocess.run(plain, check=True, capture_output=True, env=environment())
    words = [*command(model, study, pool, spread, shard), "--workers", "2"]
    seen = list(watched(words, spread))
    ours, theirs = rows_of(alone), rows_of(spread)
    return {
        "rows": n,
        "answered": len(workers(spread)),
        "each_once_and_in_order": [row["row"] for row in theirs] == list(range(n)),
        "equal_to_one_process": ours == theirs,
        "same_choice": alone.read_bytes() == spread.read_bytes(),
        "largest_mib": max(max(each.values()) for each in seen if each) / 2**20,
        "growth": growth(seen),
    }


def overhead(folder: Path, n: int, pairs: int) -> dict[str, Any]:
    """Return what a shard costs under one worker, in times of the plain loop's."""
    model, study = organism(folder)
    pool, shard = folder / "timed.jsonl", n // 10
    write_pool(pool, n)
    rounds = []
    for pair in range(pairs):
        seconds = {}
        # The order changes, so that no round has the quieter half of the machine.
        for way in ("plain", "ray")[:: 1 if pair % 2 else -1]:
            output = folder / f"{way}-{pair}.jsonl"
            words = command(model, study, pool, output, shard)
            more = ["--workers", "1"] if way == "ray" else []
            seconds[way] = between([*words, *more], output, -(-n // shard))
        rounds.append(seconds)
        print(f"round {pair}: {seconds}")
    # On a processor of its own a shard lasts as long as its work, and so long Ray's own
    # processes want theirs.
    ratios = [
        r["ray"]["work"] * (1 + r["ray"]["own"]) / r["plain"]["work"] for r in rounds
    ]
    return {"cpu": summarise(np.array(ratios)), "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the kill")
    parser.add_argument("--timed", type=int, default=2_000, help="rows of a round")
    parser.add_argument("--pairs", type=int, default=5, help="rounds")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result: dict[str, Any] = {}
        if options.rows:
            model, study = narrow_model(folder)
            result["killed"] = killed(folder, model, study, options.rows)
            print(json.dumps(result["killed"], indent=2))
        if options.pairs:
            found = overhead(folder, options.timed, options.pairs)
            result["overhead"] = found
            print(f"CPU of a shard, in times of the plain loop: {found['cpu']}")
            print(f"at most {LIMIT}: {found['cpu']['high'] <= LIMIT}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
