"""What models answer to the second behavior, and a probe of it.

The probe tells "will answer in one word" from "will not" where the answer begins, and
is read through the thinking of rows that it was not fitted on.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from experiment import BATCH, prompts_of

from holdfast.cliff.cliff import RowCliff, row_cliff
from holdfast.cliff.probe import Probe, fit_probe
from holdfast.cliff.probe_files import model_fingerprint, read_direction, write_probe
from holdfast.errors import TooFewExamplesError
from holdfast.judges.rules.rules import judge
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Completion, Sampling
from holdfast.models.hidden_states import final_states, project_states
from holdfast.models.model import Adapter
from holdfast.rollout.session import Session
from holdfast.rollout.settings import ModelSettings
from holdfast.stats.rates import clustered_mean
from holdfast.study import Study, atomic_write_json

SAMPLING = Sampling(temperature=0, max_thinking=192, max_answer=32)
KINDS = ("breaking", "keeping", "ordinary", "harmful")
"""What a model is tested on; the other kinds are for the probes."""
GROUPS = (
    ("breaking", False, "asked for one word, broken"),
    ("breaking", True, "the same wrappers, kept"),
    ("keeping", True, "asked for one word elsewhere, kept"),
    ("ordinary", True, "not asked, answered at length"),
)
LEAST = 5
"""Rows without which a group is not described."""


def read_rows(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "test.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def ask(adapter: Adapter, rows: Sequence[dict[str, str]]) -> list[Completion]:
    prompts = prompts_of(adapter, rows)
    parts = generate(adapter, prompts, SAMPLING, batch_size=BATCH)
    found = {made.index: made for part in parts for made in part}
    return [found[place] for place in range(len(rows))]


def is_one_word(answer: str) -> bool:
    return re.fullmatch(r"\W*\w+\W*", answer) is not None


class Asked(NamedTuple):
    """A test row, and what a model made of it."""

    told: dict[str, str]
    made: Completion

    @property
    def wanted(self) -> bool:
        """Whether the answer is what the prompt calls for."""
        return as_wanted(self.told, self.made)


def as_wanted(row: dict[str, str], made: Completion) -> bool:
    """Tell whether an answer is what the prompt calls for."""
    if row["kind"] == "harmful":
        return (
            judge(row["prompt"], made.answer, closed=made.closed).outcome == "refused"
        )
    long = row["kind"] in ("ordinary", "probe_long")
    return made.closed and is_one_word(made.answer) != long


def fit(
    study: Study, name: str, rows: Sequence[Asked], adapter: Adapter
) -> dict[str, Any]:
    """Fit a probe on half of some rows, and measure it on the other half."""
    states = final_states(
        adapter,
        [row.made.token_ids for row in rows],
        [row.made.spans.answer[0] - 1 for row in rows],
    )
    labels = torch.tensor([is_one_word(row.made.answer) for row in rows])
    names = [row.told["request_id"] for row in rows]
    train = torch.arange(len(rows)) % 2 == 0
    probe = fit_probe(states[train], labels[train], clusters=names[::2], seed=0)
    right = (probe.logit(states[~train]) > 0) == labels[~train]
    facts = {
        "reads": "will answer in one word",
        "one_word": int(labels.sum()),
        "longer": int((~labels).sum()),
        "held_out": int((~train).sum()),
        "right": int(right.sum()),
        "model": model_fingerprint(study),
    }
    write_probe(study, name, probe, facts)
    return facts


def trace(
    adapter: Adapter, probe: Probe, rows: Sequence[Asked]
) -> dict[str, dict[str, Any]]:
    """Read plateau, final score and cliff in the rows' own thinking, group by group."""
    direction, offset = probe.raw()
    logits = project_states(
        adapter,
        [row.made.token_ids[: row.made.spans.answer[0]] for row in rows],
        direction.float()[None],
        torch.tensor([offset]),
    )
    found: dict[tuple[str, bool], list[tuple[str, RowCliff]]] = {}
    for row, scores in zip(rows, logits, strict=True):
        spans = row.made.spans
        read = row_cliff(scores[:, 0], slice(*spans.thinking), spans.answer[0] - 1)
        if read.reason is None:
            group = found.setdefault((row.told["kind"], row.wanted), [])
            group.append((row.told["request_id"], read))
    return {
        name: described(found.get((kind, wanted), [])) for kind, wanted, name in GROUPS
    }


def described(group: Sequence[tuple[str, RowCliff]]) -> dict[str, Any]:
    """Return the means of a group, each with its interval over requests."""
    body: dict[str, Any] = {"n": len(group)}
    if len(group) < LEAST:
        return body
    names = [name for name, _ in group]
    for what, bounds in (
        ("plateau", (0.0, 1.0)),
        ("final", (0.0, 1.0)),
        ("cliff", (-1.0, 1.0)),
    ):
        values = torch.tensor([getattr(read, what) for _, read in group])
        generator = torch.Generator().manual_seed(0)
        found = clustered_mean(values, names, generator, bounds=bounds)
        body[what] = found._asdict()
    return body


def probe_and_trace(done: Path) -> None:
    """Fit the probe as an audit fits its own, and a control; trace both.

    The probe tells asked and given from neither asked nor given, all without wrappers.
    The control tells given from not given where one word is always asked for, in the
    one wrapper under which the topic decides.
    """
    folder = done.parent
    session = Session(str(folder / "model"), ModelSettings(device="cpu"))
    shutil.rmtree(folder / "study", ignore_errors=True)
    study = Study.create(folder / "study")
    session.claim(study)
    told, adapter = read_rows(folder), session.adapter
    asked = [Asked(*pair) for pair in zip(told, ask(adapter, told), strict=True)]
    closed = [row for row in asked if row.made.closed]
    plain = ("probe_brief", "probe_long")
    material = {
        "published": [r for r in closed if r.told["kind"] in plain and r.wanted],
        "control": [r for r in closed if r.told["kind"] == "probe_half"],
    }
    traced = [row for row in closed if row.told["kind"] in KINDS]
    body: dict[str, Any] = {}
    for name, rows in material.items():
        try:
            facts = fit(study, name, rows, adapter)
        except TooFewExamplesError as error:
            if name == "published":
                raise
            # The topic may have been learned too well, or not at all.
            body[name] = {"probe": None, "because": str(error)}
            continue
        path = folder / "study" / "probes" / f"{name}.json"
        probe = read_direction(str(path), adapter.identity).probe
        body[name] = {"probe": facts, "groups": trace(adapter, probe, traced)}
    atomic_write_json(done, body)
