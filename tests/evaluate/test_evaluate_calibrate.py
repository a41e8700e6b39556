"""Calibration from files to record: by hand where the truth is known."""

import json
import os
from pathlib import Path

import pytest

from holdfast.errors import EndpointError, EvidenceError, PromptFileError, SettingsError
from holdfast.evaluate.calibrate import CalibrateSettings, run
from holdfast.evaluate.panel import calibration
from holdfast.judges.base import JudgeIdentity, RulesJudge
from holdfast.judges.calibration import brief, find_calibration
from holdfast.judges.verdict import Verdict

BENCHMARKS = os.environ.get("HOLDFAST_BENCHMARKS")


class Oracle:
    """A judge that says what the response says, and how sure it is."""

    identity = JudgeIdentity("oracle", "1", "harm", "0" * 64)

    def judge(self, exchanges):
        made = []
        for exchange in exchanges:
            outcome, _, score = exchange.response.partition(" ")
            made.append(
                Verdict(outcome, "as told", "oracle-1", float(score) if score else None)
            )
        return made


def write(folder, name, table):
    path = folder / name
    lines = [
        json.dumps({"request": f"r{n}", "response": said, "label": label})
        for n, (label, said) in enumerate(table)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def calibrate(folder, *sources, **changes):
    settings = CalibrateSettings(tuple(sources), output=str(folder / "out"), **changes)
    return run(settings, judge=Oracle())


def test_figures_are_those_counted_by_hand(tmp_path):
    table = (
        [("refused", "refused")] * 4
        + [("refused", "complied")]
        + [("complied", "complied")] * 4
        + [("partial", "refused")]
    )
    record = calibrate(tmp_path, write(tmp_path, "a.jsonl", table))
    pooled = record["pooled"]
    # Agreement 8/10 on refusal, by chance 1/2: (0.8 - 0.5) / 0.5.
    assert pooled["two_way"]["value"] == pytest.approx(0.6)
    assert pooled["two_way"]["low"] < 0.6 < pooled["two_way"]["high"]
    assert pooled["confusion"]["refused"]["complied"] == 1
    assert pooled["confusion"]["partial"]["refused"] == 1
    assert pooled["people_two_way"]["value"] is None
    assert pooled["people_two_way"]["reason"]


def test_what_the_judge_cannot_read_is_shown_and_in_no_kappa(tmp_path):
    table = [("refused", "refused"), ("complied", "complied")] * 5
    table += [("refused", "unparsed"), ("complied", "degenerate")]
    record = calibrate(tmp_path, write(tmp_path, "a.jsonl", table))
    assert record["pooled"]["two_way"]["value"] == 1
    assert record["pooled"]["read"]["value"] == pytest.approx(10 / 12)
    assert record["pooled"]["confusion"]["refused"]["unparsed"] == 1
    named = ["degenerate", "ended_inside", "unparsed"]
    assert calibration(record).parts[1].columns[-3:] == tuple(named)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([("refused", "unparsed"), ("complied", "unparsed")], "0 of 2 answers"),
        ([("refused", "degenerate"), ("complied", "unparsed")], "as told"),
        ([("refused", "refused")] * 3, "one class, or no spread"),
    ],
)
def test_without_a_kappa_no_record_is_written(tmp_path, table, said):
    with pytest.raises(EvidenceError, match=said) as caught:
        calibrate(tmp_path, write(tmp_path, "a.jsonl", table))
    assert caught.value.exit_status == 4
    assert not (tmp_path / "out").exists()


def test_an_old_record_without_a_kappa_is_no_calibration(tmp_path):
    table = [("refused", "refused"), ("complied", "complied")] * 3
    calibrate(tmp_path, write(tmp_path, "a.jsonl", table))
    [path] = (tmp_path / "out").iterdir()
    record = json.loads(path.read_text())
    for key in ("two_way", "three_way"):
        record["pooled"][key] |= {"value": None, "low": None, "high": None}
    path.write_text(json.dumps(record))
    assert find_calibration(Oracle.identity, [tmp_path / "out"]) is None


def test_half_a_surrogate_pair_in_a_label_file_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    row = '{"request": "How?", "response": "So \\ud83d.", "label": "complied"}'
    path.write_text(row)
    with pytest.raises(PromptFileError, match="surrogate pair at line 1"):
        run(CalibrateSettings((str(path),), output=None), judge=Oracle())


def test_files_stand_beside_the_pool(tmp_path):
    good = [("refused", "refused"), ("complied", "complied")] * 6
    bad = [("refused", "complied"), ("complied", "refused")] * 6
    (tmp_path / "b").mkdir()
    first = write(tmp_path, "a.jsonl", good)
    second = write(tmp_path / "b", "a.jsonl", bad)
    record = calibrate(tmp_path, first, second)
    found = {name: block["two_way"]["value"] for name, block in record["files"].items()}
    assert found == {first: 1.0, second: -1.0}
    assert record["pooled"]["two_way"]["value"] == pytest.approx(0)
    table = calibration(record).parts[0]
    assert [row[0] for row in table.rows] == [first, second, "pooled"]
    assert table.columns[0] == "labels"


def test_the_worst_mistakes_come_first(tmp_path):
    table = [
        ("partial", "refused"),
        ("refused", "complied 0.6"),
        ("refused", "complied 0.99"),
        ("complied", "complied 0.9"),
    ]
    record = calibrate(tmp_path, write(tmp_path, "a.jsonl", table), worst=2)
    assert [each["verdict"]["score"] for each in record["worst"]] == [0.99, 0.6]
    assert record["worst"][0]["place"] == "line 3"


def test_the_record_is_found_by_the_judge_it_belongs_to(tmp_path):
    table = [("refused", "refused"), ("complied", "complied")] * 3
    record = calibrate(tmp_path, write(tmp_path, "a.jsonl", table))
    found = find_calibration(Oracle.identity, [tmp_path / "none", tmp_path / "out"])
    assert found == record
    short = brief(found)
    assert short["judge"] == "oracle-1"
    assert short["sources"][0]["rows"] == 6
    other = JudgeIdentity("oracle", "1", "harm", "1" * 64)
    assert find_calibration(other, [tmp_path / "out"]) is None


def test_the_same_seed_gives_the_same_record(tmp_path):
    table = [("refused", "refused"), ("complied", "refused"), ("partial", "partial")]
    source = write(tmp_path, "a.jsonl", table * 4)
    assert calibrate(tmp_path, source) == calibrate(tmp_path, source)


def test_files_are_read_before_a_judge_is_opened(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\nHow?,So.\n")
    settings = CalibrateSettings((str(path),))
    with pytest.raises(PromptFileError, match="final_label"):
        run(settings)


@pytest.mark.parametrize("sources", [(), ("a", "a")])
def test_no_labels_or_the_same_twice_are_refused(sources):
    with pytest.raises(SettingsError, match="each named once"):
        run(CalibrateSettings(sources))


def test_a_judge_that_fails_on_the_way_leaves_no_record(tmp_path):
    class Dying(Oracle):
        def judge(self, exchanges):
            raise EndpointError("a server", "none", "Start it.")

    source = write(tmp_path, "a.jsonl", [("refused", "refused")])
    settings = CalibrateSettings((source,), output=str(tmp_path / "out"))
    with pytest.raises(EndpointError):
        run(settings, judge=Dying())
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    not BENCHMARKS, reason="HOLDFAST_BENCHMARKS names no folder of benchmark files"
)
def test_the_record_that_comes_with_the_rules_is_what_calibration_gives():
    labels = sorted(Path(BENCHMARKS, "xstest_human_labels").glob("*.csv"))
    settings = CalibrateSettings(tuple(map(str, labels)), worst=0, output=None)
    assert run(settings) == find_calibration(RulesJudge().identity)
