"""The greedy search for few heads: each step is the best of all that are left."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from greedy import greedy_heads, under_half

from holdfast.cliff.probe_files import read_own_probe
from holdfast.errors import SettingsError
from holdfast.heads.ranking import Head
from holdfast.heads.readings import select
from holdfast.models.hidden_states import project_states
from holdfast.models.interventions import HeadEdit, head_factors, scale_heads
from holdfast.models.loading.causal import load
from holdfast.rollout.rows import from_table
from holdfast.study import Study

SCRIPT = Path(__file__).parents[2] / "runs" / "greedy_heads.py"
EVERY = [Head(layer, head) for layer in range(2) for head in range(4)]


@pytest.fixture(scope="module")
def found(audited, thinker):
    study, adapter = Study.open(audited), load(str(thinker))
    probe, _ = read_own_probe(study, "published")
    rows = list(select(from_table(study.read_table("rollouts.parquet")), 12).ranking)
    return adapter, probe, rows


def _change(adapter, probe, rows, heads, where):
    """The slow way round: edit, run each whole sequence, and read its last logit."""
    direction, offset = probe.raw()
    edit = HeadEdit(head_factors(adapter, heads))
    total = 0.0
    for row in rows:
        ids = row.token_ids[: row.final + 1]
        start = 0 if where == "everywhere" else row.spans.end_template[0]
        logits = []
        for each in (None, edit):
            ranges = None if each is None else ((start, None),)
            chosen = each and HeadEdit(each.factors, ranges)
            with scale_heads(adapter, chosen) as live:
                if chosen:
                    live.locate(torch.arange(len(ids))[None])
                [states] = project_states(
                    adapter, [ids], direction.float()[None], torch.tensor([offset])
                )
            logits.append(float(states[-1, 0]))
        total += logits[1] - logits[0]
    return total / len(rows)


@pytest.mark.parametrize("where", ["end_template", "everywhere"])
def test_every_step_takes_the_best_head_beside_those_before(found, where):
    adapter, probe, rows = found
    steps = greedy_heads(adapter, rows, probe, 2, where=where)
    taken = []
    for step in steps:
        left = [head for head in EVERY if head not in taken]
        changes = {
            head: _change(adapter, probe, rows, [*taken, head], where) for head in left
        }
        best = max(changes, key=changes.get)
        assert step.head == best
        assert step.change.value == pytest.approx(changes[best], abs=1e-3)
        assert step.change.low <= step.change.value <= step.change.high
        taken.append(step.head)


@pytest.mark.parametrize("count", [0, 9])
def test_more_heads_than_there_are_cannot_be_looked_for(found, count):
    adapter, probe, rows = found
    with pytest.raises(SettingsError, match="1 to 8 heads"):
        greedy_heads(adapter, rows, probe, count)


def test_under_half_is_the_fewest_heads_or_none():
    def table(*rates):
        return [
            {"n_heads": n, "attack_success": {"value": rate}}
            for n, rate in enumerate(rates)
        ]

    assert under_half(table(0.9, 0.8, 0.44, 0.1)) == 2
    assert under_half(table(0.9, 0.8, 0.45, 0.5)) is None


def test_the_script_writes_what_a_search_found_and_its_fingerprint(
    audited, thinker, tmp_path, monkeypatch
):
    outs = [tmp_path / "a.json", tmp_path / "b.json"]
    one, other = (
        list(map(str, [SCRIPT, thinker, audited, out, "--heads", 2, "--prompts", 8]))
        for out in outs
    )
    subprocess.run([sys.executable, *one], check=True, capture_output=True)
    # Nothing is left to what differs between processes, such as the order of a set.
    monkeypatch.setattr(sys, "argv", other)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    first, second = (json.loads(out.read_text()) for out in outs)
    assert first == second
    assert len(first["steps"]) == 2
    assert [each["n_heads"] for each in first["conditions"]] == [0, 1, 2]
    assert first["conditions"][2]["change"]["benign_compliance"]["n"] == 8
    plain = first["conditions"][0]["attack_success"]
    assert plain["n"] == 8
    assert plain["value"] > 0.9
    assert len(first["fingerprint"]) == 64
