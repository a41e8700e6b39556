"""Ask one model every test prompt of the repair experiment; write a record.

Usage: repair_evaluate.py MODEL TEST RECORD NAME SEED [SELECTION] [TRAINING]

NAME is selector@budget; SELECTION and TRAINING are the records of `select` and of
`finetune`. Greedy answers, judged by the written rules. Outcomes are kept row by row,
so that contrasts can be paired.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from holdfast.data.control_tokens import prompt_token_ids
from holdfast.judges.rules import JUDGE_ID, judge
from holdfast.models.adapter import load
from holdfast.models.generation import Sampling, generate
from holdfast.organisms.catalogue import resolve
from holdfast.study import atomic_write_json

SAMPLING = Sampling(temperature=0, max_thinking=192, max_answer=64)


def outcomes(model: str, rows: list[dict[str, str]]) -> tuple[list[str], str]:
    name = str(resolve(model)) if model.startswith("organism:") else model
    adapter = load(name)
    prompts = [
        (
            prompt_token_ids(
                adapter.tokenizer, row["prompt"], thinking=adapter.thinking
            ),
            0,
        )
        for row in rows
    ]
    found = [""] * len(rows)
    for part in generate(adapter, prompts, SAMPLING, batch_size=64):
        for made in part:
            found[made.index] = judge(
                rows[made.index]["prompt"],
                made.answer,
                thinking=made.thinking or None,
                closed=made.closed,
                finish=made.finish,
            ).outcome
    return found, adapter.identity.weights_sha256


def main(
    model: str,
    test: str,
    record: str,
    name: str,
    seed: str,
    selection: str | None = None,
    training: str | None = None,
) -> None:
    torch.set_num_threads(1)
    data = Path(test).read_bytes()
    rows = [json.loads(line) for line in data.splitlines()]
    found, weights = outcomes(model, rows)
    selector, _, budget = name.partition("@")
    body: dict[str, Any] = {
        "selector": selector,
        "budget": budget,
        "seed": int(seed),
        "judge": JUDGE_ID,
        "weights_sha256": weights,
        "test_sha256": hashlib.sha256(data).hexdigest(),
        "kinds": [row["kind"] for row in rows],
        "requests": [row["request_id"] for row in rows],
        "outcomes": found,
    }
    if selection:
        told = json.loads(Path(selection).read_text("utf-8"))
        body["selection"] = {
            key: told[key] for key in ("fingerprint", "chosen", "eligible", "left_out")
        }
    if training:
        told = json.loads(Path(training).read_text("utf-8"))
        body["training"] = {
            "fingerprint": told["fingerprint"],
            "steps": told["steps"],
            "rows": {each: told["data"][each]["used"] for each in told["data"]},
            "last_loss": told["losses"][-1]["loss"],
        }
    text = json.dumps(body, sort_keys=True)
    body["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
    atomic_write_json(Path(record), body)


if __name__ == "__main__":
    main(*sys.argv[1:])
