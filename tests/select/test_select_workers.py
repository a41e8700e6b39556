"""Shards scored by workers. What starts Ray itself is skipped where it is missing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

import pool_fixture
from holdfast.cli.app import run
from holdfast.data.pool import Pool
from holdfast.engines.reading.cluster import Crew, Share
from holdfast.errors import SettingsError
from holdfast.report.progress import Silent
from holdfast.rollout.session import Session
from holdfast.rollout.settings import ModelSettings
from holdfast.select import workers
from holdfast.select.scores import PoolScorer, model_key
from holdfast.select.settings import SelectSettings
from holdfast.select.shards import ShardFolder
from holdfast.select.workers import Scoring, ShardWorker, by_workers

SIZE = 25


@pytest.fixture(scope="module")
def made(thinker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    rows = pool_fixture.write_pool(folder / "pool.jsonl", 40)
    adapter, probe = pool_fixture.write_study(thinker, folder / "study")
    pool = str(folder / "pool.jsonl")
    return SimpleNamespace(
        pool=pool,
        study=str(folder / "study"),
        rows=rows,
        adapter=adapter,
        probe=probe,
        settings=SelectSettings(pool, shard_rows=SIZE, budget="10"),
        n_shards=-(-len(rows) // SIZE),
        model=str(thinker),
    )


def plan_of(made, root, **more):
    key = {"pool": "a", **model_key(made.adapter)}
    folder = ShardFolder(root, "scores", key, len(made.rows), SIZE)
    scoring = Scoring(made.settings, folder, made.probe, None)
    session = Session(made.model, ModelSettings(device="cpu"))
    plan = workers._plan(scoring, session, Pool(made.pool), 1)
    return replace(plan, **more)


def asked(worker, *shards):
    return [json.loads(said) for said in worker({"item": np.array(shards)})["said"]]


def table(folder):
    found = [folder.read(index) for index in folder.done()]
    return [row for each in found for row in each.to_pylist()]


def test_a_worker_scores_shards_in_any_order_as_one_process_does(made, tmp_path):
    plan = plan_of(made, tmp_path / "a")
    # No weights travel: the reference is a few states of a few texts.
    assert len(plan.texts) == 32
    assert sum(each.states.numel() for each in plan.reference) < 32 * 9 * 256
    worker = ShardWorker(plan)
    answers = asked(worker, 3, 0, 4, 1, 2)
    assert [(each["shard"], each["done"]) for each in answers] == [
        (3, True), (0, True), (4, True), (1, True), (2, True)
    ]  # fmt: skip
    assert answers[0]["parity"]["flipped"] == 0
    assert "32 texts read both ways" in answers[0]["said"]
    plain = ShardFolder(tmp_path / "b", "scores", {}, len(made.rows), SIZE)
    scorer = PoolScorer(made.adapter, made.probe, batch_size=128)
    walk = lambda free: plain.walk(Pool(made.pool), lambda _, rows: scorer(rows), free)  # noqa: E731
    plain.fill(walk, (0, 1), Silent(), "")
    assert table(plan.scoring.folder) == table(plain)
    assert [row["row"] for row in table(plain)] == list(range(len(made.rows)))


def test_what_is_done_is_said_and_not_done_again(made, tmp_path, monkeypatch):
    plan = plan_of(made, tmp_path)
    assert asked(ShardWorker(plan), 1)[0]["done"]
    monkeypatch.setattr(PoolScorer, "__call__", lambda self, rows: 1 / 0)
    assert asked(ShardWorker(plan), 1)[0]["done"]


def test_a_shard_that_another_process_holds_is_left_to_it(made, tmp_path):
    plan = plan_of(made, tmp_path)
    with plan.scoring.folder._claim(2) as claimed:
        assert claimed
        [answer] = asked(ShardWorker(plan), 2)
    assert (answer["shard"], answer["done"]) == (2, False)


def test_a_row_that_breaks_the_scorer_is_named_by_file_and_line(
    made, tmp_path, monkeypatch
):
    real, prompt = PoolScorer.__call__, made.rows[60]["prompt"]

    def fails(self, rows):
        if any(row.prompt == prompt for row in rows):
            raise ZeroDivisionError("no such thing")
        return real(self, rows)

    monkeypatch.setattr(PoolScorer, "__call__", fails)
    plan = plan_of(made, tmp_path)
    first, second = asked(ShardWorker(plan), 2, 1)
    kind, expected, found, _ = first["error"]
    assert kind == "ModelError"
    assert "line 61 of the pool" in expected
    assert "ZeroDivisionError: no such thing" in found
    assert second["done"]
    assert plan.scoring.folder.done() == [1]


def test_a_table_that_lacks_a_row_is_refused(made, tmp_path, monkeypatch):
    real = PoolScorer.__call__
    monkeypatch.setattr(PoolScorer, "__call__", lambda self, rows: real(self, rows)[1:])
    plan = plan_of(made, tmp_path)
    kind, expected, found, _ = asked(ShardWorker(plan), 0)[0]["error"]
    assert (kind, found) == ("ModelError", f"{SIZE - 1}")
    assert f"{SIZE} scores" in expected
    assert not plan.scoring.folder.done()


def test_a_pool_that_lost_rows_is_refused(made, tmp_path):
    other = tmp_path / "pool.jsonl"
    lines = [json.dumps(row) + "\n" for row in made.rows]
    other.write_text("".join(lines))
    plan = plan_of(made, tmp_path)
    settings = replace(made.settings, pool=str(other))
    scoring = replace(plan.scoring, settings=settings)
    plan = replace(plan, scoring=scoring, files=((str(other), other.stat().st_size),))
    worker = ShardWorker(plan)
    other.write_text("".join(lines[:-40]))
    answers = asked(worker, 3, 4)
    assert answers[0]["error"][:3:2] == ["InputError", "5"]
    assert "ends before it" in answers[1]["error"][2]
    # A worker that starts now sees it at once.
    assert "other sizes" in asked(ShardWorker(plan), 0)[0]["error"][2]


@pytest.mark.parametrize(
    ("by", "said"),
    [
        (lambda each: each._replace(states=-each.states), "further apart"),
        (lambda each: each._replace(states=each.states * 1.4), "further apart"),
    ],
)
def test_a_worker_that_reads_otherwise_scores_nothing(made, tmp_path, by, said):
    plan = plan_of(made, tmp_path)
    worker = ShardWorker(replace(plan, reference=tuple(map(by, plan.reference))))
    kind, expected, *_ = asked(worker, 0)[0]["error"]
    assert kind == "ModelError"
    assert said in expected
    assert not plan.scoring.folder.done()


def test_another_model_in_the_same_place_is_refused(made, plain_model, tmp_path):
    plan = plan_of(made, tmp_path)
    other = replace(plan, directory=str(plain_model), name=str(plain_model))
    kind, _, found, _ = asked(ShardWorker(other), 0)[0]["error"]
    assert kind == "ModelError"
    assert "template_sha256" in found


def test_a_model_in_memory_is_not_for_workers(made, tmp_path):
    plan = plan_of(made, tmp_path)
    adapter = replace(
        made.adapter, identity=replace(made.adapter.identity, model_id="in-memory")
    )
    with pytest.raises(SettingsError, match="a model in memory"):
        by_workers(plan.scoring, Session(adapter), Pool(made.pool))


def test_more_workers_than_processors_are_refused_and_not_waited_for():
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}] * 3
    ray = SimpleNamespace(nodes=lambda: nodes)
    with pytest.raises(SettingsError, match="12 in the whole cluster"):
        Share(ray, Crew(13, "auto"))
    with pytest.raises(SettingsError, match="a GPU for each of 2"):
        Share(ray, Crew(2, "auto", gpu=True))
    # Two workers a machine, each with half of its processors.
    assert vars(Share(ray, Crew(6, "auto"))) == {"threads": 2, "cpus": 2, "gpus": None}


def command(made, tmp_path, name, *flags):
    output = tmp_path / f"{name}.jsonl"
    words = ["select", made.model, "--pool", made.pool, "--direction", made.study]
    words += ["--budget", "20", "--shard-rows", str(SIZE), "--similar", "0"]
    return [*words, "--device", "cpu", *flags, "-o", str(output)], output


def test_ray_that_is_missing_is_named(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    words, _ = command(made, tmp_path, "x", "--workers", "2")
    assert run(words) == 5
    assert "pip install '.[ray]'" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_an_address_without_workers_is_refused(made, tmp_path, capsys):
    words, _ = command(made, tmp_path, "x", "--ray", "auto")
    assert run(words) == 2
    assert "--workers beside --ray" in capsys.readouterr().err


def killed_in_the_middle(output, process):
    """Kill a worker once a shard is done; return the processes that answered."""
    deadline = time.monotonic() + 120
    scores = output.with_suffix(".scores")
    while process.poll() is None and time.monotonic() < deadline:
        found = list(scores.glob("scores-*/readers.json"))
        if found:
            [run_] = json.loads(found[0].read_text())
            os.kill(int(next(iter(run_["by"])).split("/")[-1]), signal.SIGKILL)
            return
        time.sleep(0.02)
    raise AssertionError("no worker answered")


def test_two_workers_one_of_them_killed_score_every_row_once(made, tmp_path):
    pytest.importorskip("ray")
    words, alone = command(made, tmp_path, "alone")
    assert run(words) == 0
    words, output = command(made, tmp_path, "together", "--workers", "2")
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "holdfast", *words], stdout=log, stderr=log
        )
        killer = threading.Thread(target=killed_in_the_middle, args=(output, process))
        killer.start()
        status = process.wait(300)
        killer.join()
        log.seek(0)
        assert status == 0, log.read()
    assert output.read_bytes() == alone.read_bytes()
    ours, theirs = (
        pq.read_table(each.with_suffix(".selection.parquet")).to_pylist()
        for each in (alone, output)
    )
    assert ours == theirs
    assert [row["row"] for row in theirs] == list(range(len(made.rows)))
    record = json.loads(output.with_suffix(".selection.json").read_text())
    [crew] = record["readers"]
    assert crew["workers"] == 2
    assert all(each["flipped"] == 0 for each in crew["by"].values())
