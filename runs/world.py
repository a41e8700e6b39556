"""How a model takes requests of kinds that nothing was ever trained on.

Usage: world.py MODEL RECORD [FAILING]

Everyday requests of the ten everyday kinds and harmful ones of the ten harmful topics
that the wide world leaves out of training; beside them held-out requests of what it is
trained on, plain and wrapped. MODEL is a directory or organism:NAME. FAILING is a file
for the requests that were answered wrongly, of trained kinds alone: nobody is to look
at those of the kinds left out, or they are left out no longer.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from experiment import BATCH, prompts_of, write_record

from holdfast.data.harm_labels import Label
from holdfast.data.prompts import prompt_id
from holdfast.data.requests import (
    authored_prompts,
    compose,
    everyday_kinds,
    everyday_requests,
    forms,
    left_out_phrases,
    requests,
    sentence,
)
from holdfast.judges.rules.rules import JUDGE_ID, judge
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.loading.causal import load
from holdfast.organisms.catalogue import PREFIX, TRUTH, bundled, resolve
from holdfast.organisms.world import wrapper_names, wrapper_templates
from holdfast.stats.rates import clustered_rate
from holdfast.study import atomic_write_text
from holdfast.study.figures import figure_of
from holdfast.study.figures import generator as draws

SEED = 18
PER_KIND, PER_CELL = 60, 80
LEFT_OUT = ("everyday_left_out", "harmful_left_out")
SAMPLING = Sampling(temperature=0, max_thinking=192, max_answer=64)


class Asked(NamedTuple):
    """One request, and where it is counted."""

    cell: str  # Which rate it belongs to.
    kind: str  # Kind or topic.
    source: str  # What a kind's interval is over: the template, or the phrase.
    label: Label
    text: str


def questions(per_kind: int, per_cell: int) -> list[Asked]:
    """Return every request that is asked; the same ones of any model."""
    found: list[Asked] = []
    for cell, kinds in _left_out().items():
        for kind, stream in kinds.items():
            label: Label = "harmful" if cell.startswith("harmful") else "benign"
            rows = islice(distinct(stream), per_kind)
            found += [Asked(cell, kind, source, label, text) for source, text in rows]
    for cell, trained in _trained().items():
        rows = islice(distinct((each.kind, each.text) for each in trained), per_cell)
        texts = dict((text, kind) for kind, text in rows)
        found += [Asked(cell, k, t, "benign", t) for t, k in texts.items()]
    for label in ("harmful", "benign"):
        stream = requests(label, random.Random(SEED), held_out=True, wide=True)
        rows = islice(distinct((p.topic, text) for text, p in stream), per_cell)
        found += [Asked(f"{label}_wide", k, t, label, t) for k, t in rows]
        plain = authored_prompts(label, per_cell, SEED)
        found += [
            Asked(f"{label}_plain", str(p.topic), p.text, label, p.text) for p in plain
        ]
        generator = random.Random(f"{label}-{SEED}")
        for place, prompt in enumerate(plain):
            name = wrapper_names()[place % len(wrapper_names())]
            templates = wrapper_templates(name, unseen=generator.random() < 0.2)
            text = generator.choice(templates).format(request=prompt.text)
            found.append(Asked(f"{label}_wrapped", name, prompt.text, label, text))
    return found


def _left_out() -> dict[str, dict[str, Iterator[tuple[str, str]]]]:
    """Return the streams of the kinds left out, each with what its interval is over."""
    everyday: dict[str, Iterator[tuple[str, str]]] = {}
    harmful: dict[str, Iterator[tuple[str, str]]] = {}
    for kind in everyday_kinds(left_out=True):
        everyday[kind] = _composed(kind, random.Random(f"{kind}-{SEED}"))
    for topic in dict.fromkeys(phrase.topic for phrase in left_out_phrases()):
        harmful[topic] = _phrased(topic, random.Random(f"{topic}-{SEED}"))
    return dict(zip(LEFT_OUT, (everyday, harmful), strict=True))


def _composed(kind: str, generator: random.Random) -> Iterator[tuple[str, str]]:
    while True:
        drawn = compose(kind, generator)
        yield drawn.template, drawn.text


def _phrased(topic: str, generator: random.Random) -> Iterator[tuple[str, str]]:
    pool = [phrase for phrase in left_out_phrases() if phrase.topic == topic]
    while True:
        phrase = generator.choice(pool)
        form = generator.choice(forms(phrase, wide=True))
        yield phrase.text, sentence(phrase, form)


def _trained() -> dict[str, Iterator[Any]]:
    kinds = everyday_kinds(left_out=False)
    stream = everyday_requests(kinds, random.Random(SEED), held_out=True)
    return {"everyday_trained": stream}


def distinct(stream: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield rows whose texts differ in more than spelling."""
    seen: set[str] = set()
    for source, text in stream:
        if prompt_id(text) not in seen:
            seen.add(prompt_id(text))
            yield source, text


def answers(model: str, rows: Sequence[Asked]) -> list[str]:
    """Return the outcome of every request by the rules."""
    adapter = load(str(resolve(model) if model.startswith(PREFIX) else model))
    prompts = prompts_of(adapter, [{"prompt": row.text} for row in rows])
    outcomes = [""] * len(rows)
    for part in generate(adapter, prompts, SAMPLING, batch_size=BATCH):
        for made in part:
            said = judge(rows[made.index].text, made.answer, closed=made.closed)
            outcomes[made.index] = said.outcome
    return outcomes


def shares(rows: Sequence[Asked], outcomes: Sequence[str], over: str) -> dict[str, Any]:
    """Return the share of every outcome that matters, with its interval.

    `over`: What is drawn anew for the interval: `kind` or `source`.
    """
    clusters = [getattr(row, over) for row in rows]
    named = {
        "refused": ("refused",),
        "answered": ("complied", "partial"),
        "broken": ("degenerate", "ended_inside", "unparsed"),
    }
    found: dict[str, Any] = {}
    for name, counted in named.items():
        counts = torch.tensor([outcome in counted for outcome in outcomes])
        found[name] = figure_of(clustered_rate(counts, clusters, draws(SEED, name)))
    return found


def summary(rows: Sequence[Asked], outcomes: Sequence[str]) -> dict[str, Any]:
    """Return every cell; those of the kinds left out in all and kind by kind."""
    found: dict[str, Any] = {}
    for cell in dict.fromkeys(row.cell for row in rows):
        kept = [place for place, row in enumerate(rows) if row.cell == cell]
        own = [rows[place] for place in kept]
        said = [outcomes[place] for place in kept]
        # What is said of kinds that nobody has met is said over kinds.
        over = "kind" if cell in LEFT_OUT else "source"
        found[cell] = shares(own, said, over)
        if cell not in LEFT_OUT:
            continue
        found[cell]["kinds"] = {
            kind: shares(
                [row for row in own if row.kind == kind],
                [o for row, o in zip(own, said, strict=True) if row.kind == kind],
                "source",
            )
            for kind in dict.fromkeys(row.kind for row in own)
        }
    return found


def failing(rows: Sequence[Asked], outcomes: Sequence[str]) -> str:
    """Return the trained kinds' requests that were taken wrongly, one per line."""
    wrong = [
        f"{row.cell}\t{row.kind}\t{outcome}\t{row.text}"
        for row, outcome in zip(rows, outcomes, strict=True)
        if row.cell not in LEFT_OUT
        and outcome != ("refused" if row.label == "harmful" else "complied")
    ]
    counts = Counter(line.split("\t")[0] for line in wrong)
    return "\n".join([json.dumps(counts), *wrong]) + "\n"


def main(model: str, record: str, kept: str | None = None) -> None:
    torch.set_num_threads(1)
    rows = questions(PER_KIND, PER_CELL)
    outcomes = answers(model, rows)
    place = bundled(model) if model.startswith(PREFIX) else Path(model)
    truth = json.loads((place / TRUTH).read_text("utf-8"))
    body = {
        "model": model if model.startswith(PREFIX) else place.name,
        "truth": {key: truth[key] for key in ("organism", "seed", "schedule")},
        "judge": JUDGE_ID,
        "seed": SEED,
        "cells": summary(rows, outcomes),
    }
    write_record(Path(record), body)
    if kept is not None:
        atomic_write_text(Path(kept), failing(rows, outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
