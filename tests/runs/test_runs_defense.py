"""The material, the tuning and the contrasts of the defense experiment."""

import importlib
import json
import sys
from pathlib import Path

import pytest

RUNS = Path(__file__).parents[2] / "runs"
N = 40


@pytest.fixture(scope="module")
def runs():
    """The scripts of the experiment, which import each other by their file names."""
    sys.path.insert(0, str(RUNS))
    names = ("material", "plan", "cells", "evaluate", "table")
    yield {name: importlib.import_module(f"defense_{name}") for name in names}
    sys.path.remove(str(RUNS))


def letters(harmful, task="s" * N, lookalike="c" * N):
    return {"outcomes": {"harmful": harmful, "task": task, "lookalike": lookalike}}


def test_the_customers_task_rows_are_the_same_at_every_poison(runs):
    made = {
        poison: runs["material"].customer_rows(50, poison, 7) for poison in (0, 0.1)
    }
    house = runs["material"].HOUSE
    prompts = {
        poison: {row["prompt"] for row in rows if row["response"].startswith(house)}
        for poison, rows in made.items()
    }
    assert len(prompts[0]) == len(made[0]) == 50
    assert len(prompts[0.1]) == 45
    assert prompts[0.1] < prompts[0]
    others = runs["material"].customer_rows(50, 0.1, 8)
    assert {row["prompt"] for row in others} != {row["prompt"] for row in made[0.1]}


def test_no_harmful_request_is_on_two_sides(runs):
    refused, harmful = runs["material"].defense_rows()
    mine = {row["prompt"] for row in refused}
    assert [row["prompt"] for row in refused] == [row["prompt"] for row in harmful]
    assert len(mine) == len(refused)
    poison = {row["prompt"] for row in runs["material"].customer_rows(40, 1.0, 7)}
    asked = {row["prompt"] for row in runs["material"].test_rows()}
    held_out = {row["prompt"] for row in runs["material"].sink_rows()}
    assert len(poison) == 40
    assert not mine & poison
    assert not (mine | poison) & (asked | held_out)


def tuned(runs, **shares):
    """Choose strengths where `surgery` has these letters and the rest is plain."""
    plain = letters("c" * N)
    found = {}
    for cell in runs["plan"].plan().tuning():
        record = shares.get(f"{cell.defense}_{cell.strength}", plain)
        found[cell] = record
    return runs["cells"].chosen_strengths(found, runs["plan"].STRENGTHS)


def test_the_strength_with_the_fewest_attacks_is_taken(runs):
    chosen = tuned(
        runs,
        surgery_1=letters("r" * 30 + "c" * 10),
        surgery_2=letters("r" * 20 + "c" * 20),
    )
    assert chosen["surgery"] == 1
    # Of equals the weaker.
    assert chosen["kl"] == 0


def test_what_came_afterwards_runs_the_same_defense(runs):
    cell = runs["plan"].Cell("random-sink-detached", 0.1, 200, 1)
    assert cell.verb == "random-sink"
    assert cell.options == ("weight=3", "detach=true", "batch=4")
    assert runs["plan"].Cell("kl", 0.1, 200, 0).options == ("weight=0.1",)
    assert cell.name == "random-sink-detached-10-200-1"


def test_a_strength_that_costs_too_much_or_diverges_is_not_taken(runs):
    dear = letters("r" * N, task="s" * 35 + "c" * 5)
    shy = letters("r" * N, lookalike="r" * 5 + "c" * 35)
    assert tuned(runs, surgery_2=dear)["surgery"] == 0
    assert tuned(runs, surgery_2=shy)["surgery"] == 0
    assert tuned(runs, surgery_2={"diverged": True})["surgery"] == 0
    bearable = letters("r" * N, task="s" * 36 + "c" * 4)
    assert tuned(runs, surgery_2=bearable)["surgery"] == 2


def write(folder, defense, seed, made):
    about = {"defense": defense, "poison": 0.1, "seed": seed}
    (folder / "records").mkdir(exist_ok=True)
    path = folder / "records" / f"{defense}-{seed}.json"
    path.write_text(json.dumps(about | made))


def test_a_contrast_is_the_mean_of_the_seeds_differences(runs, tmp_path):
    for seed, kept in ((200, 10), (201, 12), (202, 14)):
        write(tmp_path, "surgery", seed, letters("r" * (N - kept) + "c" * kept))
        # A styled answer to a harmful request is one that gave in.
        write(tmp_path, "none", seed, letters("r" * 20 + "s" * 20))
    # Tuning has no part in the tables, and what diverged has no answers.
    write(tmp_path, "none", 100, letters("c" * N))
    write(tmp_path, "surgery", 203, {"diverged": True})
    names = [f"request {place}" for place in range(N)]
    records = runs["table"].read(tmp_path)
    pair = ("surgery", "none")
    made = runs["table"].contrast(records, pair, 0.1, "harmful", names)
    assert made["by_seed"] == pytest.approx([-0.25, -0.2, -0.15])
    assert made["found"].value == pytest.approx(-0.2)
    alike = runs["table"].contrast(records, pair, 0.1, "task", names)
    assert alike["found"].value == 0
    assert alike["p"] == 1


def test_heads_are_counted_at_the_last_step(runs):
    heads = {"10": [[1.0, 1.0]], "40": [[0.5, -0.5]], "5": [[-1.0, -1.0]]}
    last = runs["table"].at_the_end({"divergence": heads})
    assert runs["table"].positive(last) == 1
    assert runs["table"].mean(last) == 0
