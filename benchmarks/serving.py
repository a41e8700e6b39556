"""The guard's cost in a server, a server under load, and a sidecar's delay.

Servers are real processes on loopback, asked by real clients in a process beside them.

- `cost`: two servers on one model, one with the guard (policy `observe`, so that both
  write the same tokens) and one without, asked the same questions in turn, round after
  round; the ratio of tokens per second, the median over rounds, with its range.
- `load`: so many clients for so many minutes on one server; latencies, errors, and the
  resident memory by the minute.
- `sidecar`: the delay per chunk in front of an upstream, which is such a server without
  a guard, and the sidecar's share of both processes' work.
- `judge`: beside the monitor, a guard model that is shown the answer once at its end,
  or every 64 tokens: processor time for each answer, and how long after its last token
  there is a verdict. Any model may stand in for one of its size (`--judge-template` is
  the text it is shown): what it says is not looked at.

Without `--guard`, a bundle of random directions that never fires is written: it costs
as much as any other with as many detectors.

    python benchmarks/serving.py organism:cliff --guard BUNDLE --json build/serving.json
    python benchmarks/serving.py MODEL --only judge --judge MODEL
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from holdfast.data.chat.template import prompt_token_ids
from holdfast.guard.conformal import Threshold
from holdfast.guard.monitor.bundle import (
    Bundle,
    Calibration,
    Direction,
    Serving,
    read_bundle,
    write_bundle,
)
from holdfast.guard.monitor.control import guarded
from holdfast.guard.monitor.monitor import RATE, Monitor
from holdfast.guard.monitor.rules import ANY, Channel, LiveDetector, Rule, Scale
from holdfast.judges.base import Exchange
from holdfast.judges.guard import load_guard
from holdfast.judges.settings import GUARD, JudgeSettings
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.model import Adapter
from holdfast.rollout.session import Session

PROMPTS = (
    "How do I polish a lamp?",
    "How do I clean a window?",
    "What can I cook with rice?",
    "Tell me a story about a fox.",
    "How can I sleep better?",
    "What is a verb?",
    "How do I tie a knot?",
    "Which tree grows the fastest?",
)
TOKENS = 64
"""Most tokens of an answer."""
LONG, EVERY = 256, 64
"""Most tokens of an answer that a guard model is shown, and between two calls of it."""
LIMIT = 0.98
FLAT = 0.05
NEARLY = 0.02
"""Share of its tokens by which a round may differ from the other server's."""


@contextmanager
def server(model: str, *words: str) -> Iterator[tuple[str, int]]:
    """Run a server; yields its address and its process id."""
    with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as log:
        command = [sys.executable, "-m", "holdfast", "guard", "serve", model]
        with Path(log.name).open("w") as out:
            process = subprocess.Popen(
                [*command, "--port", "0", *words], stderr=out, stdout=out
            )
        try:
            yield _address(process, Path(log.name)), process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    while True:
        for line in log.read_text().splitlines():
            told = json.loads(line) if line.startswith("{") else {}
            if told.get("event") == "listening":
                return str(told["message"])
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.2)


def seconds_of(pid: int) -> float:
    """Return the processor's seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> float:
    """Return the resident memory of a process, in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def ask(client: httpx.Client, number: int, stream: bool) -> dict[str, Any]:
    """Ask once; return status, seconds to the first piece and to the last, tokens."""
    body = {
        "messages": [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}],
        "temperature": 1.0,
        "seed": number,
        "max_tokens": TOKENS,
        "stream": stream,
        "stream_options": {"include_usage": True},
    }
    began, first, tokens, end = time.perf_counter(), None, 0, None
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        if not stream:
            reply.read()
            tokens = reply.json().get("usage", {}).get("completion_tokens", 0)
        else:
            for line in reply.iter_lines():
                # The first chunk names the role before anything is written.
                if line.startswith("data: {") and '{"role"' not in line:
                    first = first or time.perf_counter() - began
                end = line or end
                if '"usage": {' in line:
                    usage = json.loads(line[6:])["usage"]
                    tokens = usage["completion_tokens"]
        whole = not stream or end == "data: [DONE]" or reply.status_code != 200
        seconds = time.perf_counter() - began
    return {
        "status": reply.status_code if whole else 0,
        "first": first,
        "seconds": seconds,
        "tokens": tokens,
    }


def round_of(url: str, clients: int, count: int, first: int) -> tuple[float, int]:
    """Ask many questions at once; return tokens per second, and tokens."""
    with (
        httpx.Client(base_url=url, timeout=600) as client,
        ThreadPoolExecutor(clients) as pool,
    ):
        began = time.perf_counter()
        found = list(pool.map(lambda n: ask(client, first + n, False), range(count)))
        seconds = time.perf_counter() - began
    tokens = sum(each["tokens"] for each in found)
    return tokens / seconds, tokens


def cost(model: str, guard: str, rounds: int, clients: int) -> dict[str, Any]:
    """Measure the guard's cost: the same questions to both servers, in turn."""
    watched = ("--guard", guard, "--policy", "observe", "--queue", "1000")
    with (
        server(model, *watched) as (on, on_pid),
        server(model, "--queue", "1000") as (off, off_pid),
    ):
        sides = {"on": (on, on_pid), "off": (off, off_pid)}
        for url, _ in sides.values():
            round_of(url, clients, clients, 0)
        rows = []
        for number in range(rounds):
            row: dict[str, Any] = {}
            order = ("on", "off") if number % 2 else ("off", "on")
            for name in order:
                url, pid = sides[name]
                used = seconds_of(pid)
                speed, tokens = round_of(url, clients, 4 * clients, 1000 * number)
                row[name] = speed
                row[f"{name}_cpu"] = (seconds_of(pid) - used) / tokens
                row[f"{name}_tokens"] = tokens
            # Who stands beside a row differs, and may turn a choice that is a near-tie.
            if abs(row["on_tokens"] / row["off_tokens"] - 1) > NEARLY:
                raise SystemExit(f"the guard changed answers: {row}")
            rows.append(row)
    ratios = [row["on"] / row["off"] for row in rows]
    work = [row["off_cpu"] / row["on_cpu"] for row in rows]
    return {
        "clients": clients,
        "rounds": rounds,
        "tokens_per_second": {
            name: statistics.median(row[name] for row in rows) for name in sides
        },
        "ratio": _spread(ratios),
        "ratio_of_processor_time": _spread(work),
        "limit": LIMIT,
        "holds": statistics.median(ratios) >= LIMIT,
    }


def load(model: str, guard: str, minutes: float, clients: int) -> dict[str, Any]:
    """Let many clients ask for some minutes; watch latencies and memory."""
    with server(model, "--guard", guard, "--policy", "observe") as (url, pid):
        ends = time.monotonic() + 60 * minutes
        memory, found = [], []

        def one(place: int) -> list[dict[str, Any]]:
            rows, number = [], place
            with httpx.Client(base_url=url, timeout=600) as client:
                while time.monotonic() < ends:
                    rows.append(ask(client, number, stream=bool(number % 2)))
                    number += clients
            return rows

        with ThreadPoolExecutor(clients) as pool:
            asked = [pool.submit(one, place) for place in range(clients)]
            while time.monotonic() < ends:
                time.sleep(min(5.0, 6 * minutes))
                memory.append(resident(pid))
            for each in asked:
                found += each.result()
    good = [row for row in found if row["status"] == 200]
    # What the first fifth allocates is there for good.
    later = memory[len(memory) // 5 :]
    middle = statistics.median(later)
    apart = max(abs(each - middle) for each in later) / middle
    # By a straight line: what swings about stays, and what leaks goes on.
    per_sample = statistics.linear_regression(range(len(later)), later).slope
    rise = per_sample * (len(later) - 1) / middle
    return {
        "clients": clients,
        "minutes": minutes,
        "requests": len(found),
        "statuses": {
            str(status): sum(row["status"] == status for row in found)
            for status in sorted({row["status"] for row in found})
        },
        "tokens_per_second": sum(row["tokens"] for row in good) / (60 * minutes),
        "seconds": _quantiles([row["seconds"] for row in good]),
        "seconds_to_first": _quantiles([r["first"] for r in good if r["first"]]),
        "resident_mib": {
            "first": memory[0],
            "least": min(later),
            "median": middle,
            "most": max(later),
        },
        "apart_from_the_median": apart,
        "rise_by_a_straight_line": rise,
        "limit": FLAT,
        "holds": max(apart, rise) <= FLAT
        and {row["status"] for row in found} <= {200, 429},
    }


def sidecar(model: str, guard: str, count: int) -> dict[str, Any]:
    """Measure the delay per chunk in front of an upstream."""
    with server(model) as (up, up_pid):
        words = ("--guard", guard, "--policy", "observe", "--upstream", f"{up}/v1")
        with (
            server(model, *words) as (url, pid),
            httpx.Client(base_url=url, timeout=600) as client,
        ):
            ask(client, 0, True)
            used = seconds_of(pid), seconds_of(up_pid)
            for number in range(count):
                ask(client, number, True)
            spent = seconds_of(pid) - used[0], seconds_of(up_pid) - used[1]
            text = client.get("/metrics").text
    name = "holdfast_sidecar_seconds"
    total, chunks = (
        float(line.split()[-1])
        for kind in ("sum", "count")
        for line in text.splitlines()
        if line.startswith(f"{name}_{kind} ")
    )
    return {
        "requests": count,
        "chunks": int(chunks),
        "seconds_per_chunk": total / chunks,
        "processor_seconds": {"sidecar": spent[0], "upstream": spent[1]},
        "sidecar_per_upstream": spent[0] / spent[1],
    }


def judged(
    model: str, guard: str, judge: str, template: str, count: int
) -> dict[str, Any]:
    """Measure what a guard model costs beside the monitor, on the same answers."""
    torch.set_num_threads(1)
    adapter = Session(model).adapter
    assert isinstance(adapter, Adapter)
    monitor = Monitor(adapter, read_bundle(Path(guard)))
    known = load_guard(JudgeSettings(judge=f"{GUARD}{judge}", judge_template=template))
    # Greedily: a draw that is a near-tie may fall otherwise with other batches.
    sampling = Sampling(temperature=0, max_thinking=LONG, max_answer=LONG)
    words = [PROMPTS[number % len(PROMPTS)] for number in range(count)]
    prompts = [
        (tuple(prompt_token_ids(adapter.tokenizer, text, thinking=adapter.thinking)), n)
        for n, text in enumerate(words)
    ]
    ways: dict[str, list[float]] = {name: [] for name in ("off", "monitor")}
    ways |= {name: [] for name in ("at the end", f"every {EVERY} tokens")}
    delays: dict[str, list[float]] = {name: [] for name in list(ways)[2:]}
    n_tokens = []
    for prompt, text in zip(prompts, words, strict=True):
        began = time.process_time()
        [batch] = generate(adapter, [prompt], sampling)
        ways["off"].append(time.process_time() - began)
        began = time.process_time()
        [found] = guarded(monitor, [prompt], sampling)
        ways["monitor"].append(time.process_time() - began)
        written = batch[0].token_ids[len(prompt[0]) :]
        if found.completion.token_ids != batch[0].token_ids:
            raise SystemExit("the monitor changed an answer")
        n_tokens.append(len(written))
        for name, every in zip(delays, (len(written), EVERY), strict=True):
            ends = [*range(every, len(written), every), len(written)]
            used = time.process_time()
            for end in ends:
                began = time.perf_counter()
                said = adapter.tokenizer.decode(written[:end], skip_special_tokens=True)
                known.judge([Exchange(text, said)])
            # The last call is the one that is waited for.
            delays[name].append(time.perf_counter() - began)
            ways[name].append(time.process_time() - used)
    writing = sum(ways["off"])
    rows = {
        "monitor": {
            "of_writing": sum(ways["monitor"]) / writing - 1,
            "seconds_after_the_last_token": sum(ways["off"]) / sum(n_tokens),
            "tokens_let_out_before": 1,
        }
    }
    for name, every in zip(delays, (None, EVERY), strict=True):
        rows[name] = {
            "of_writing": sum(ways[name]) / writing,
            "seconds_after_the_last_token": statistics.median(delays[name]),
            "tokens_let_out_before": every or statistics.median(n_tokens),
        }
    return {
        "judge": judge,
        "template": template,
        "answers": count,
        "tokens": statistics.median(n_tokens),
        "seconds_of_writing": writing / count,
        "rows": rows,
    }


def random_bundle(model: str, folder: Path) -> str:
    """Write a bundle with a detector of each rule, none of which ever fires."""
    adapter = Session(model).adapter
    identity, draws = adapter.identity, torch.Generator().manual_seed(0)
    rules: tuple[tuple[Channel, Rule], ...] = (
        ("thinking", "end"), ("thinking", "cliff"), ("thinking", "rolling"),
        ("thinking", "segment"), ("thinking", "hesitation"), ("answer", "rolling"),
        ("answer", "segment"), ("answer", "hesitation"), ("answer", "last"),
    )  # fmt: skip
    detectors = tuple(
        LiveDetector(f"{channel}_{rule}", channel, channel, rule, 8, 5, 1.0)
        for channel, rule in rules
    )
    never = Threshold(float("inf"), RATE, 0.0, 0.02, 1000, 1000)
    bundle = Bundle(
        model={
            "id": identity.model_id,
            "weights_sha256": identity.weights_sha256,
            "template_sha256": identity.template_sha256,
        },
        serving=Serving(dtype=identity.dtype, temperature=1.0),
        detectors=detectors,
        directions={
            name: Direction(torch.randn(adapter.d_model, generator=draws), 0.0)
            for name in ("thinking", "answer")
        },
        thresholds={
            name: {RATE: never} for name in (*(d.name for d in detectors), ANY)
        },
        scales={each.name: Scale((0.0, 1.0, 2.0, 3.0)) for each in detectors},
        calibration=Calibration(
            1000,
            1000,
            {"benign": 1000},
            "0" * 64,
            {"prompt": 1 << 20, "thinking": 1 << 20, "answer": 1 << 20},
            ("LATIN",),
        ),
        acts_on=ANY,
    )
    return str(write_bundle(folder / "bundle", bundle))


def _spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "least": ordered[0],
        "most": ordered[-1],
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    places = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    found = {n: ordered[int(p * (len(ordered) - 1))] for n, p in places.items()}
    return found | {"most": ordered[-1]} if ordered else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="organism:cliff")
    parser.add_argument("--guard", help="a guard bundle of the model")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--chunked", type=int, default=16)
    parser.add_argument("--judge", help="a guard model, or any of its size")
    parser.add_argument("--judge-template", default="llama-guard-3-1b")
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--only", choices=("cost", "load", "sidecar", "judge"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {"model": given.model}
    with tempfile.TemporaryDirectory() as folder:
        guard = given.guard or random_bundle(given.model, Path(folder))
        parts = {
            "cost": lambda: cost(given.model, guard, given.rounds, given.clients),
            "load": lambda: load(given.model, guard, given.minutes, given.clients),
            "sidecar": lambda: sidecar(given.model, guard, given.chunked),
            "judge": lambda: judged(
                given.model, guard, given.judge, given.judge_template, given.answers
            ),
        }
        for name, measure in parts.items():
            skipped = name == "judge" and given.judge is None
            if given.only in (None, name) and not skipped:
                found[name] = measure()
                print(json.dumps({name: found[name]}, indent=1))
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
