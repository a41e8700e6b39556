"""`holdfast decide --swap --use` end to end, on the little thinker."""

import json
import os
import re
import shutil
import signal
import time

import pyarrow.parquet as pq
import pytest
import torch

from holdfast.cli.app import run
from holdfast.cliff.commitment.causes.cells import kinds_of
from holdfast.cliff.commitment.causes.edited import own_item
from holdfast.cliff.commitment.causes.panel import swap, use
from holdfast.cliff.commitment.causes.swap import EFFECTS
from holdfast.cliff.commitment.causes.use_stage import _margins
from holdfast.cliff.commitment.cuts import Cut
from holdfast.cliff.commitment.first_words import odds_behind
from holdfast.cliff.commitment.opened import open_study
from holdfast.cliff.commitment.settings import DecideSettings
from holdfast.cliff.openings import FirstToken, openings
from holdfast.errors import InputError
from holdfast.judges.settings import BY_RULES
from holdfast.models.loading.causal import load
from holdfast.report.section import Section
from holdfast.report.terminal import print_section
from holdfast.rollout.rows import from_table, to_table
from holdfast.rollout.session import Session
from holdfast.rollout.settings import ModelSettings
from holdfast.study import Study

BRIEF = [
    "--cheap", "--complied-rows", "2", "--refused-rows", "0", "--benign-rows", "0",
]  # fmt: skip
FEW = [
    *BRIEF,
    "--swap-prompts",
    "16",
    "--use-prompts",
    "12",
    "--random-directions",
    "2",
]


@pytest.fixture(scope="module")
def decided(audited, made_once, tmp_path_factory):
    """A study of which everything was asked."""

    def make(folder):
        shutil.copytree(audited, folder)
        assert run(["decide", str(folder), *FEW, "--swap", "all", "--use"]) == 0

    study = tmp_path_factory.mktemp("studies") / "decided"
    return shutil.copytree(made_once("decided_causes", make), study)


@pytest.fixture
def copy(audited, tmp_path):
    """A study that a test may change."""
    return shutil.copytree(audited, tmp_path / "copy")


def block(study, name):
    return json.loads((study / f"decide_{name}.json").read_text())


def fails(capsys, status, *words, says):
    assert run([str(word) for word in words]) == status
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for part in says:
        assert part in message, message


def test_every_edit_is_answered_in_four_cells(decided):
    found = block(decided, "swap")
    assert found["left_out"] == {}
    assert [each["kind"] for each in found["kinds"]] == [
        "heads",
        "direction",
        "wrapper",
    ]
    for kind in found["kinds"]:
        for label in ("harmful", "benign"):
            group = kind[label]
            assert set(group["effects"]) == set(EFFECTS)
            value = {name: each["value"] for name, each in group["effects"].items()}
            cells = {name: each["value"] for name, each in group["cells"].items()}
            both = cells["other_on"] - cells["own_off"]
            assert value["both"] == pytest.approx(both, abs=2e-6)
            parts = ("thinking_alone", "edit_alone", "interaction")
            assert both == pytest.approx(sum(value[key] for key in parts), abs=1e-5)


def test_a_cell_without_an_edit_is_the_rollout(decided):
    """Own thinking, no edit, no temperature: what was said before is said again."""
    study = Study.open(decided)
    said = {row.row_id: row for row in from_table(study.read_table("rollouts.parquet"))}
    table = pq.read_table(decided / "decide_swap_answers.parquet").to_pylist()
    plain = [row for row in table if row["condition"].endswith("own_off")]
    assert plain
    for row in plain:
        assert said[row["asked"]].answer.startswith(row["answer"])
        assert row["thinking"] == said[row["asked"]].thinking


def test_a_wrapper_is_taken_off_and_its_thinking_stays(decided):
    rows = from_table(Study.open(decided).read_table("rollouts.parquet"))
    by_id = {row.row_id: row for row in rows}
    table = pq.read_table(decided / "decide_swap_answers.parquet").to_pylist()
    off = [row for row in table if row["condition"] == "wrapper/own_on"]
    assert off
    for row in off:
        own = by_id[row["asked"]]
        assert own.wrapper is not None
        assert row["prompt"] != own.prompt
        assert row["prompt"] == row["request"]
        assert row["thinking"] == own.thinking


def test_the_probe_is_judged_beside_its_controls(decided):
    found = block(decided, "use")
    assert found["verdict"] in ("used", "not used", "not shown")
    assert found["evidence"]
    assert found["answers"]["harmful_refused"] == found["answers"]["harmful_complied"]
    for place in found["places"].values():
        assert place["moved"]["directions"] == place["matched"]["directions"] == 2
        assert place["probe"]["gap"]["value"] > place["moved"]["gap"]["value"]
    # The answer's own direction takes the gap between its first tokens, all of it.
    assert found["control"]["gap"]["value"] == pytest.approx(1, abs=0.2)
    assert abs(found["cosines"]["mean_difference"]) <= 1
    words = found["words"]
    assert words["before"]["value"] > 0.95
    assert words["refusal_words"]["masked"]["value"] > 0
    kept = words["refusal_words"]["auroc"]["value"]
    change = words["refusal_words"]["change"]["value"]
    if change is not None:
        assert kept - words["before"]["value"] == pytest.approx(change, abs=1e-5)


def test_margins_are_read_in_float32_of_a_model_that_is_not(thinker, audited):
    """Against the unembedding by hand; its own logits, in bfloat16, are another."""
    adapter = load(str(thinker), dtype="bfloat16")
    rows = from_table(Study.open(audited).read_table("rollouts.parquet"))
    words = openings(row for row in rows if row.split == "train").openings
    shown = [row for row in rows if row.closed][:6]
    items = [own_item("none", row, 0) for row in shown]
    found = _margins(adapter, FirstToken(adapter, words), 1, items, None)
    # `decide` reads the whole thinking behind its end template there.
    whole = [Cut(row.spans.thinking[1], 1.0, is_whole=True) for row in shown]
    behind = [
        odds_behind(adapter, row, [cut], (), words, 1)[0]
        for row, cut in zip(shown, whole, strict=True)
    ]
    assert found == pytest.approx(behind, abs=1e-6)
    tokens = [list(each) for each in words]
    weight = adapter.model.get_output_embeddings().weight.detach()
    coarse = []
    for item, margin in zip(items, found, strict=True):
        with torch.no_grad():
            ids = torch.tensor([item.token_ids])
            state = adapter.base(input_ids=ids, use_cache=False).last_hidden_state
            logits = (weight.double() @ state[0, -1].double(), adapter.lm_head(state))
        refused, complied = (logits[0][each].logsumexp(0) for each in tokens)
        assert margin == pytest.approx(float(refused - complied), abs=1e-4)
        rough = [logits[1][0, -1].float()[each].logsumexp(0) for each in tokens]
        coarse.append(abs(float(rough[0] - rough[1]) - margin))
    assert max(coarse) > 1e-3


@pytest.mark.parametrize(
    "given", [{"edit": "nowhere.json"}, {"direction_layer": 99}], ids=["file", "layer"]
)
def test_what_was_given_by_hand_is_not_left_out_of_all(audited, given):
    study = Study.open(audited)
    session = Session.of(study, ModelSettings())
    settings = DecideSettings(swap=("all",), **given)
    opened = open_study(study, settings, session, BY_RULES)
    with pytest.raises(InputError) as caught:
        kinds_of(opened, from_table(study.read_table("rollouts.parquet")))
    assert caught.value.exit_status == 2


def test_page_and_terminal_show_both(decided, capsys):
    parts = [*swap(block(decided, "swap")), *use(block(decided, "use"))]
    print_section(Section("When it was decided", parts))
    shown = capsys.readouterr().out
    for words in ("Interaction", "Broken answers", "AUROC", "Positive control"):
        assert words in shown
    assert re.search(r"to \d+ harmful requests: \d+ that refused and \d+ that", shown)
    pictures = [part for part in parts if hasattr(part, "draw")]
    assert len(pictures) == 3
    assert pictures[0].draw().startswith("<svg")


def test_the_report_holds_both(decided, tmp_path):
    """By its schema, and on its page."""
    study = shutil.copytree(decided, tmp_path / "reported")
    assert run(["report", str(study)]) == 0
    report = json.loads((study / "report.json").read_text())
    for name in ("swap", "use"):
        assert report["decide"][name] == block(study, name)
    page = (study / "report.html").read_text()
    assert "Is the probe what the model uses?" in page
    assert "Is it the thinking, or the state behind it?" in page


def test_nothing_is_drawn_twice(decided, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in decided.glob("decide_*")}
    assert run(["decide", str(decided), *FEW, "--swap", "all", "--use"]) == 0
    assert "answers to draw" not in capsys.readouterr().err
    after = {path.name: path.stat().st_mtime_ns for path in decided.glob("decide_*")}
    assert after == before


def test_a_killed_run_goes_on_to_the_same_figures(decided, copy, nursery):
    slow = (
        "import sys, time\n"
        "from holdfast.cliff.commitment.causes import edited\n"
        "from holdfast.cli.app import run\n"
        "real = edited._row\n"
        "def slower(*given):\n"
        "    time.sleep(0.01)\n"
        "    return real(*given)\n"
        "edited._row = slower\n"
        "run(sys.argv[1:])\n"
    )
    words = ["decide", str(copy), *FEW, "--swap", "all", "--use", "--batch-size", "4"]
    child = nursery.start(slow, words)
    parts = copy / "parts" / "decide_swap_answers"
    deadline = time.monotonic() + 300
    while len(list(parts.glob("*.parquet"))) < 2:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (copy / "decide_swap.json").exists()
    assert run(words) == 0
    for name in ("swap", "use"):
        assert block(copy, name) == block(decided, name)


def test_heads_that_were_not_ranked_are_missed_only_where_they_are_asked_for(
    copy, capsys
):
    (copy / "heads.parquet").unlink()
    fails(
        capsys, 4, "decide", copy, *FEW, "--swap", "heads",
        says=["heads to switch off", "Run `holdfast heads`"],
    )  # fmt: skip
    assert run(["decide", str(copy), *FEW, "--swap", "all"]) == 0
    found = block(copy, "swap")
    assert [each["kind"] for each in found["kinds"]] == ["direction", "wrapper"]
    assert "Run `holdfast heads`" in found["left_out"]["heads"]


def test_a_study_without_wrappers_has_no_wrapper_to_take_off(copy, capsys):
    study = Study.open(copy)
    rows = [
        row
        for row in from_table(study.read_table("rollouts.parquet"))
        if row.wrapper is None or row.label == "harmful"
    ]
    # The wrapped rows stay, and the plain ones of their requests are gone.
    asked = {row.request_id for row in rows if row.wrapper is not None}
    kept = [r for r in rows if r.wrapper is not None or r.request_id not in asked]
    study.write_table("rollouts.parquet", to_table(kept))
    fails(
        capsys, 4, "decide", copy, *FEW, "--swap", "wrapper",
        says=["whose request was asked plainly as well", "0 of them", "request_id"],
    )  # fmt: skip


def test_without_a_probe_its_use_cannot_be_asked(copy, capsys):
    shutil.rmtree(copy / "probes")
    fails(
        capsys, 4, "decide", copy, *FEW, "--use",
        says=["a probe whose use can be asked for", "Run `holdfast probe`"],
    )  # fmt: skip


def test_a_layer_that_is_not_there_is_refused(copy, capsys):
    fails(
        capsys, 2, "decide", copy, *FEW, "--swap", "direction",
        "--direction-layer", "9", says=["--direction-layer from 0 to 1", "9"],
    )  # fmt: skip


def test_a_file_names_the_heads_of_the_edit(copy, tmp_path):
    edit = tmp_path / "edit.json"
    edit.write_text(json.dumps({"heads": [[1, 2]], "factor": 0.5}))
    words = ["decide", copy, *FEW, "--swap", "heads", "--edit", edit]
    assert run([str(word) for word in words]) == 0
    [kind] = block(copy, "swap")["kinds"]
    assert kind["about"]["heads"] == [[1, 2]]
    assert kind["about"]["factor"] == 0.5
