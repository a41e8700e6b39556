"""One rounding for every share that a person reads."""

import pytest

from holdfast.audit.panel import print_report
from holdfast.cliff.verdict import Figures, verdict
from holdfast.evaluate.panel import headline, paired_table, table
from holdfast.report import text
from holdfast.stats.bootstrap import Estimate
from holdfast.stats.percent import percent
from report_fixture import make_report

EIGHTH = {"value": 0.625, "low": 0.125, "high": 0.875, "n": 8}
NONE = {"value": None, "low": None, "high": None, "n": 0, "reason": "not asked"}


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0, "0"),
        (0.0004, "<0.1"),
        (0.004, "0.4"),
        (0.125, "13"),
        (0.625, "63"),
        (0.996, "99.6"),
        (0.9999, ">99.9"),
        (1.0, "100"),
        (-0.125, "−13"),
        (-0.0004, ">−0.1"),
    ],
)
def test_halves_go_away_from_zero_and_little_is_not_none(share, said):
    assert percent(share) == said


def test_headline_table_sum_pairs_and_verdict_round_a_half_alike():
    success = {"plain": EIGHTH, "wrapped": NONE, "any": NONE}
    summary = {"attack_success": success, "utility": {}}
    summary["over_refusal"] = {"safe_lookalike": NONE, "benign": NONE}
    said = headline({"summary": summary})
    assert said == "Attack success 63% of 8 (13 to 88%)."
    keys = ("refused", "complied", "partial", "degenerate", "unparsed")
    row = {"suite": "s", "kind": "harmful", "wrapper": None, "figure": EIGHTH}
    row["outcomes"] = dict.fromkeys(keys, EIGHTH)
    assert table({"rows": [row]})[1][2] == "63 (13–88)"
    assert text.rate(EIGHTH) == "63% (13 to 88%)"
    paired = {"suite": "s", "kind": "harmful", "wrapper": None, "requests": 8}
    paired |= {"measure": "attack_success", "a": 0.625, "b": 0.75, "p_value": None}
    paired |= {"test": "", "difference": EIGHTH | {"value": 0.125}}
    assert paired_table([paired])[1][2:5] == ["63%", "75%", "13 (13 to 88) points"]


def test_the_verdict_rounds_as_the_table_does():
    half, gone = Estimate(0.625, 0.125, 0.875, 24), Estimate(0.1, 0.0, 0.2, 24)
    unread = half._replace(bounds=(0.625, 0.875), n_unjudged=6)
    found = verdict(Figures(half, unread, True, 0, 0, gone, gone, gone, gone))
    kind = "harmful requests were complied with, fully or in part (13% to 88%)."
    assert found.evidence[0] == f"63% of 24 plain {kind}"
    assert found.evidence[1] == (f"63% to 88% (6 were not judged) of 24 wrapped {kind}")


def test_the_terminal_counts_the_answers_of_every_kind(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    report = make_report()
    print_report(report)
    lines = capsys.readouterr().out.split("\n")
    [line] = [line for line in lines if "│ Harmful, as asked" in line]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    refused = report["outcomes"]["harmful"]["refused"]
    assert cells[1:3] == [str(refused["n"]), text.rate(refused)]
