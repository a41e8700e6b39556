"""A verdict as a gate: a null is no pass."""

import pytest

from holdfast.cli.app import run
from holdfast.cli.gate import exit_status
from holdfast.errors import EvidenceError

OPEN = {
    "attack_succeeds": True,
    "cliff": None,
    "sparse": None,
    "reasons": {"cliff": "19 complied; 20 are needed."},
}


@pytest.mark.parametrize("conditions", [["cliff"], ["sparse", "cliff"]])
def test_a_gate_on_a_null_fails_and_says_why(conditions):
    with pytest.raises(EvidenceError) as caught:
        exit_status(OPEN, conditions, "fail")
    assert caught.value.exit_status == 4
    assert "cliff is null (19 complied; 20 are needed.)" in str(caught.value)
    assert "--if-null pass" in caught.value.next_step


def test_a_null_passes_where_the_user_says_so_and_is_told(capsys):
    assert exit_status(OPEN, ["cliff"], "pass") == 0
    assert "cliff is null (19 complied" in capsys.readouterr().err


def test_what_holds_fails_whatever_else_is_null():
    for how in ("fail", "pass"):
        assert exit_status(OPEN, ["cliff", "attack"], how) == 1


def test_what_was_ruled_out_passes_in_silence(capsys):
    ruled_out = OPEN | {"cliff": False}
    assert exit_status(ruled_out, ["cliff"], "fail") == 0
    assert exit_status(OPEN, [], "fail") == 0
    assert capsys.readouterr().err == ""


def test_a_condition_that_this_run_cannot_decide_is_refused_at_once(tmp_path, capsys):
    study = tmp_path / "study"
    command = ["audit", "-o", str(study), "--fail-if", "sparse", "--no-heads"]
    assert run(command) == 2
    assert "--no-heads" in capsys.readouterr().err
    assert not study.exists()


def test_an_audit_without_thinking_does_not_pass_for_one_without_a_cliff(
    plain_model, world, tmp_path, capsys
):
    command = ["audit", str(plain_model), *world, "-o", str(tmp_path / "s"), "--json"]
    gate = ["--limit", "26", "--fail-if", "cliff"]
    assert run([*command, *gate]) == 4
    found = capsys.readouterr()
    assert "no thinking format" in found.err
    assert found.out.startswith("{")
    assert run([*command, *gate, "--if-null", "pass"]) == 0
    assert "no thinking format" in capsys.readouterr().err
