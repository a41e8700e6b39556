"""Conditions of an ablation in one vLLM, side by side with a vLLM for each of them.

    python runs/engines_timed.py MODEL [--conditions 39] [--prompts 120] [--apart 39]

Each condition scales other heads, drawn at random. In one engine all are adapters;
apart, each is a whole checkpoint, read by a process of its own. `--apart` says how many
of them are run; their time is measured from start to end of the process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from holdfast.data.chat.template import prompt_token_ids
from holdfast.data.requests import authored_prompts
from holdfast.engines.adapters import hold_edits
from holdfast.engines.choose import open_engine
from holdfast.engines.port import Ask, Engine
from holdfast.engines.settings import EngineSettings
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.export import baking
from holdfast.models.interventions import HeadEdit, head_factors
from holdfast.models.loading.causal import load
from holdfast.models.model import Adapter

VLLM = EngineSettings(engine="vllm")


def asks_of(adapter: Adapter, n_prompts: int) -> list[Ask]:
    """Return prompts that are asked under each condition."""
    asked = [each.text for each in authored_prompts("benign", n_prompts, 0)]
    tokenizer, thinking = adapter.tokenizer, adapter.thinking
    rendered = [prompt_token_ids(tokenizer, each, thinking=thinking) for each in asked]
    return [Ask(tuple(each), i) for i, each in enumerate(rendered[:n_prompts])]


def edits_of(adapter: Adapter, n_conditions: int, n_heads: int) -> dict[str, HeadEdit]:
    """Return edits of heads drawn at random, by name."""
    draw = torch.Generator().manual_seed(0)
    every = [(x, y) for x in adapter.layers_with_heads for y in range(adapter.n_heads)]
    made = {}
    for number in range(n_conditions):
        chosen = torch.randperm(len(every), generator=draw)[:n_heads].tolist()
        heads = [every[i] for i in chosen]
        made[f"condition{number}"] = HeadEdit(head_factors(adapter, heads))
    return made


def drawn(engine: Engine, asks: list[Ask], how: Sampling) -> list[list[int]]:
    """Return tokens of all rows, in their order."""
    parts = engine.draw(asks, how)
    made = sorted((e for p in parts for e in p), key=lambda e: e.index)
    return [list(each.token_ids) for each in made]


def side_by_side(asked: argparse.Namespace) -> dict[str, Any]:
    """Return the times of both ways, and how many rows are the same."""
    n_conditions, n_prompts, tokens = asked.conditions, asked.prompts, asked.tokens
    adapter = load(asked.model, device="cpu", dtype="float32")
    how = Sampling(temperature=0, max_thinking=tokens, max_answer=tokens)
    edits = edits_of(adapter, n_conditions, asked.heads)
    asks = asks_of(adapter, n_prompts)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        engine, started = open_engine(VLLM, adapter), time.monotonic()
        hold_edits(engine, adapter, edits, place / "adapters", {})
        rows = [ask._replace(condition=name) for name in edits for ask in asks]
        together = drawn(engine, rows, how)
        one = time.monotonic() - started
        seconds, same, compared = [], 0, 0
        for number, (name, edit) in enumerate(list(edits.items())[: asked.apart]):
            with baking(adapter, edit, place / name, provenance={}):
                pass
            out, began = place / f"{name}.json", time.monotonic()
            words = [sys.executable, __file__, str(place / name), "--one", str(out)]
            words += ["--prompts", str(n_prompts), "--tokens", str(tokens)]
            subprocess.run(words, check=True)
            seconds.append(round(time.monotonic() - began, 1))
            alone = json.loads(out.read_text("utf-8"))
            mine = together[number * n_prompts : (number + 1) * n_prompts]
            same += sum(a == b for a, b in zip(alone, mine, strict=True))
            compared += n_prompts
    whole = sum(seconds) / max(1, len(seconds)) * n_conditions
    return {
        "conditions": n_conditions,
        "prompts": n_prompts,
        "heads": asked.heads,
        "tokens": tokens,
        "load": [round(each, 1) for each in os.getloadavg()],
        "cores": os.cpu_count(),
        "seconds_in_one": round(one, 1),
        "seconds_apart": seconds,
        "seconds_apart_all": round(whole, 1),
        "ratio": round(whole / one, 2),
        "rows_compared": compared,
        "rows_equal": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--conditions", type=int, default=39)
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--apart", type=int, default=39)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--one", type=Path)
    asked = parser.parse_args()
    if asked.one is None:
        print(json.dumps(side_by_side(asked)))
        return
    adapter = load(asked.model, device="cpu", dtype="float32")
    how = Sampling(temperature=0, max_thinking=asked.tokens, max_answer=asked.tokens)
    rows = asks_of(adapter, asked.prompts)
    engine = open_engine(VLLM, adapter)
    asked.one.write_text(json.dumps(drawn(engine, rows, how)), "utf-8")


if __name__ == "__main__":
    main()
