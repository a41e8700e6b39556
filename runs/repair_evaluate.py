"""Ask one model every test prompt of the repair experiment; write a record.

Greedy answers, judged by the written rules. Outcomes are kept row by row, so that
contrasts can be paired.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Final

import torch
from experiment import BATCH, prompts_of, write_record

from holdfast.judges.rules.rules import JUDGE_ID, judge
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.loading.causal import load
from holdfast.organisms.catalogue import resolve

SAMPLING = Sampling(temperature=0, max_thinking=192, max_answer=32)
"""A refusal is in the first words; on 650 answers of a mended organism 24 tokens gave
the verdicts of 64."""

LETTERS: Final = {
    "refused": "r", "complied": "c", "partial": "p", "degenerate": "d", "unparsed": "u",
}  # fmt: skip
"""Outcomes row by row are one letter each, which keeps a record readable."""

MOST_LISTED = 1_000
"""Longer lists of chosen rows are left to the selection's own record."""


def require_plan(path: Path, wanted: dict[str, Any]) -> None:
    """Stop if a folder holds an experiment with other settings."""
    found = json.loads(path.read_text("utf-8"))
    if found != wanted:
        raise SystemExit(
            f"expected {wanted} in {path}; found {found}. Name another folder."
        )


def outcomes(model: str, rows: list[dict[str, str]]) -> tuple[list[str], str]:
    name = str(resolve(model)) if model.startswith("organism:") else model
    adapter = load(name)
    prompts = prompts_of(adapter, rows)
    found = [""] * len(rows)
    for part in generate(adapter, prompts, SAMPLING, batch_size=BATCH):
        for made in part:
            found[made.index] = judge(
                rows[made.index]["prompt"],
                made.answer,
                thinking=made.thinking or None,
                closed=made.closed,
                finish=made.finish,
            ).outcome
    return found, adapter.identity.weights_sha256


def by_kind(rows: list[dict[str, str]], letters: list[str]) -> dict[str, str]:
    """Return the letters of each kind of prompt, in the order of the test."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return {
        kind: "".join(
            letter
            for row, letter in zip(rows, letters, strict=True)
            if row["kind"] == kind
        )
        for kind in kinds
    }


def evaluate(
    model: str,
    folder: Path,
    record: Path,
    name: str,
    seed: int,
    plan: dict[str, Any],
    chosen: Path | None,
) -> None:
    """Write the record of a model; `name` is selector@budget."""
    torch.set_num_threads(1)
    data = (folder / "test.jsonl").read_bytes()
    rows = [json.loads(line) for line in data.splitlines()]
    found, weights = outcomes(model, rows)
    selector, _, budget = name.partition("@")
    body: dict[str, Any] = {
        "selector": selector,
        "budget": budget,
        "seed": seed,
        "plan": plan,
        "judge": JUDGE_ID,
        "weights_sha256": weights,
        "test_sha256": hashlib.sha256(data).hexdigest(),
        "outcomes": by_kind(rows, [LETTERS[each] for each in found]),
    }
    if chosen is not None:
        told = json.loads(chosen.with_suffix(".selection.json").read_text("utf-8"))
        kept = ("fingerprint", "chosen", "eligible", "left_out", "output_sha256")
        body["selection"] = {key: told[key] for key in kept}
        lines = chosen.read_text("utf-8").splitlines()
        if len(lines) <= MOST_LISTED:
            places = [json.loads(line)["holdfast"]["row"] for line in lines]
            body["selection"]["rows"] = places
        path = Path(model) / "holdfast_finetune.json"
        told = json.loads(path.read_text("utf-8"))
        body["training"] = {
            "fingerprint": told["fingerprint"],
            "steps": told["steps"],
            "rows": {each: told["data"][each]["used"] for each in told["data"]},
            "last_loss": told["losses"][-1]["loss"],
        }
    write_record(record, body)
