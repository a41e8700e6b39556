"""Rollouts and ablations before the judge that was named, here a real HTTP server."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chat_server import Reply, serving
from guard_models import guard
from holdfast.cli.app import run
from holdfast.engines import port
from holdfast.heads import ablate
from holdfast.judges.base import JudgeIdentity
from holdfast.judges.rows import HARM_ALONE, NOT_YET, verdicts_on
from holdfast.judges.verdict import Verdict
from holdfast.report.schema import validate
from holdfast.rollout import stage as rollout_stage
from holdfast.rollout.answers import as_asked, with_verdict
from holdfast.rollout.rows import attack_block, from_table
from holdfast.rollout.session import Session
from holdfast.study import Study, file_sha256

pytest.importorskip("httpx")

FORM = "#scores\n1.b {}\n2.b {}\n3.b {}"
REFUSED, HARMFUL, HARMLESS = (
    FORM.format(*g) for g in ((1, 1, 1), (0, 5, 5), (0, 1, 2))
)
TABLE = "rollouts.parquet"
SMALL = ("--limit", "25", "--max-answer", "40", "--seed", "0")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def by_rules(tmp_path_factory):
    """Rollouts of the organism `cliff`, judged by the rules."""
    study = tmp_path_factory.mktemp("studies") / "rules"
    assert run(["rollout", "organism:cliff", *SMALL, "-o", str(study)]) == 0
    return study


@pytest.fixture
def study(by_rules, tmp_path):
    return shutil.copytree(by_rules, tmp_path / "study")


@pytest.fixture
def no_drawing(monkeypatch):
    def never(*_, **__):
        raise AssertionError("an answer was drawn anew")

    monkeypatch.setattr(port, "generate", never)


def flags_of(server, *more):
    return ["--judge", server.url, "--judge-model", "tiny", *more]


def rollout(study, *more):
    return run(["rollout", "organism:cliff", *SMALL, "-o", str(study), *more])


def table_of(study):
    return pq.read_table(study / "rollouts.parquet").to_pylist()


def report_of(study):
    assert run(["report", str(study)]) == 0
    report = json.loads((study / "report.json").read_text())
    validate(report)
    return report


def test_a_judge_to_whom_everything_is_refused_flips_the_audit(
    study, no_drawing, capsys
):
    before = report_of(study)
    assert before["attack_success"]["wrapped"]["value"] > 0.3
    assert before["judge"]["label"] == "rules-3"
    assert before["judge"]["calibration"] is not None
    generated = {row["row_id"]: row["token_ids"] for row in table_of(study)}
    with serving(lambda body, number: Reply(REFUSED)) as server:
        command = ["audit", "organism:cliff", *SMALL, "-o", str(study)]
        # Nothing complied, so there is no probe, and the report says so.
        assert run([*command, *flags_of(server)]) == 4
        asked = len(server.bodies)
        assert run([*command, *flags_of(server)]) == 4
        assert len(server.bodies) == asked
    report = json.loads((study / "report.json").read_text())
    validate(report)
    assert report["judge"]["name"] == "endpoint:strongreject"
    assert report["judge"]["model"] == "tiny"
    assert report["judge"]["calibration"] is None
    assert report["attack_success"]["wrapped"]["value"] == 0
    assert before["verdict"]["attack_succeeds"] is True
    assert report["verdict"]["attack_succeeds"] is not True
    assert report["outcomes"]["benign"]["refused"]["value"] == 1
    assert {row["judge"] for row in table_of(study)} == {"endpoint:strongreject-2"}
    assert generated == {row["row_id"]: row["token_ids"] for row in table_of(study)}
    page = (study / "report.html").read_text()
    assert "endpoint:strongreject-2" in page
    assert "never compared with people" in page
    # The rules judge the same answers anew, and everything is as it was.
    assert rollout(study) == 0
    again = report_of(study)
    assert again["outcomes"] == before["outcomes"]
    assert again["judge"] == before["judge"]


def test_what_a_judge_of_harm_calls_harmless_is_no_attack_success(study, no_drawing):
    with serving(lambda body, number: Reply(HARMLESS)) as server:
        assert rollout(study, *flags_of(server)) == 0
    report = report_of(study)
    # Each answer is `partial`, and a score of 1/8 says that none of them harms.
    assert report["outcomes"]["harmful"]["partial"]["value"] == 1
    assert report["attack_success"]["harmful"]["value"] == 0


def test_a_judge_of_harm_is_shown_the_request_without_its_wrapper(study, no_drawing):
    with serving(lambda body, number: Reply(HARMFUL)) as server:
        assert rollout(study, *flags_of(server)) == 0
    plain = {r["request_id"]: r["prompt"] for r in table_of(study) if not r["wrapper"]}
    wrapped = [row for row in table_of(study) if row["role"] == "wrapped"]
    asked = [body["messages"][-1]["content"] for body in server.bodies]
    for row in wrapped[:20]:
        assert row["prompt"] != plain[row["request_id"]]
        assert any(plain[row["request_id"]] in text for text in asked)
        assert not any(row["prompt"] in text for text in asked)


def test_a_server_that_goes_down_leaves_no_verdict_and_says_why(
    study, no_drawing, capsys
):
    up = threading.Event()
    up.set()

    def dying(body, number):
        if number >= 100:
            up.clear()
        return Reply(REFUSED) if up.is_set() else Reply(status=503, body="gone fishing")

    with serving(dying) as server:
        more = flags_of(server, "--judge-attempts", "1")
        command = ["audit", "organism:cliff", *SMALL, "-o", str(study), *more]
        assert run(command) == 5
        assert "gone fishing" in capsys.readouterr().err
        rows = table_of(study)
        open_rows = [row for row in rows if row["verdict"] is None]
        assert 0 < len(open_rows) < len(rows)
        assert all("gone fishing" in row["reason"] for row in open_rows)
        assert all(row["judge"] is None for row in open_rows)
        report = json.loads((study / "report.json").read_text())
        validate(report)
        unjudged = sum(
            block["refused"].get("unjudged", 0) for block in report["outcomes"].values()
        )
        asked = sum(block["refused"]["n"] for block in report["outcomes"].values())
        assert unjudged > 0
        assert asked == len(rows)
        assert report["verdict"]["attack_succeeds"] is None
        assert any("gone fishing" in sentence for sentence in report["limits"])
        up.set()
        server.answer = lambda body, number: Reply(REFUSED)
        asked = len(server.bodies)
        assert rollout(study, *more) == 0
        # Batches that were judged are not judged again.
        assert len(server.bodies) - asked < len(rows)
    assert all(row["verdict"] == "refused" for row in table_of(study))


def test_a_row_that_the_judge_cannot_read_counts_for_nothing(study, no_drawing):
    def moody(body, number):
        return Reply("banana" if number % 2 else REFUSED)

    with serving(moody) as server:
        assert rollout(study, *flags_of(server, "--judge-concurrency", "1")) == 0
    report = report_of(study)
    figure = report["attack_success"]["wrapped"]
    assert figure["unjudged"] > 0
    low, high = figure["bounds"]
    assert low == 0
    assert high == pytest.approx(figure["unjudged"] / figure["n"])
    assert report["verdict"]["attack_succeeds"] is None


KILLED = """
import sys, time
from holdfast.cli.app import run
sys.exit(run(sys.argv[1:]))
"""


def test_a_kill_while_it_judges_loses_one_batch(study):
    def slow(body, number):
        time.sleep(0.01)
        return Reply(REFUSED)

    with serving(slow) as server:
        words = ["rollout", "organism:cliff", *SMALL, "-o", str(study)]
        words += flags_of(server)
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 300
        while len(list(study.glob("parts/judge_rollouts/[!.]*.parquet"))) < 1:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
        rows = table_of(study)
        assert {row["verdict"] for row in rows} == {None}
        assert {row["reason"] for row in rows} == {NOT_YET}
        server.answer = lambda body, number: Reply(REFUSED)
        before = len(server.bodies)
        assert run(words) == 0
        assert len(server.bodies) - before <= len(rows) - 64
    assert all(row["verdict"] == "refused" for row in table_of(study))
    assert not (study / "parts").exists()


def test_the_thinking_is_judged_in_columns_of_its_own(study, no_drawing):
    with serving(lambda body, number: Reply(REFUSED)) as server:
        assert rollout(study, *flags_of(server, "--judge-thinking")) == 0
    rows = table_of(study)
    thought = [row for row in rows if row["thinking"].strip()]
    assert thought
    assert all(row["thinking_verdict"] is not None for row in thought)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--judge", "ruels"), "`rules`"),
        (("--judge", "http://127.0.0.1:9/v1"), "--judge-model"),
        (("--judge", "guard:no/such-wildguard"), "no/such-wildguard"),
    ],
)
@pytest.mark.parametrize("verb", ["rollout", "audit"])
def test_a_judge_that_cannot_work_is_refused_before_anything_is_drawn(
    verb, more, says, tmp_path, capsys, no_drawing
):
    place = tmp_path / "new"
    assert run([verb, "organism:cliff", *SMALL, "-o", str(place), *more]) in (2, 5)
    assert says in capsys.readouterr().err
    assert not (place / "rollouts.parquet").exists()


def test_an_ablation_is_judged_anew_and_nothing_is_drawn(
    audited, tmp_path, monkeypatch, capsys
):
    copy = shutil.copytree(audited, tmp_path / "copy")
    before = json.loads((copy / "ablation.json").read_text())
    answers = [
        row["answer"] for row in pq.read_table(copy / "ablation.parquet").to_pylist()
    ]
    assert before["judge"]["label"] == "rules-3"

    def never(*_, **__):
        raise AssertionError("an answer was drawn anew")

    monkeypatch.setattr(ablate, "answer", never)
    monkeypatch.setattr(Session, "speaker", property(never))
    with serving(lambda body, number: Reply(REFUSED)) as server:
        command = ["ablate", str(copy), "--json", *flags_of(server)]
        server.answer = lambda body, number: Reply(status=500, body="down")
        assert run([*command, "--judge-attempts", "1"]) == 5
        assert run(["report", str(copy), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert "ablation" not in report
        assert "down" in report["verdict"]["reasons"]["sparse"]
        server.answer = lambda body, number: Reply(REFUSED)
        assert run(command) == 0
    block = json.loads(capsys.readouterr().out)
    assert block["judge"]["name"] == "endpoint:strongreject"
    assert block["sparse"]["baseline"]["value"] == 0
    assert all(each["attack_success"]["value"] == 0 for each in block["conditions"])
    assert any("Another judge" in note for note in block["notes"])
    table = pq.read_table(copy / "ablation.parquet")
    assert table.column("answer").to_pylist() == answers
    assert set(table.column("judge").to_pylist()) == {"endpoint:strongreject-2"}
    assert run(["ablate", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == before


def test_a_kill_as_another_judge_begins_leaves_no_verdict_under_its_name(
    study, by_rules, monkeypatch
):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with serving(lambda body, number: Reply(REFUSED)) as server:
        with monkeypatch.context() as patch:
            patch.setattr(rollout_stage, "_write_verdicts", killed)
            rollout(study, *flags_of(server))
        report = report_of(study)
        assert report["judge"]["name"] == "rules"
        assert {row["judge"] for row in table_of(study)} == {"rules-3"}
        # And after the verdicts are gone, nobody is said to be done.
        with monkeypatch.context() as patch:
            begin = Study.begin
            patch.setattr(
                Study,
                "begin",
                lambda own, name, *more: (
                    killed()
                    if name == rollout_stage.JUDGE_STAGE
                    else begin(own, name, *more)
                ),
            )
            rollout(study, *flags_of(server))
        assert {row["verdict"] for row in table_of(study)} == {None}
    assert rollout(study) == 0
    assert table_of(study) == table_of(by_rules)


def test_what_rests_on_the_probe_of_another_judge_is_refused_and_not_shown(
    audited, tmp_path, capsys
):
    copy = shutil.copytree(audited, tmp_path / "copy")
    before = report_of(copy)
    assert before["heads"]
    assert before["trace"]
    table = pq.read_table(copy / "rollouts.parquet")
    rows = table.to_pylist()
    rows[0]["reason"] = "as another judge saw it"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), copy / TABLE)
    manifest = json.loads((copy / "study.json").read_text())
    for stage in ("trace", "heads", "ablate"):
        # As if these had been run again, and the probe had not.
        inputs = manifest["stages"][stage]["inputs"]
        inputs[TABLE] = file_sha256(copy / TABLE)
    (copy / "study.json").write_text(json.dumps(manifest))
    for verb in ("trace", "heads", "ablate"):
        assert run([verb, str(copy)]) == 2
        assert "Run `holdfast probe` on the study again." in capsys.readouterr().err
    report = report_of(copy)
    assert "heads" not in report
    assert "ablation" not in report
    assert report["verdict"]["cliff"] is None
    assert report["trace"]["harmful_complied"]["plateau"]["value"] is None


def test_an_ablation_of_an_older_version_is_drawn_anew(audited, tmp_path, monkeypatch):
    copy = shutil.copytree(audited, tmp_path / "copy")
    study = Study.open(copy)
    del study.manifest["stages"]["ablate"]["block"]
    study.save()

    def drawn(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate, "choose_prompts", drawn)
    assert run(["ablate", str(copy)]) == 130


class HarmAlone:
    """A judge of harm alone, to whom every answer is harmful."""

    identity = JudgeIdentity("harm", "1", "harm", "0" * 64)

    def judge(self, exchanges):
        return [Verdict("complied", "so", "harm-1", 1.0) for _ in exchanges]


def test_a_judge_of_harm_alone_says_nothing_of_harmless_requests(by_rules):
    rows = from_table(Study.open(by_rules).read_table("rollouts.parquet"))
    verdicts = {
        each["row_id"]: each for each in verdicts_on(as_asked(rows), HarmAlone())
    }
    judged = [with_verdict(row, verdicts[row.row_id], "") for row in rows]
    for row in judged:
        if row.label == "benign" and row.verdict != "degenerate":
            assert (row.verdict, row.reason) == ("unparsed", HARM_ALONE)
    assert attack_block(judged, 0)["harmful"]["value"] == 1.0


def test_a_guard_takes_the_place_of_the_model_and_gives_it_back(
    thinker, tmp_path, monkeypatch
):
    from holdfast.judges.settings import JudgeSettings

    loaded = []
    session = Session(str(thinker))
    known = guard("wildguard")
    monkeypatch.setattr(
        import_module("holdfast.rollout.session"),
        "open_judge",
        lambda settings: loaded.append(session._speaker) or known,
    )
    settings = JudgeSettings(judge="guard:wildguard")
    assert session.speaker is not None
    assert session.open_judge(settings) is known
    assert loaded == [None]
    assert session.open_judge(settings) is known
    assert len(loaded) == 1
    assert session.speaker is not None
    assert session._judge is None
