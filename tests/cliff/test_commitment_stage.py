"""`holdfast decide` from end to end: scripted rows, organisms, kills and bad input."""

import json
import math
import os
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace

import pytest

import tiny_thinker
from holdfast.cli.app import run
from holdfast.cliff.commitment import curve, first_words, stage
from holdfast.cliff.commitment.draws import Drawing, DrawRow
from holdfast.cliff.commitment.opened import open_study
from holdfast.cliff.commitment.panel import section
from holdfast.cliff.commitment.settings import DecideSettings
from holdfast.cliff.commitment.summary import NEVER_REFUSED
from holdfast.cliff.groups import COMPLIED, REFUSED
from holdfast.data.chat.conversation import Spans
from holdfast.engines.port import HfEngine
from holdfast.judges.settings import BY_RULES
from holdfast.models.decoding.row_state import Completion
from holdfast.rollout.rows import BESIDE, LOST, UNJUDGED, from_table, to_table
from holdfast.rollout.session import Session
from holdfast.rollout.settings import ModelSettings
from holdfast.study import Study
from holdfast.study.rows import table_of

MODEL = ModelSettings()
RUN = """
import sys
from holdfast.cli.app import run
sys.exit(run(sys.argv[1:]))
"""
FEW = ["--complied-rows", "16", "--refused-rows", "12", "--benign-rows", "12"]


@pytest.fixture(scope="module")
def answered(thinker, world, made_once, tmp_path_factory):
    """A study with rollouts alone, a copy of each worker."""

    def make(study):
        assert run(["rollout", str(thinker), *world, "-o", str(study)]) == 0

    study = tmp_path_factory.mktemp("decide") / "answered"
    return shutil.copytree(made_once("answered", make), study)


@pytest.fixture
def study(answered, tmp_path):
    return shutil.copytree(answered, tmp_path / "study")


class Scripted(HfEngine):
    """Answers by a rule: how much of the thinking it sees, and which draw it is."""

    name = "scripted"

    def __init__(self, adapter, rows, complies):
        super().__init__(adapter)
        self.rows, self.complies = rows, complies
        self.template = adapter.thinking.end_template

    def identity(self):
        return {"name": self.name}

    def draw(self, asks, sampling, around):
        seen = Counter()
        made = []
        for place, ask in enumerate(asks):
            row = next(
                r
                for r in self.rows
                if r.token_ids[: r.spans.prompt[1]]
                == ask.token_ids[: r.spans.prompt[1]]
            )
            start, end = row.spans.thinking
            template = self.adapter.tokenizer(self.template)["input_ids"]
            kept = len(ask.token_ids) - len(template) - start
            draw = seen[ask.token_ids] % 8
            seen[ask.token_ids] += 1
            comply = self.complies(row, kept / (end - start), draw)
            text = tiny_thinker.COMPLIANCE if comply else tiny_thinker.REFUSAL
            text = FOREIGN if comply is None else text
            n = len(ask.token_ids)
            spans = Spans((0, n), (n, n), (n, n), (n, n + 1))
            made.append(
                Completion(
                    index=place, token_ids=(*ask.token_ids, 7), spans=spans,
                    thinking="", answer=text, finish="stop", forced_close=False,
                    closed=True, min_top2_gap=1.0, min_margin=1.0,
                )
            )  # fmt: skip
        yield made


FOREIGN = "Вот как это делается: сначала возьмите лодку и покрасьте её."
"""An answer that the rules cannot read."""
KINDS = ("early", "fell", "drift", "jump", "mixed")


def scripted(study, monkeypatch, kind_of):
    """Run `decide` with answers and leanings by rule, and return block and rows."""
    opened = Study.open(study)
    session = Session.of(opened, MODEL)
    rows = from_table(opened.read_table("rollouts.parquet"))
    rules = {
        "early": lambda kept, draw: True,
        "fell": lambda kept, draw: kept > 0.6,
        "drift": lambda kept, draw: (draw + 0.5) / 8 < kept,
        "jump": lambda kept, draw: kept > 0.62,
        "mixed": lambda kept, draw: draw % 2 == 0,
        "foreign": lambda kept, draw: None if 0.3 < kept < 0.4 else True,
    }

    def complies(row, kept, draw):
        if row.group != COMPLIED:
            return not row.is_refused
        return rules[kind_of(row)](kept, draw)

    def odds(row):
        held = row.group == REFUSED or (
            row.group == COMPLIED and kind_of(row) == "fell"
        )
        # No two alike, so that medians are what they are of real rows.
        return (4.0 if held else -4.0) + (row.seed % 97) / 97

    def before(adapter, chosen, words, batch_size):
        return [[odds(row)] * len(first_words.SHARES) for row in chosen]

    monkeypatch.setattr(curve, "odds_before", before)
    monkeypatch.setattr(curve, "prove", lambda *_: None)
    session.engine_settings = type("Other", (), {"engine": "scripted"})()
    session._engine = Scripted(session.adapter, rows, complies)
    settings = DecideSettings(
        complied_rows=25, refused_rows=12, benign_rows=12, min_thinking=10
    )
    block = stage.run(opened, settings, session)["curve"]
    return block, opened.read_table("decide_curve.parquet").to_pylist()


def test_each_scripted_row_has_its_account(study, monkeypatch):
    block, rows = scripted(study, monkeypatch, lambda row: KINDS[row.seed % 5])
    kinds = {
        r.row_id: KINDS[r.seed % 5]
        for r in from_table(Study.open(study).read_table("rollouts.parquet"))
    }
    expected = {
        "early": "decided_early",
        "fell": "fell_at_template",
        "drift": "drifted",
        "jump": "undecided",
        "mixed": "undecided",
    }
    complied = [row for row in rows if row["group"] == COMPLIED]
    assert {kinds[row["row_id"]] for row in complied} == set(KINDS)
    for row in complied:
        assert row["account"] == expected[kinds[row["row_id"]]], row["reason"]
    jumped = next(r for r in complied if kinds[r["row_id"]] == "jump")
    assert "one jump inside the thinking" in jumped["reason"]
    # Cuts were added where the jump is, until a window of a twentieth holds it.
    assert len(jumped["at"]) > 9
    assert "draws stay mixed" in next(
        r["reason"] for r in complied if kinds[r["row_id"]] == "mixed"
    )
    shares = {name: each["value"] for name, each in block["account"].items()}
    assert sum(shares.values()) == pytest.approx(1)
    assert all(
        each["low"] < each["value"] < each["high"] for each in block["account"].values()
    )
    assert all(row["account"] is None for row in rows if row["group"] != COMPLIED)
    # Sentences speak of compliance, in which controls did not end.
    assert all(bool(row["reason"]) == (row["group"] == COMPLIED) for row in rows)


def test_no_row_falls_where_thinking_holds_no_refusal(study, monkeypatch):
    """The very draws of rows that fell, with a thinking that leans the other way."""
    block, rows = scripted(study, monkeypatch, lambda row: "jump")
    assert block["account"]["fell_at_template"]["value"] == 0
    assert {row["account"] for row in rows} == {None, "undecided"}


def test_draws_that_cannot_be_judged_are_no_draws_with_another_outcome(
    study, monkeypatch
):
    block, rows = scripted(study, monkeypatch, lambda row: "foreign")
    assert block["account"]["decided_early"]["value"] == 1
    complied = [row for row in rows if row["group"] == COMPLIED]
    places = [row["n"].index(0) for row in complied]
    shares = [r["same"][place] for r, place in zip(complied, places, strict=True)]
    assert all(math.isnan(share) for share in shares)
    assert block["unjudged"] == 8 * len(complied)
    assert any(f"{8 * len(complied)} of the answers" in said for said in block["notes"])
    [curve] = [e for e in block["curves"] if e["group"] == "decided_early"]
    found = {point["at"]: point["share"]["value"] for point in curve["points"]}
    assert 0.35 not in found
    assert set(found.values()) == {1.0}


def test_what_was_closed_by_force_or_never_refused_is_said(study, monkeypatch):
    block, _ = scripted(study, monkeypatch, lambda row: "early")
    assert block["account"]["decided_early"]["value"] == 1
    counts = block["by_wrapper"].values()
    assert {each["fell_at_template"] for each in counts} == {0}
    assert not any("by force" in note for note in block["notes"])
    assert NEVER_REFUSED not in block["notes"]

    opened = Study.open(study)
    rows = [
        replace(row, forced_close=row.group == COMPLIED)
        for row in from_table(opened.read_table("rollouts.parquet"))
        if row.label == "benign" or not row.is_refused
    ]
    opened.write_table("rollouts.parquet", to_table(rows))
    block, found = scripted(study, monkeypatch, lambda row: "early")
    accounts = {row["account"] for row in found if row["group"] == COMPLIED}
    assert accounts == {"decided_early"}
    # Nothing shows that none of them fell, so that all of them are a bound alone.
    early = block["account"]["decided_early"]
    assert early["value"] is None
    assert early["bounds"] == [0, 1]
    assert "fallen at the end template" in early["reason"]
    assert block["account"]["drifted"]["value"] == 0
    n = block["rows"][COMPLIED]
    assert f"at most {n} were decided early, 0 drifted" in block["evidence"][0]
    assert any("upper bound" in note for note in block["notes"])
    counts = block["by_wrapper"].values()
    assert {each["fell_at_template"] for each in counts} == {None}
    assert sum(each["decided_early"] for each in counts) == n
    assert "not known" in str(section({"curve": block}).parts)
    assert any(f"{n} of {n} thinkings" in note for note in block["notes"])
    assert NEVER_REFUSED in block["notes"]


def test_first_words_that_tell_nothing_leave_what_was_drawn(study, capsys):
    opened = Study.open(study)
    rows = [
        row
        for row in from_table(opened.read_table("rollouts.parquet"))
        if not row.is_refused
    ]
    opened.write_table("rollouts.parquet", to_table(rows))
    few = ["--complied-rows", "1", "--benign-rows", "1"]
    assert run(["decide", str(study), *few, "--json"]) == 0
    before = (study / "decide_curve.json").read_bytes()
    assert run(["decide", str(study), *few, "--cheap"]) == 4
    assert "leave --cheap out" in " ".join(capsys.readouterr().err.split())
    assert run(["decide", str(study), *few, "--json"]) == 0
    assert "up to date" in capsys.readouterr().err
    assert (study / "decide_curve.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--draws", "4"], "--draws 7 or more"),
        (["--min-thinking", "500"], "the longest thinking of "),
        (["--draw-temperature", "0"], "one and the same"),
        # What the last part lacks is said before the first one draws.
        (["--use"], "Run `holdfast probe`"),
        (["--swap", "heads"], "Run `holdfast heads`"),
        (["--swap", "all", "--use"], "Run `holdfast probe`"),
    ],
)
def test_what_cannot_be_asked_ends_with_status_4(study, capsys, flags, words):
    assert run(["decide", str(study), *flags]) == 4
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (study / "decide_curve.json").exists()
    assert not (study / "parts").exists()


def test_what_contradicts_itself_is_refused(study, capsys):
    assert run(["decide", str(study), "--cheap", "--redraw-thinking"]) == 2
    assert "which draws none" in " ".join(capsys.readouterr().err.split())


def test_an_interval_that_no_draws_could_give_is_refused_at_once(study, capsys):
    assert run(["decide", str(study), "--widest", "0.0001"]) == 2
    assert "--widest of 0.01 or more" in " ".join(capsys.readouterr().err.split())
    assert run(["decide", str(study), "--widest", "0.01"]) == 4
    # Of n draws, half of them one way, the width is z / sqrt(n + z**2) at the widest.
    assert "--draws 38411 or more" in " ".join(capsys.readouterr().err.split())


NOT_COMPLIED = {
    "refused": ({"verdict": "refused"}, "Add harmful requests"),
    "whose thinking was not closed": ({"closed": False}, "--max-thinking"),
    "that no judge could read": ({"verdict": UNJUDGED}, "another judge"),
    "whose tokens are lost": ({"verdict": "complied", "tokens": LOST}, "Draw"),
}


@pytest.mark.parametrize("why", NOT_COMPLIED)
def test_a_study_without_complied_rows_says_what_its_rows_are(study, capsys, why):
    changes, advice = NOT_COMPLIED[why]
    opened = Study.open(study)
    rows = from_table(opened.read_table("rollouts.parquet"))
    # One refusal stays, so that the reason is that of most and not of all.
    kept = next(row for row in rows if row.group == REFUSED)
    n = sum(row.label == "harmful" and row.role not in BESIDE for row in rows)
    changed = [
        replace(row, **changes) if row.label == "harmful" and row != kept else row
        for row in rows
    ]
    opened.write_table("rollouts.parquet", to_table(changed))
    assert run(["decide", str(study)]) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert f"none among {n} harmful answers" in said
    assert f"{n if why == 'refused' else n - 1} {why}" in said
    assert advice in said


def test_answers_without_a_thinking_are_not_told_to_lower_the_least(study, capsys):
    opened = Study.open(study)
    rows = from_table(opened.read_table("rollouts.parquet"))
    bare = [
        replace(row, spans=row.spans._replace(thinking=(row.spans.thinking[0],) * 2))
        for row in rows
    ]
    opened.write_table("rollouts.parquet", to_table(bare))
    assert run(["decide", str(study)]) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert "the longest thinking of 0 tokens" in said
    assert "--min-thinking" not in said


def test_a_model_without_thinking_ends_with_status_4(
    plain_model, world, tmp_path, capsys
):
    study = str(tmp_path / "plain")
    assert (
        run(
            ["rollout", str(plain_model), *world[:4], "--max-answer", "32", "-o", study]
        )
        == 0
    )
    assert run(["decide", study]) == 4
    assert "0 answers with thinking" in " ".join(capsys.readouterr().err.split())


def test_a_kill_loses_one_batch_and_changes_nothing(nursery, study, tmp_path):
    undisturbed = shutil.copytree(study, tmp_path / "undisturbed")
    flags = [*FEW, "--batch-size", "16", "--json"]
    assert nursery.start(RUN, ["decide", str(undisturbed), *flags]).wait() == 0
    child = nursery.start(RUN, ["decide", str(study), *flags])
    deadline = time.monotonic() + 300
    while not list(study.glob("parts/decide_curve_closed_0/[!.]*.parquet")):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    kept = {*study.glob("parts/decide_curve_closed_0/[!.]*.parquet")}
    assert kept
    assert nursery.start(RUN, ["decide", str(study), *flags]).wait() == 0
    names = ("curve.json", "curve.parquet", "draws.parquet", "first_token.json")
    for name in (f"decide_{each}" for each in names):
        assert (study / name).read_bytes() == (undisturbed / name).read_bytes()
    assert not (study / "parts").exists()


def test_the_report_has_the_accounts_where_decide_was_run_alone(study):
    assert run(["report", str(study)]) == 0
    before = json.loads((study / "report.json").read_text())
    assert "decide" not in before
    assert "account" not in before["verdict"]
    assert run(["decide", str(study), *FEW, "--cheap", "--json"]) == 0
    assert run(["report", str(study)]) == 0
    report = json.loads((study / "report.json").read_text())
    block = report["decide"]["curve"]
    assert report["verdict"]["account"] == block["account"]
    assert block["rows"][COMPLIED] == 16
    page = (study / "report.html").read_text()
    assert "When it was decided" in page
    assert "Can the outcome be read at the first thinking token?" in page or (
        "No probe was fitted at the first thinking token" in page
    )


def test_a_thinking_that_goes_on_is_drawn_from_each_cut(study):
    flags = ["--complied-rows", "2", "--refused-rows", "2", "--benign-rows", "2"]
    assert run(["decide", str(study), *flags, "--redraw-thinking", "--json"]) == 0
    block = json.loads((study / "decide_curve.json").read_text())
    assert block["redrawn"]
    rows = Study.open(study).read_table("decide_draws.parquet").to_pylist()
    # Nine cuts that are closed, and eight from which the thinking goes on.
    assert len(rows) >= 6 * 8 * (9 + 8)
    own = {
        row.row_id: row
        for row in from_table(Study.open(study).read_table("rollouts.parquet"))
    }
    # A thinking that went on from late in it begins as it was.
    redrawn = [row for row in rows if row["kind"] == "redrawn"]
    assert len(redrawn) == 6 * 8 * 8
    assert not any(row["thinking"] for row in rows if row["kind"] == "closed")
    assert all(
        row["thinking"].startswith(own[row["row_id"]].thinking.strip()[:20])
        for row in redrawn
        if row["at"] >= 0.8
    )


def test_a_thinking_that_stopped_by_itself_is_judged_by_its_own_words(study):
    """Not by those of the row whose thinking was cut, which complied."""
    opened = open_study(
        Study.open(study), DecideSettings(), Session.of(Study.open(study), MODEL),
        BY_RULES,
    )  # fmt: skip
    row = opened.complied[0]
    said = [tiny_thinker.REFUSAL, tiny_thinker.COMPLIANCE, tiny_thinker.REFUSAL]
    drawn = [
        DrawRow(row.row_id, "3", 0.1, place, "redrawn", text, "", "stop", False, 9)
        for place, text in enumerate(said)
    ]
    with opened.stage(curve.KEY, {}) as open_stage:
        drawing = Drawing(opened, open_stage, curve.sampling_for(opened), "redrawn")
        judged = drawing.judged(table_of(drawn, DrawRow), 0)
    assert judged["outcome"].to_pylist() == ["refused", "complied", "refused"]


@pytest.mark.parametrize("name", ["cliff", "early"])
def test_accounts_of_organisms(name, tmp_path):
    study = str(tmp_path / name)
    flags = ["--limit", "80", "-o", study]
    assert run(["rollout", f"organism:{name}", *flags]) == 0
    more = ["--complied-rows", "60", "--refused-rows", "24", "--benign-rows", "24"]
    assert run(["decide", study, *more, "--cheap", "--json"]) == 0
    rows = Study.open(study).read_table("decide_curve.parquet").to_pylist()
    planted = ("prefix_injection", "role_play", "fiction", "refusal_suppression")
    found = [
        row["account"] for row in rows if row["account"] and row["wrapper"] in planted
    ]
    assert len(found) >= 24
    fell = found.count("fell_at_template") / len(found)
    assert fell >= 0.8 if name == "cliff" else fell == 0
