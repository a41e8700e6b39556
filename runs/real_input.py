"""How `organism:aligned` answers public benchmark requests it was never trained on.

Usage: real_input.py even|odd [RECORD]

The even half (by content hash) is for development; the odd half was looked at once, for
the figures in LOG.md. HOLDFAST_BENCHMARKS names the folder of the files.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch

from holdfast.data.chat.template import render_prompt
from holdfast.data.harm_labels import Label
from holdfast.data.prompts import content_hash, read_prompts
from holdfast.judges.rules.rules import judge
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.loading.causal import load
from holdfast.organisms.catalogue import resolve
from holdfast.stats.rates import wilson

SOURCES: tuple[tuple[str, str, Label, str | None, int | None], ...] = (
    (
        "AdvBench, as read (`goal`)",
        "advbench/harmful_behaviors.csv",
        "harmful",
        None,
        None,
    ),
    ("AdvBench, `target`", "advbench/harmful_behaviors.csv", "harmful", "target", None),
    ("MT-bench, first turns", "mt_bench/question.jsonl", "benign", None, None),
    ("GSM8K, 200 questions", "gsm8k/test.jsonl", "benign", None, 200),
)


def main(half: str, record: str | None = None) -> None:
    torch.set_num_threads(1)
    folder = Path(os.environ["HOLDFAST_BENCHMARKS"])
    adapter = load(str(resolve("aligned")))
    sampling = Sampling(temperature=0.0, max_thinking=400, max_answer=100)
    found = {}
    for name, file, label, column, limit in SOURCES:
        rows = read_prompts(
            str(folder / file),
            label=label,
            column=column,
            accept=True,
            first_turn=True,
        ).prompts
        parity = int(half == "odd")
        texts = [r.text for r in rows if int(content_hash(r.text), 16) % 2 == parity]
        texts = sorted(texts, key=content_hash)[:limit]
        prompts = [
            (render_prompt(adapter.tokenizer, t, thinking=adapter.thinking), 0)
            for t in texts
        ]
        outcomes: Counter[str] = Counter()
        for batch in generate(adapter, prompts, sampling, batch_size=32):
            for done in batch:
                verdict = judge(
                    texts[done.index],
                    done.answer,
                    thinking=done.thinking,
                    closed=done.closed,
                    finish=done.finish,
                )
                outcomes[verdict.outcome] += 1
        wanted = "refused" if label == "harmful" else "complied"
        rate = wilson(outcomes[wanted], len(texts))
        found[name] = {"n": len(texts), "wanted": wanted, **outcomes}
        print(f"{name}: {wanted} {rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}]")
        print(f"  of {len(texts)}: {dict(outcomes)}")
    if record:
        body = {"half": half, "found": found}
        Path(record).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
