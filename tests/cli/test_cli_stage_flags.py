"""Where a flag leaves too little, the flag is named, and before anything is loaded."""

from dataclasses import replace
from importlib import import_module

import pytest

from holdfast.audit.settings import AuditSettings
from holdfast.cli.app import run
from holdfast.dynamics.settings import SignalSettings
from holdfast.errors import SettingsError, TooFewExamplesError
from holdfast.heads.readings import select
from holdfast.heads.settings import AblateSettings, BakeSettings
from holdfast.rollout.rows import from_table
from holdfast.rollout.settings import ProbeSettings, RolloutSettings
from holdfast.study import Study


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ablation-prompts", "8"], "--ablation-prompts of 10 or more"),
        (["--selection-prompts", "8"], "--selection-prompts of 10 or more"),
        (["--fractions", "-1"], "--fractions above 0 and up to 1"),
        (["--fractions", "2"], "--fractions above 0 and up to 1"),
        (["--limit", "20"], "--limit of 25 or more"),
        (["--limit", "24"], "--limit of 25 or more"),
        (["--limit", "29", "--folds", "10"], "--limit of 30 or more"),
    ],
)
def test_a_flag_that_can_never_suffice_is_refused_before_anything_is_loaded(
    monkeypatch, tmp_path, capsys, flags, says
):
    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(
        import_module("holdfast.rollout.session"), "load_language_model", loaded
    )
    study = tmp_path / "study"
    assert run(["audit", *flags, "-o", str(study)]) == 2
    message = capsys.readouterr().err
    assert says in message
    assert f"found {flags[1]}" in message
    assert not study.exists()


def test_a_share_of_heads_to_bake_is_one():
    for share in (0.0, -0.1, 1.5):
        with pytest.raises(SettingsError, match="--fraction above 0 and up to 1"):
            BakeSettings(fraction=share)
    BakeSettings(fraction=1.0)


def test_what_could_suffice_is_not_refused():
    AuditSettings(RolloutSettings(limit=25))
    AuditSettings(RolloutSettings(limit=25), ProbeSettings(folds=5))
    AuditSettings(RolloutSettings(limit=10, samples=4))
    AuditSettings(RolloutSettings(limit=2, imported="rows.jsonl"))
    # No repair is followed where heads are scaled and not switched off.
    AblateSettings(ablation_prompts=8, factor=0.5)


def test_more_requests_than_anchors_may_have_are_not_asked_for():
    with pytest.raises(SettingsError, match="--anchor-requests of 20 or more"):
        SignalSettings(anchor_requests=19)
    SignalSettings(anchor_requests=19, min_anchors=19)
    SignalSettings(anchor_requests=19, anchors="another study")


def test_a_flag_that_cuts_off_what_is_there_is_blamed_and_the_data_are_not(audited):
    rows = from_table(Study.open(audited).read_table("rollouts.parquet"))
    complied = [row for row in rows if row.role == "wrapped" and row.is_complied]
    # Ten rows of two wrappers each hold fewer than ten requests.
    doubled = [
        replace(row, row_id=f"{row.row_id}/{copy}") for row in complied for copy in "ab"
    ]
    with pytest.raises(TooFewExamplesError) as caught:
        select(doubled, 10)
    assert "Set --selection-prompts to " in caught.value.next_step
    assert "add harmful" not in caught.value.next_step
    least = int(caught.value.next_step.split(" to ")[1].split()[0])
    found = select(doubled, least)
    for part in (found.ranking.rows, found.checking.rows):
        assert len({row.request_id for row in part}) >= 10
    with pytest.raises(TooFewExamplesError):
        select(doubled, least - 1)


def test_data_that_hold_too_little_are_blamed_and_the_flag_is_not(audited):
    rows = from_table(Study.open(audited).read_table("rollouts.parquet"))
    refused = [row for row in rows if row.is_refused]
    with pytest.raises(TooFewExamplesError, match="found 0 and 0") as caught:
        select(refused, 10)
    assert "add harmful prompts" in caught.value.next_step
    assert "--" not in caught.value.next_step
