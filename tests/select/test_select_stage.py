import json
import shutil
import signal
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

import pool_fixture
from holdfast.cli.app import run
from holdfast.data.chat.conversation import build_conversation
from holdfast.select.scores import PoolScorer

COLUMNS = ("row", "plateau", "final", "cliff", "score", "rank", "left_out", "reason")


@pytest.fixture(scope="module")
def made(thinker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    rows = pool_fixture.write_pool(folder / "pool.jsonl")
    adapter, probe = pool_fixture.write_study(thinker, folder / "study")
    return SimpleNamespace(
        folder=folder,
        pool=str(folder / "pool.jsonl"),
        study=str(folder / "study"),
        rows=rows,
        adapter=adapter,
        probe=probe,
        scores=str(folder / "scores"),
    )


def select(thinker, made, tmp_path, *flags, pool=None, scores=None, name="chosen"):
    output = tmp_path / f"{name}.jsonl"
    command = ["select", str(thinker), "--pool", pool or made.pool]
    command += ["--scores", scores or made.scores, "--direction", made.study]
    return run([*command, *flags, "--similar", "0", "-o", str(output)]), output


def read(output):
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    table = pq.read_table(output.with_suffix(".selection.parquet")).to_pydict()
    record = json.loads(output.with_suffix(".selection.json").read_text())
    return rows, table, record


def test_cliff_chooses_the_attack_that_works_and_no_other(thinker, made, tmp_path):
    status, output = select(thinker, made, tmp_path, "--by", "cliff", "--budget", "40")
    assert status == 0
    rows, table, record = read(output)
    assert {row["category"] for row in rows} == {"song"}
    # The rows are the pool's own, to the letter, beside one field of ours.
    for row in rows:
        own = row.pop("holdfast")
        assert row == made.rows[own["row"]]
        assert table["rank"][own["row"]] == own["rank"]
        assert table["score"][own["row"]] == own["score"]
    assert record["chosen"] == 40
    assert len(table["row"]) == len(made.rows)
    assert table["row"] == list(range(len(made.rows)))
    # Every row has its score, chosen or not, and no better one was left out.
    worst = min(row for row in (table["score"][i] for i in range(180)) if row)
    assert worst is not None
    ranked = sorted(range(180), key=lambda i: -table["score"][i])
    assert {i for i in range(180) if table["rank"][i] is not None} == set(ranked[:40])


def test_scores_are_those_of_one_row_alone_by_hand(thinker, made, tmp_path):
    _, output = select(thinker, made, tmp_path, "--by", "cliff", "--budget", "3")
    _, table, _ = read(output)
    for place in (0, 1, 100):
        row, adapter = made.rows[place], made.adapter
        conversation = build_conversation(
            adapter.tokenizer, row["prompt"], row["thinking"], "", adapter.thinking
        )
        with torch.inference_mode():
            states = adapter.base(torch.tensor([conversation.token_ids]))
        scores = made.probe.score(states.last_hidden_state[0])
        start, end = conversation.spans.thinking
        kept = end - start - -(-(end - start) // 20)
        plateau = scores[start : start + kept].double().quantile(0.5)
        assert table["plateau"][place] == pytest.approx(float(plateau), abs=1e-5)
        assert table["final"][place] == pytest.approx(float(scores[-1]), abs=1e-5)
        assert table["cliff"][place] == pytest.approx(
            table["plateau"][place] - table["final"][place], abs=1e-12
        )


def test_rivals_choose_by_their_own_lights(thinker, made, tmp_path):
    chosen = {}
    for by in ("final", "judge", "rules", "random", "random-flagged", "length", "loss"):
        flags = ("--by", by, "--budget", "30", "--max-answer", "32")
        status, output = select(thinker, made, tmp_path, *flags, name=by)
        assert status == 0, by
        chosen[by], _, record = read(output)
        assert record["settings"]["by"] == by
    categories = {by: {row["category"] for row in rows} for by, rows in chosen.items()}
    # These three look at what the model does, and only the song works on it.
    for by in ("final", "judge", "rules", "random-flagged", "loss"):
        assert categories[by] == {"song"}, by
    assert categories["random"] == {"plain", "song", "sternly"}
    table = read(tmp_path / "length.jsonl")[1]
    pairs = zip(table["n_thinking"], table["n_answer"], table["rank"], strict=True)
    lengths = [(a + b, rank is not None) for a, b, rank in pairs]
    least = min(length for length, taken in lengths if taken)
    assert least >= max(length for length, taken in lengths if not taken)
    same = {row["holdfast"]["row"] for row in chosen["judge"]}
    assert same != {row["holdfast"]["row"] for row in chosen["random-flagged"]}


def test_random_is_another_choice_under_another_seed_and_the_same_under_one(
    thinker, made, tmp_path
):
    found = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        flags = ("--by", "random", "--budget", "10%", "--seed", seed)
        _, output = select(thinker, made, tmp_path, *flags, name=name)
        found.append([row["holdfast"]["row"] for row in read(output)[0]])
    assert len(found[0]) == 18
    assert found[0] == found[1] != found[2]


def test_quotas_divide_the_budget(thinker, made, tmp_path):
    flags = ("--by", "cliff", "--budget", "9", "--quota", "equal")
    _, output = select(thinker, made, tmp_path, *flags)
    rows, _, record = read(output)
    assert record["by_category"] == {"plain": 3, "song": 3, "sternly": 3}
    assert len(rows) == 9


def test_rows_that_cannot_be_scored_are_counted_listed_and_not_lost(
    thinker, made, tmp_path, capsys
):
    rows = [dict(made.rows[1]) for _ in range(6)]
    for place, row in enumerate(rows):
        row["prompt"] += f" Variant {place}."
    del rows[1]["thinking"]
    rows[2]["thinking"] = "No. " * 400
    rows[3]["thinking"] = "Say no."
    rows[4]["thinking"] = f"<think>\n{rows[4]['thinking']}\n</think>"
    rows[5]["response"] = f"<think>\n{rows[5].pop('thinking')}"
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"pool": str(path), "scores": str(tmp_path / "s")}
    status, output = select(
        thinker, made, tmp_path, "--by", "cliff", "--budget", "1", **own
    )
    assert status == 0
    found, table, record = read(output)
    assert [row["prompt"] for row in found] == [rows[0]["prompt"]]
    assert {why: each["rows"] for why, each in record["left_out"].items()} == {
        "no thinking": 1,
        "over the context": 1,
        "short thinking": 1,
        "tags inside the thinking": 1,
        "thinking that never ends": 1,
    }
    assert record["left_out"]["thinking that never ends"]["first"] == ["line 6"]
    assert record["left_out"]["over the context"]["first"] == ["line 3"]
    assert "over the context of 256" in table["reason"][2]
    # The final score needs no plateau: short thinking may be chosen by it.
    status, output = select(
        thinker, made, tmp_path, "--by", "final", "--budget", "2", **own
    )
    assert status == 0
    assert {row["holdfast"]["row"] for row in read(output)[0]} == {0, 3}
    status, _ = select(thinker, made, tmp_path, "--by", "cliff", "--budget", "2", **own)
    assert status == 4
    assert "1 no thinking" in capsys.readouterr().err


def test_thinking_of_the_model_is_drawn_scored_and_written(thinker, made, tmp_path):
    bare = [{k: v for k, v in row.items() if k != "thinking"} for row in made.rows[:12]]
    path = tmp_path / "bare.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in bare))
    flags = ("--by", "cliff", "--budget", "4", "--thinking-of", "model")
    flags += ("--max-thinking", "64", "--max-answer", "32")
    own = {"pool": str(path), "scores": str(tmp_path / "s")}
    status, output = select(thinker, made, tmp_path, *flags, **own)
    assert status == 0
    rows, _, _ = read(output)
    assert {row["category"] for row in rows} == {"song"}
    for row in rows:
        assert "thinking" not in row
        assert "say no" in row["holdfast"]["thinking"]


def test_near_copies_are_passed_over_and_counted(thinker, made, tmp_path):
    rows = [made.rows[1]] * 5 + made.rows[:30]
    path, output = tmp_path / "twins.jsonl", tmp_path / "distinct.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["select", str(thinker), "--pool", str(path), "--direction", made.study]
    flags = ["--budget", "8", "--similar", "1", "-o", str(output)]
    assert run([*command, *flags]) == 0
    found, _, record = read(output)
    assert len({row["prompt"] for row in found}) == 8
    assert record["near_copies_passed_over"] >= 0
    assert len(found) == 8


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (("--budget", "181"), 2, "at most 180 rows"),
        (("--budget", "0"), 2, "--budget"),
        (("--budget", "120%"), 2, "--budget"),
        (("--shard", "3/2"), 2, "i/n"),
        (("--column", "prompt=nothing"), 2, "nothing"),
    ],
)
def test_bad_input_is_named(thinker, made, tmp_path, capsys, flags, status, said):
    output = tmp_path / "x.jsonl"
    command = ["select", str(thinker), "--pool", made.pool, "--direction", made.study]
    assert run([*command, *flags, "-o", str(output)]) == status
    assert said in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


def test_a_probe_that_is_not_there_is_named(thinker, made, tmp_path, capsys):
    output = tmp_path / "x.jsonl"
    command = ["select", str(thinker), "--pool", made.pool, "-o", str(output)]
    assert run([*command, "--budget", "3", "--direction", str(tmp_path)]) == 2
    assert "expected a probe at" in capsys.readouterr().err


def test_no_room_for_an_answer_is_said(thinker, made, tmp_path, capsys):
    flags = ("--by", "judge", "--budget", "3", "--max-answer", "256")
    assert select(thinker, made, tmp_path, *flags)[0] == 4
    assert "180 without room to answer (--max-answer)" in capsys.readouterr().err


def test_a_probe_of_another_model_is_refused(
    plain_model, thinker, made, tmp_path, capsys
):
    command = ["select", str(plain_model), "--pool", made.pool, "--budget", "3"]
    command += ["--direction", made.study, "-o", str(tmp_path / "x.jsonl")]
    assert run(command) == 2
    assert "template_sha256" in capsys.readouterr().err
    assert run([*command[:6], "-o", str(tmp_path / "x.jsonl")]) == 2
    assert "no --direction" in capsys.readouterr().err


def test_a_probe_of_other_weights_is_refused_and_no_row_is_scored(
    thinker, made, tmp_path, capsys
):
    study, scores = tmp_path / "study", tmp_path / "s"
    shutil.copytree(made.study, study)
    path = study / "probes" / "published.json"
    facts = json.loads(path.read_text())
    facts["model"]["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(facts))
    command = ["select", str(thinker), "--pool", made.pool, "--budget", "3"]
    command += ["--direction", str(study), "--scores", str(scores)]
    assert run([*command, "-o", str(tmp_path / "x.jsonl")]) == 2
    assert "differs in weights_sha256" in " ".join(capsys.readouterr().err.split())
    assert not scores.exists()
    assert not list(tmp_path.glob("x*"))


def test_another_direction_makes_another_choice(thinker, made, tmp_path):
    # A probe of the opposite: what falls then is compliance, on no row of this pool.
    pool_fixture.write_study(thinker, tmp_path / "flipped", flipped=True)
    probe = tmp_path / "flipped" / "probes" / "published.json"
    output = tmp_path / "other.jsonl"
    command = ["select", str(thinker), "--pool", made.pool, "--budget", "40"]
    assert run([*command, "--direction", str(probe), "-o", str(output)]) == 0
    assert "song" not in {row["category"] for row in read(output)[0]}


def test_shares_score_their_own_shards_and_the_rest_is_done_once(
    thinker, made, tmp_path, monkeypatch
):
    calls = []
    real = PoolScorer.__call__

    def counted(self, rows):
        calls.append(rows[0].row)
        return real(self, rows)

    monkeypatch.setattr(PoolScorer, "__call__", counted)
    own = {"scores": str(tmp_path / "s")}
    flags = ("--budget", "40", "--shard-rows", "50")
    status, output = select(thinker, made, tmp_path, *flags, "--shard", "2/2", **own)
    assert (status, calls) == (0, [50, 150])
    assert not output.exists()
    status, output = select(thinker, made, tmp_path, *flags, **own)
    assert (status, calls) == (0, [50, 150, 0, 100])
    first = {row["holdfast"]["row"] for row in read(output)[0]}
    status, output = select(thinker, made, tmp_path, "--budget", "40")
    # Other shards are other batches, and a score may differ in its last digits.
    assert {row["holdfast"]["row"] for row in read(output)[0]} == first


KILLED = """
import os, signal, sys
from holdfast.cli.app import run
from holdfast.select.scores import PoolScorer
real, calls = PoolScorer.__call__, []
def scored(self, rows):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, rows)
PoolScorer.__call__ = scored
run(sys.argv[1:])
"""


def test_a_kill_costs_one_shard_and_changes_nothing(
    nursery, thinker, made, tmp_path, monkeypatch
):
    scores, output = tmp_path / "s", tmp_path / "chosen.jsonl"
    command = ["select", str(thinker), "--pool", made.pool, "--direction", made.study]
    command += ["--budget", "40", "--similar", "0", "--shard-rows", "40"]
    command += ["--scores", str(scores), "-o", str(output)]
    assert nursery.start(KILLED, command).wait() == -signal.SIGKILL
    assert len(list(scores.glob("*/*.done.json"))) == 2
    assert not output.exists()
    calls = []
    real = PoolScorer.__call__
    monkeypatch.setattr(
        PoolScorer, "__call__", lambda self, rows: calls.append(1) or real(self, rows)
    )
    assert run(command) == 0
    assert len(calls) == 5 - 2
    own = {"scores": str(tmp_path / "other"), "name": "other"}
    flags = ("--budget", "40", "--shard-rows", "40")
    _, undisturbed = select(thinker, made, tmp_path, *flags, **own)
    assert output.read_bytes() == undisturbed.read_bytes()
    assert not list(scores.rglob("*.tmp"))


RACING = """
import sys
from holdfast.cli.app import run
from holdfast.select.scores import PoolScorer
real = PoolScorer.__call__
def scored(self, rows):
    with open(sys.argv[1], "a") as told:
        told.write(f"{rows[0].row}\\n")
    return real(self, rows)
PoolScorer.__call__ = scored
sys.exit(run(sys.argv[2:]))
"""


def test_processes_that_race_score_every_shard_once_and_choose_alike(
    nursery, thinker, made, tmp_path
):
    command = ["select", str(thinker), "--pool", made.pool, "--direction", made.study]
    command += ["--budget", "40", "--similar", "0", "--shard-rows", "6"]
    command += ["--scores", str(tmp_path / "s"), "-o"]
    started = [
        nursery.start(
            RACING, [tmp_path / "told", *command, tmp_path / f"{place}.jsonl"]
        )
        for place in range(2)
    ]
    assert [process.wait() for process in started] == [0, 0]
    told = (tmp_path / "told").read_text().split()
    assert sorted(map(int, told)) == list(range(0, 180, 6))
    first, second = ((tmp_path / f"{place}.jsonl").read_bytes() for place in range(2))
    assert first == second
    assert not list((tmp_path / "s").rglob("*.lock"))


def test_an_output_that_cannot_be_meant_is_refused_before_anything_is_scored(
    thinker, made, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(PoolScorer, "__call__", None)
    pool = tmp_path / "pool.jsonl"
    pool.write_bytes((made.folder / "pool.jsonl").read_bytes())
    before = pool.read_bytes()
    command = ["select", str(thinker), "--pool", str(pool), "--by", "random"]
    assert run([*command, "--budget", "3", "-o", str(tmp_path / "chosen.txt")]) == 2
    assert "Write -o chosen.jsonl" in capsys.readouterr().err
    # Through another name as well.
    link = tmp_path / "link.jsonl"
    link.symlink_to(pool)
    for output in (pool, link):
        assert run([*command, "--budget", "3", "-o", str(output)]) == 2
        assert "the pool itself" in capsys.readouterr().err
    assert pool.read_bytes() == before


def test_a_damaged_shard_is_said_and_made_again(thinker, made, tmp_path, capsys):
    own = {"scores": str(tmp_path / "s")}
    flags = ("--budget", "5")
    assert select(thinker, made, tmp_path, *flags, **own)[0] == 0
    [shard] = (tmp_path / "s").glob("*/*.parquet")
    shard.write_bytes(shard.read_bytes()[:-20])
    assert select(thinker, made, tmp_path, *flags, **own)[0] == 0
    assert "it is made again" in capsys.readouterr().err
