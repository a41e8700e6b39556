"""The guard in front of a real vLLM: `guard serve --upstream`, asked over sockets.

    ENGINE_PYTHON runs/guard_upstream.py STUDY BUNDLE RECORD [--rows N]

STUDY and BUNDLE are of `organism:cliff`, which vLLM serves with wider heads (see
`guard_in_vllm.py`). Each prompt is asked for as a stream, once of vLLM itself and once
through the guard, in turn. Where the guard ends an answer is held against the monitor
on the tokens that vLLM wrote; other answers have to come through as they are.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from engines_real import served, written
from experiment import write_record
from guard_in_vllm import bundle_for

from holdfast.data.chat.template import prompt_token_ids
from holdfast.guard.monitor.bundle import write_bundle
from holdfast.guard.monitor.monitor import Monitor
from holdfast.models.loading.causal import load
from holdfast.rollout.rows import from_table
from holdfast.study import Study

TOKENS = 96


def asked(client: httpx.Client, url: str, model: str, text: str) -> dict[str, Any]:
    """Ask for one answer as a stream; return its text, its verdict and its times."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        # Else the tags of the thinking are left out, which are special tokens here.
        "skip_special_tokens": False,
        "return_token_ids": True,
    }
    said, tokens, times = "", [], [time.perf_counter()]
    verdict = None
    with client.stream("POST", f"{url}/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            raise SystemExit(f"{url} answered {reply.status_code}: {reply.read()!r}")
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            for choice in chunk.get("choices", ()):
                said += choice["delta"].get("content") or ""
                tokens += choice.get("token_ids") or ()
            own = chunk.get("holdfast") or {}
            verdict = own.get("verdict") or verdict
            times.append(time.perf_counter())
    return {"said": said, "tokens": tokens, "verdict": verdict, "times": times}


def guard(model: Path, bundle: Path, url: str, log: Path) -> tuple[Any, str]:
    """Start the server in front of another; return its process and its address."""
    words = [sys.executable, "-m", "holdfast", "guard", "serve", str(model)]
    words += ["--guard", str(bundle), "--upstream", url, "--port", "0"]
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(words, stderr=out, stdout=out)
    while process.poll() is None:
        for line in log.read_text("utf-8").splitlines():
            told = json.loads(line) if line.startswith("{") else {}
            if told.get("event") == "listening":
                return process, str(told["message"]) + "/v1"
        time.sleep(0.3)
    raise SystemExit(log.read_text("utf-8"))


def compared(
    monitor: Monitor, texts: list[str], rows: list[tuple[Any, Any]]
) -> dict[str, Any]:
    """Hold each answer against the monitor on what vLLM wrote."""
    model, acts = monitor.model, monitor.bundle.acts_on
    fired = ended = elsewhere = changed = 0
    for text, (plain, through) in zip(texts, rows, strict=True):
        prompt = prompt_token_ids(model.tokenizer, text, thinking=model.thinking)
        scores = monitor.score_text(prompt, plain["tokens"])
        at = next((each.index for each in scores if acts in each.fired), None)
        verdict = through["verdict"]
        found = [x["index"] for x in verdict["fired"] if x["detector"] == acts]
        fired += at is not None
        ended += verdict["action"] == "stopped"
        elsewhere += found != ([] if at is None else [at])
        changed += at is None and through["said"] != plain["said"]
    return {
        "rows": len(rows),
        "fired": fired,
        "ended": ended,
        "fired_elsewhere": elsewhere,
        "others_changed": changed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    options = parser.parse_args()
    found = from_table(Study.open(options.study).read_table("rollouts.parquet"))
    texts = [
        row.prompt
        for role in ("wrapped", "benign")
        for row in [r for r in found if (r.role, r.split) == (role, "test")][
            : options.rows // 2
        ]
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = written(folder, "cliff")
        adapter = load(model, device="cpu", dtype="float32")
        bundle = bundle_for(adapter, options.bundle, "vllm")
        directory = write_bundle(folder / "bundle", bundle)
        os.environ["HF_HUB_OFFLINE"] = "1"
        with served(model, folder / "vllm.log") as url, httpx.Client() as client:
            process, front = guard(model, directory, url, folder / "guard.log")
            try:
                rows = []
                for text in texts:
                    plain = asked(client, url, str(model), text)
                    rows.append((plain, asked(client, front, str(model), text)))
            finally:
                process.terminate()
                process.wait()
    record = compared(Monitor(adapter, bundle), texts, rows)
    # Of answers that came through whole, since others are shorter.
    whole = [(p, t) for p, t in rows if t["verdict"]["action"] is None]
    delays = [
        (t["times"][-1] - t["times"][0]) - (p["times"][-1] - p["times"][0])
        for p, t in whole
    ]
    chunks = [max(1, len(p["times"]) - 1) for p, _ in whole]
    record["added_ms_per_chunk"] = median(
        1000 * delay / n for delay, n in zip(delays, chunks, strict=True)
    )
    write_record(options.record, record)


if __name__ == "__main__":
    main()
