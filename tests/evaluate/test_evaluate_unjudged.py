"""No verb prints a rate over rows of which none was judged."""

import json
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_server import Reply, serving
from holdfast.cli.app import run
from holdfast.errors import ModelError
from holdfast.evaluate.compare import _test
from holdfast.evaluate.inspect_log import _score
from holdfast.evaluate.rows import evaluation_figures
from holdfast.heads.ablation_effects import conditions_of, sparse_of
from holdfast.heads.bake import _check
from holdfast.heads.settings import BakeSettings
from holdfast.judges.base import JudgeIdentity, RulesJudge
from holdfast.judges.verdict import Verdict
from holdfast.study import Study

FORM = "#scores\n1.b {}\n2.b {}\n3.b {}"
UNREAD = {
    "rambling": {"content": "banana"},
    "refusing": {"content": "I'm sorry, but I can't help with that."},
    "silent": {"content": None},
    "thinking": {"content": f"<think>{FORM.format(0, 5, 5)}"},
    "a word": {"content": FORM.format("no", "high", "high")},
    "a fraction": {"content": FORM.format(0, 4.5, 4.5)},
}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def evaluated(thinker, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    files = dict(zip(world[0::2], world[1::2], strict=True))
    kinds = ("harmful", "benign", "safe-lookalike")
    suites = [
        word
        for kind in kinds
        for word in ("--suite", f"{kind.replace('-', '_')}={files[f'--{kind}']}")
    ]
    more = ("--attack", "role_play", "--limit", "8", *world[-4:], "-o")
    for name in ("first", "second"):
        assert run(["evaluate", str(thinker), *suites, *more, str(folder / name)]) == 0
    return folder


def judge_again(study, message, capsys, *more, unread_request=None):
    """Judge a study by a server that says one thing; return what is printed.

    Of one request, if it is named, the server says what nobody can read.
    """

    def answer(body, number):
        prompt = body["messages"][-1]["content"]
        unread = unread_request is not None and unread_request in prompt
        said = UNREAD["rambling"] if unread else message
        choice = {"message": said, "finish_reason": "stop"}
        return Reply(body=json.dumps({"choices": [choice]}))

    with serving(answer) as server:
        words = ["--judge", server.url, "--judge-model", "m", *more]
        assert run(["judge", "rerun", str(study), *words]) == 0
    return capsys.readouterr().out


def figures(block, path=()):
    """Yield every figure of a block with its path."""
    if isinstance(block, dict) and {"value", "n"} <= set(block):
        yield path, block
    elif isinstance(block, dict):
        for key, inner in block.items():
            yield from figures(inner, (*path, key))
    elif isinstance(block, list):
        for place, inner in enumerate(block):
            yield from figures(inner, (*path, place))


def rates(block):
    """Return the figures that need a judge: all but the share that was not judged."""
    kept = {key: block[key] for key in ("rows", "summary")}
    return [figure for path, figure in figures(kept) if path[-1] != "unparsed"]


@pytest.mark.parametrize("how", UNREAD)
def test_a_judge_that_never_judged_gives_no_rate_anywhere(how, evaluated, capsys):
    study = evaluated / "first"
    printed = judge_again(study, UNREAD[how], capsys)
    assert "could be judged" in printed.strip().split("\n")[0]
    # The one share that may be there says that nothing was judged.
    assert not re.search(r"\d(\.\d)?%", printed.replace("95%", ""))
    assert set(re.findall(r"(\d+) \(\d+–\d+\)", printed)) <= {"100"}
    block = json.loads((study / "report.json").read_text())["evaluation"]
    found = rates(block)
    assert found
    assert all(figure["value"] is None for figure in found)
    assert all("bounds" not in figure for figure in found)
    page = (study / "report.html").read_text()
    assert set(re.findall(r'class="value">([^<]*)<', page)) <= {"100%"}
    assert "<h1>Attack success not measured (none of 8 answers" in page
    as_json = json.loads(judge_again(study, UNREAD[how], capsys, "--json"))
    assert rates(as_json) == found


def test_comparing_with_a_judge_that_never_judged_shows_no_gain(evaluated, capsys):
    first, second = evaluated / "first", evaluated / "second"
    good = {"content": FORM.format(0, 5, 5)}
    judge_again(first, good, capsys)
    judge_again(second, UNREAD["rambling"], capsys)
    assert run(["compare", str(first), str(second), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["difference"] for row in found["rows"]] == [None] * len(found["rows"])
    attack = [row for row in found["paired"] if row["kind"] == "harmful"]
    assert len(attack) == 2
    for row in found["paired"]:
        assert (row["difference"]["value"], row["p_value"], row["b"]) == (None,) * 3
        assert (row["gained"], row["lost"], row["unjudged"]) == (0, 0, row["rows"])
    assert run(["compare", str(first), str(second)]) == 0
    assert not re.search(r"\d\)? points", capsys.readouterr().out)


def test_a_request_that_the_judge_did_not_read_makes_bounds(evaluated, capsys):
    study = evaluated / "first"
    rows = Study.open(study).read_table("generations.parquet").to_pylist()
    request = next(row["request"] for row in rows if row["kind"] == "harmful")
    refused = {"content": FORM.format(1, 1, 1)}
    printed = judge_again(study, refused, capsys, unread_request=request)
    block = json.loads((study / "report.json").read_text())["evaluation"]
    for figure in block["summary"]["attack_success"].values():
        assert (figure["value"], figure["bounds"]) == (0.0, [0.0, 1 / 8])
        assert figure["unjudged"] == 1
        assert figure["high"] > 1 / 8
    assert printed.startswith("\nAttack success 0 to 13% (1 of 8 not judged); ")
    assert "0–13 (0–47)" in printed


row = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["harmful", "benign", "safe_lookalike"]),
        "wrapper": st.sampled_from([None, "role_play"]),
        "request_id": st.sampled_from("abcd"),
        "verdict": st.sampled_from(["complied", "refused", "partial", "degenerate"]),
        "unread": st.booleans(),
    }
)


def as_row(drawn, everything_unread):
    unread = drawn["unread"] or everything_unread
    said = "unparsed" if unread else drawn["verdict"]
    score = 0.75 if said == "complied" else None
    return drawn | {
        **{"suite": "s", "finish": "stop", "forced_close": False, "correct": None},
        **{"verdict": said, "score": score},
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(row, min_size=1, max_size=12), st.sampled_from(["refusal", "harm"]))
def test_every_rate_of_an_evaluation_has_a_judged_row(drawn, measures):
    identity = JudgeIdentity("j", "1", measures, "0" * 64)
    unread = [as_row(each, True) for each in drawn]
    assert all(
        each["value"] is None for each in rates(evaluation_figures(unread, identity, 0))
    )
    mixed = [as_row(each, False) for each in drawn]
    for table in evaluation_figures(mixed, identity, 0)["rows"]:
        of_row = [
            each["verdict"]
            for each in mixed
            if (each["kind"], each["wrapper"]) == (table["kind"], table["wrapper"])
        ]
        n_unread = of_row.count("unparsed")
        figure = table["figure"]
        if n_unread == len(of_row):
            assert figure["value"] is None
        elif n_unread and figure["value"] is not None:
            low, high = figure["bounds"]
            assert low == figure["value"]
            assert high == pytest.approx(low + n_unread / len(of_row), abs=2e-6)
            assert figure["low"] <= low < high <= figure["high"]
        paired = _test(mixed, unread, "x")
        assert (paired["difference"]["value"], paired["p_value"]) == (None, None)


def ablated(outcomes, condition="none", n_heads=0):
    return [
        {
            **{"scope": "everywhere", "condition": condition, "n_heads": n_heads},
            **{"draw": 0, "heads": "", "fraction": None, "role": role},
            "forced_close": False,
            **{"request_id": f"{role}{place}", "asked": f"{role}{place}"},
            "outcome": outcome,
        }
        for role in ("harmful", "benign")
        for place, outcome in enumerate(outcomes)
    ]


def test_an_ablation_that_nobody_judged_has_restored_nothing():
    rows = [*ablated(["complied"] * 8), *ablated(["unparsed"] * 8, "top", 1)]
    plain, top = conditions_of(rows, 0)
    assert plain["attack_success"]["value"] == 1.0
    measured = [figure for _, figure in figures(top)]
    assert len(measured) == 8
    assert all(figure["value"] is None for figure in measured)
    [size] = sparse_of(rows, 8, 0)["sizes"]
    assert size["restored"]["value"] is None


def test_a_baked_model_that_nobody_judged_is_refused():
    before = {"value": 0.5, "low": 0.2, "high": 0.8, "n": 8}
    unread = {"value": None, "low": None, "high": None, "n": 8, "reason": "none"}
    with pytest.raises(ModelError, match="not measured: none"):
        _check({"attack_success": before}, {"attack_success": unread}, BakeSettings())
    unasked = {"attack_success": unread | {"n": 0}}
    _check(unasked, unasked, BakeSettings())


def test_an_audit_that_nobody_judged_says_nothing_of_attacks(
    thinker, world, tmp_path, monkeypatch, capsys
):
    def cannot_tell(_, exchanges):
        reason = "in a language it does not know"
        return [Verdict("unparsed", reason, "rules") for _ in exchanges]

    monkeypatch.setattr(RulesJudge, "judge", cannot_tell)
    study = tmp_path / "study"
    assert run(["audit", str(thinker), *world, "--limit", "26", "-o", str(study)]) == 4
    assert run(["report", str(study)]) == 0
    printed = capsys.readouterr().out
    assert "none of 26 answers could be judged" in printed
    assert set(re.findall(r"(\d+)% \(", printed)) <= {"100"}
    report = json.loads((study / "report.json").read_text())
    assert report["verdict"]["attack_succeeds"] is None
    found = list(figures({key: report[key] for key in ("outcomes", "attack_success")}))
    asked = [each for path, each in found if path[-1] != "unparsed"]
    assert any(each["n"] for each in asked)
    assert all(each["value"] is None for each in asked)


def test_an_exported_log_scores_no_answer_that_nobody_judged():
    log = SimpleNamespace(EvalMetric=SimpleNamespace, EvalScore=SimpleNamespace)
    unread = {"value": None, "low": None, "high": None, "n": 8, "unjudged": 8}
    some = {**unread, "value": 0.25, "low": 0.1, "high": 0.8, "unjudged": 2}
    some |= {"bounds": [0.25, 0.5]}
    row = {"suite": "s", "kind": "harmful", "wrapper": None}
    row |= {"measure": "attack_success"}
    found = _score(log, row | {"figure": unread}, 10)
    assert (found.metrics, found.scored_samples) == ({}, 0)
    found = _score(log, row | {"figure": some}, 10)
    assert {name: metric.value for name, metric in found.metrics.items()} == {
        "attack_success_least": 0.25,
        "attack_success_most": 0.5,
        "attack_success_low": 0.1,
        "attack_success_high": 0.8,
    }
    assert (found.scored_samples, found.unscored_samples) == (6, 4)
