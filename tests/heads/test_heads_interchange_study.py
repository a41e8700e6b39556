"""`holdfast heads --by interchange` in a study: twins, files, page, and bad input."""

import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import time

import pyarrow.parquet as pq
import pytest
import torch
from test_heads_interchange import end, projections

from holdfast.cli.app import run
from holdfast.cliff.openings import FirstToken, Openings
from holdfast.errors import EvidenceError, TooFewExamplesError
from holdfast.heads.interchange import measure
from holdfast.heads.interchange.stage import require_openings
from holdfast.heads.interchange.twins import BLOCK, find_twins, in_order, partners
from holdfast.models.loading import proofs
from holdfast.models.loading.causal import adapt, load
from holdfast.models.model import Proof
from holdfast.report.schema import validate
from holdfast.rollout.rows import from_table
from holdfast.study import Study
from shapes import elsewhere
from tiny_models import tiny_of_every_kind


@pytest.fixture(scope="module")
def exchanged(audited, tmp_path_factory):
    """The study of the little thinker, with heads ranked by interchange."""
    study = shutil.copytree(audited, tmp_path_factory.mktemp("exchanged") / "study")
    assert run(["heads", str(study), "--by", "interchange"]) == 0
    assert run(["report", str(study)]) == 0
    return study


@pytest.fixture(scope="module")
def block(exchanged):
    report = json.loads((exchanged / "report.json").read_text())
    validate(report)
    return report["heads"]["interchange"]


@pytest.fixture(scope="module")
def rows(audited):
    return from_table(Study.open(audited).read_table("rollouts.parquet"))


def fails(capsys, status, *words, says):
    assert run([str(word) for word in words]) == status
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for part in says:
        assert part in message, message


def test_twins_are_of_one_request_and_each_row_is_in_one_pair(rows):
    found = find_twins(rows, 64, "end_template")
    for split, twins in zip(("train", "test"), found, strict=True):
        assert len({twin.request_id for twin in twins}) >= 10
        used = [row.row_id for twin in twins for row in twin]
        assert len(used) == len(set(used))
        for twin in twins:
            assert twin.refused.request_id == twin.complied.request_id
            assert (twin.refused.verdict, twin.complied.verdict) == (
                "refused",
                "complied",
            )
            assert twin.refused.split == twin.complied.split == split
            assert twin.kind == "wrappers"
    # Every request gives one pair before any gives two.
    few = find_twins(rows, 12, "end_template").ranking
    assert len({twin.request_id for twin in few}) == 12


def test_the_other_source_is_of_another_request_and_of_the_same_block(rows):
    twins = find_twins(rows, 64, "end_template").ranking
    chosen = partners(twins)
    order = {place: at for at, place in enumerate(in_order(twins))}
    for place, other in enumerate(chosen):
        assert twins[other].request_id != twins[place].request_id
    apart = [order[a] // BLOCK != order[b] // BLOCK for a, b in enumerate(chosen)]
    assert sum(apart) <= 1


def test_two_samples_of_one_prompt_come_before_two_wrappers(rows):
    request = next(row for row in rows if row.label == "harmful" and row.is_complied)
    by_request = [r for r in rows if r.label == "harmful"]
    twin = next(
        row
        for row in by_request
        if row.request_id == request.request_id and row.is_refused
    )
    again = dataclasses.replace(request, row_id="again", verdict="refused", sample=1)
    assert again.prompt_id == request.prompt_id != twin.prompt_id
    found = find_twins([*rows, again], 64, "end_template")
    mine = [
        each
        for each in (*found.ranking, *found.measuring)
        if each.request_id == request.request_id
    ]
    assert mine[0].kind == "samples"
    assert {mine[0].refused.row_id, mine[0].complied.row_id} == {
        "again",
        request.row_id,
    }


def test_no_twins_say_why_by_reason_and_what_to_add(rows):
    only = [row for row in rows if row.wrapper in (None, "sternly")]
    with pytest.raises(
        TooFewExamplesError, match=r"0 and 0.*60 only refused"
    ) as caught:
        find_twins(only, 64, "end_template")
    assert caught.value.exit_status == 4
    for word in ("--wrappers-per-request", "--samples", "--temperature"):
        assert word in str(caught.value)
    short = [row for row in rows if row.wrapper != "song" or row.split == "train"]
    few = [row for row in short if row.wrapper != "maybe"]
    with pytest.raises(TooFewExamplesError, match=r"35 and 0"):
        find_twins(few, 64, "end_template")


def test_a_study_without_twins_ends_with_status_4_and_keeps_the_reason(
    audited, tmp_path, capsys, rows, monkeypatch
):
    study = shutil.copytree(audited, tmp_path / "study")
    before = json.loads((study / "study.json").read_text())["stages"]["heads"]
    rank = importlib.import_module("holdfast.heads.rank")
    complied = [row for row in rows if not row.is_refused]
    monkeypatch.setattr(rank, "from_table", lambda _: complied)
    says = ["only complied", "--samples 4"]
    fails(capsys, 4, "heads", study, "--by", "interchange", says=says)
    record = json.loads((study / "study.json").read_text())["stages"]["heads"]
    assert "only complied" in record["reason"]
    assert before["fingerprint"] != record["fingerprint"]


def test_more_heads_together_than_half_are_refused(audited, tmp_path, capsys):
    study = shutil.copytree(audited, tmp_path / "study")
    command = ("heads", study, "--by", "interchange", "--joint-heads")
    fails(capsys, 2, *command, "5", says=["at most 4"])
    fails(capsys, 2, *command, "0", says=["--joint-heads of 1 or more"])
    fails(capsys, 2, "heads", study, "--twins", "9", says=["--twins of 10 or more"])


def test_the_first_token_is_read_as_the_model_has_it(thinker, rows):
    adapter = load(str(thinker))
    train = [row for row in rows if row.split == "train"]
    found = require_openings(train)
    words = [
        adapter.tokenizer.decode(each) for each in (*found.refused, *found.complied)
    ]
    assert words == ["I", "Su"]
    row = train[0]
    ids = torch.tensor([row.token_ids[: row.final + 1]])
    with torch.no_grad():
        logits = adapter.model(ids).logits[0, -1].log_softmax(-1)
        states = adapter.base(ids).last_hidden_state[0, -1]
    expected = logits[list(found.refused)].exp().sum().log()
    expected -= logits[list(found.complied)].exp().sum().log()
    read = FirstToken(adapter, found)(states)
    assert float(read) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_scaled_and_capped_logits_are_read_as_their_family_has_them(kind):
    changes = {"gemma2": {"final_logit_softcapping": 3.0}}
    changes["granite"] = {"logits_scaling": 4.0}
    model = tiny_of_every_kind(kind, **changes[kind])
    adapter = adapt(model, None)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        logits = model(ids).logits[0, -1].float()
        states = adapter.base(ids).last_hidden_state[0, -1]
    read = FirstToken(adapter, Openings((3, 4), (11,)))(states)
    expected = logits[[3, 4]].logsumexp(-1) - logits[11]
    assert float(read) == pytest.approx(float(expected), abs=1e-4)


def test_answers_that_open_alike_are_refused(rows):
    same = [
        dataclasses.replace(row, token_ids=(*row.token_ids[: row.final + 1], 9))
        for row in rows
        if row.closed
    ]
    with pytest.raises(EvidenceError, match="--reading probe"):
        require_openings(same)


def test_every_head_has_its_figures_and_the_ranking_is_that_of_the_file(
    exchanged, block
):
    table = pq.read_table(exchanged / "interchange.parquet").to_pylist()
    ranked = pq.read_table(exchanged / "heads.parquet").to_pylist()
    order = [(row["layer"], row["head"]) for row in ranked]
    assert [row["rank"] for row in ranked] == list(range(1, 9))
    assert [(e["layer"], e["head"]) for e in block["heads"]] == order
    assert {(row["layer"], row["head"]): row["rank"] for row in table} == {
        head: rank for rank, head in enumerate(order, 1)
    }
    for each in block["heads"]:
        for key in ("necessity", "sufficiency", "ablated", "attribution"):
            assert each[key]["low"] <= each[key]["value"] <= each[key]["high"]
    assert block["measured_on"]["requests"] == 25
    assert block["measured_on"]["rows"] == block["measured_on"]["wrappers"] > 25
    assert block["plain"]["complied"]["high"] < 0 < block["plain"]["refused"]["low"]


def test_what_the_first_head_does_is_what_the_plain_loop_finds(
    exchanged, block, thinker, rows
):
    """Whole passes without a cache, and hooks that know no tool of ours."""
    adapter = load(str(thinker))
    model, first = adapter.model, block["heads"][0]
    found = require_openings([row for row in rows if row.split == "train"])
    name = projections(model)[first["layer"]]
    columns = slice(first["head"] * 16, (first["head"] + 1) * 16)
    changes = []
    for twin in find_twins(rows, 64, "end_template").measuring:
        read, kept = [], {}
        pairs = ((twin.refused, None), (twin.complied, None), (twin.complied, "put"))
        for row, how in pairs:
            ids = list(row.token_ids[: row.final + 1])
            here = slice(*end(ids, 4))

            def hook(_, arguments, how=how, here=here, row=row, kept=kept):
                states = arguments[0].clone()
                kept.setdefault(row.verdict, states[0, here, columns].clone())
                if how:
                    states[0, here, columns] = kept["refused"]
                return (states,)

            handle = model.get_submodule(name).register_forward_pre_hook(hook)
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            handle.remove()
            odds = [logits[list(each)].logsumexp(-1) for each in found]
            read.append(float(odds[0] - odds[1]))
        changes.append(read[2] - read[1])
    mean = sum(changes) / len(changes)
    assert first["necessity"]["value"] == pytest.approx(mean, abs=1e-3)


def test_the_page_has_one_switch_and_says_without_colour_what_is_first(exchanged):
    page = (exchanged / "report.html").read_text()
    section = page.split('id="heads"')[1].split("</section>")[0]
    assert section.count('type="radio" name="head-grid"') == 4
    assert section.count(" checked>") == 1
    views = section.split('<div class="view">')[1:]
    assert len(views) == 4
    for view in views:
        squares = re.findall(r'<td class="s\d+ \w*" title="[^"]*">(\d?)</td>', view)
        assert sorted(filter(None, squares)) == [str(n) for n in range(1, 9)]
    for words in ("Random heads, same layers", "Rank by attribution", "two samples"):
        assert words in section
    labels = re.findall(r'<label for="([^"]+)"', section)
    assert all(f'id="{each}"' in section for each in labels)


def test_ablation_takes_the_heads_that_interchange_ranks_first(
    exchanged, tmp_path, capsys
):
    study = shutil.copytree(exchanged, tmp_path / "study")
    few = ["--ablation-prompts", "12", "--fractions", "0.1", "--random-draws", "1"]
    assert run(["ablate", str(study), *few, "--scopes", "end_template", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    [top] = [each for each in found["conditions"] if each["condition"] == "top"]
    first = pq.read_table(study / "heads.parquet").to_pylist()[0]
    assert top["heads"] == [f"{first['layer']}:{first['head']}"]


def test_it_is_done_once_and_attribution_is_as_it_was(
    exchanged, audited, tmp_path, capsys
):
    study = shutil.copytree(exchanged, tmp_path / "study")
    assert run(["heads", str(study), "--by", "interchange"]) == 0
    assert "up to date" in capsys.readouterr().err
    assert run(["heads", str(study), "--json"]) == 0
    before = json.loads((audited / "heads.json").read_text())
    assert json.loads(capsys.readouterr().out) == before
    # A study that an audit has ranked needs nothing anew.
    assert run(["heads", str(shutil.copytree(audited, tmp_path / "b"))]) == 0
    assert "up to date" in capsys.readouterr().err


def test_a_run_that_was_interrupted_goes_on_with_equal_results(
    exchanged, audited, tmp_path, monkeypatch
):
    study = shutil.copytree(audited, tmp_path / "study")
    command = ["heads", str(study), "--by", "interchange", "--batch-size", "16"]
    plain, calls = measure.exchange, []

    def stops(*arguments):
        calls.append(len(arguments[1]))
        if len(calls) == 7:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(measure, "exchange", stops)
    assert run(command) == 130
    assert any((study / "parts").glob("heads_interchange*/*"))
    monkeypatch.setattr(measure, "exchange", plain)
    assert run(command) == 0
    whole = shutil.copytree(audited, tmp_path / "whole")
    assert run([*command[:1], str(whole), *command[2:]]) == 0
    first, second = (
        json.loads((each / "heads.json").read_text()) for each in (study, whole)
    )
    assert first == second
    assert not any((study / "parts").glob("heads*/*"))


COUNTED = """
import sys
from holdfast.cli.app import run
from holdfast.heads.interchange import measure
real, calls = measure.exchange, []
def counted(*given):
    calls.append(1)
    return real(*given)
measure.exchange = counted
status = run(sys.argv[1:])
print("batches", len(calls))
sys.exit(status)
"""


@pytest.mark.parametrize("parts", ["heads_interchange_ranking", "heads_interchange"])
def test_a_kill_loses_one_batch_and_changes_no_byte(nursery, audited, tmp_path, parts):
    """Killed while heads are ranked, and while they are measured."""
    study, whole = (shutil.copytree(audited, tmp_path / name) for name in "ab")
    flags = ["--by", "interchange", "--batch-size", "16"]

    def run_whole(place, told):
        child = nursery.start(COUNTED, ["heads", str(place), *flags], stdout=told)
        assert child.wait() == 0
        return int(told.read_text().split("batches")[1])

    n_batches = run_whole(whole, tmp_path / "whole.txt")
    child = nursery.start(COUNTED, ["heads", str(study), *flags])
    deadline = time.monotonic() + 300
    while not [*study.glob(f"parts/{parts}/[!.]*.parquet")]:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.003)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    kept = [*study.glob("parts/heads_interchange*/[!.]*.parquet")]
    assert 0 < len(kept) < n_batches
    assert not (study / "interchange.parquet").exists()
    assert run_whole(study, tmp_path / "again.txt") == n_batches - len(kept)
    for name in ("heads.json", "heads.parquet", "interchange.parquet"):
        assert (study / name).read_bytes() == (whole / name).read_bytes()
    assert not (study / "parts").exists()
    assert not [*study.rglob("*.tmp")]


@pytest.mark.parametrize(
    ("shape", "span"), [("smollm2", "thinking"), ("qwen3_5_text", "end_template")]
)
def test_it_runs_on_the_shapes_of_smollm2_and_of_a_hybrid(
    tmp_path, capsys, shape, span
):
    study = tmp_path / "study"
    assert run(["rollout", *elsewhere(tmp_path, shape), "-o", str(study)]) == 0
    assert run(["probe", str(study)]) == 0
    capsys.readouterr()
    few = ["--twins", "10", "--selection-prompts", "12", "--checked-heads", "2"]
    command = ["heads", str(study), "--by", "interchange", "--span", span, *few]
    assert run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    block = found["interchange"]
    assert block["span"] == span
    assert len(block["heads"]) == (27 if shape == "smollm2" else 8)
    if shape != "smollm2":
        assert found["layers_with_heads"] == [1, 3]
        assert {each["layer"] for each in block["heads"]} == {1, 3}
    assert block["measured_on"]["samples"] > 0
    # Random weights know no outcome.
    assert "No head is shown" in block["evidence"][1]
    assert run(["report", str(study)]) == 0


def test_heads_that_cannot_be_read_are_refused(audited, tmp_path, capsys, monkeypatch):
    study = shutil.copytree(audited, tmp_path / "study")
    name = "the contributions of the heads sum to the attention output"
    monkeypatch.setattr(
        proofs,
        "_sums",
        lambda *_: (Proof(name, False, 0.5, 1e-4, "worst layer", "heads"),),
    )
    says = ["good for still: rollout"]
    fails(capsys, 3, "heads", study, "--by", "interchange", says=says)
