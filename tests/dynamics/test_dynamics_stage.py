"""The signal of a study against a slow loop, and what must not change or pass."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from holdfast.cli.app import run
from holdfast.dynamics import states as dynamics_states
from holdfast.dynamics.rows import read_signal
from holdfast.dynamics.signal import anchor_signal
from holdfast.dynamics.sources import PUBLISHED, read_anchors, require_identity
from holdfast.dynamics.states import LiveSignal
from holdfast.errors import InputError
from holdfast.models import hidden_states
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.loading.causal import load
from holdfast.rollout.rows import from_table
from holdfast.study import Study

FEW = ("--min-anchors", "10", "--steps", "8")
GUARD = ("--min-train", "4", "--min-calibration", "4", "--rates", "0.2")


def copied(audited, folder):
    return shutil.copytree(audited, folder / "study")


@pytest.fixture(scope="module")
def watched(audited, tmp_path_factory):
    """A study with a signal, which no test changes."""
    study = copied(audited, tmp_path_factory.mktemp("watched"))
    assert run(["signal", str(study), *FEW]) == 0
    return study


def signal_of(study):
    found = read_signal(Study.open(study))
    names = [row.row_id for row in found.rows]
    return dict(zip(names, found.channels["compliance_logit"], strict=True))


def rows_of(study):
    return {
        row.row_id: row
        for row in from_table(Study.open(study).read_table("rollouts.parquet"))
    }


@torch.no_grad()
def slow_states(model, row, positions, steps=8, region="answer"):
    """The published loop: no cache, one prompt at a time, the whole prefix again."""
    start = row.spans.answer[0] if region == "answer" else row.spans.prompt[1]
    written, pooled = [], []
    for step in range(min(steps, len(row.token_ids) - start)):
        ids = torch.tensor([row.token_ids[: start + step]])
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        if positions == "producing":
            written.append(states[-1])
            pooled.append(torch.stack(written).mean(0))
        else:
            pooled.append(states[start:].mean(0) if step else states[-1])
    while len(pooled) < steps:
        # The authors' code counts the last state again; a mean just stays.
        if positions == "producing":
            written.append(written[-1])
        again = torch.stack(written).mean(0) if written else pooled[-1]
        pooled.append(again)
    return torch.stack(pooled)


@pytest.mark.parametrize(
    ("mode", "positions", "region"),
    [
        ("paper", "committed", "answer"),
        ("repo", "producing", "answer"),
        ("robust", "committed", "completion"),
    ],
)
def test_the_signal_is_that_of_a_slow_loop(
    audited, thinker, tmp_path, mode, positions, region
):
    study = copied(audited, tmp_path)
    flags = ("--mode", mode, "--region", region)
    assert run(["signal", str(study), *FEW, *flags]) == 0
    model = AutoModelForCausalLM.from_pretrained(thinker).eval()
    rows, found = rows_of(study), signal_of(study)
    taken = json.loads((study / "anchors/published.json").read_text())["taken"]

    def mean(role):
        chosen = [
            row
            for row in rows.values()
            if row.request_id in taken
            and row.role == role
            and row.split == "train"
            and row.verdict == {"benign": "complied", "harmful": "refused"}[role]
        ]
        states = [slow_states(model, row, positions, region=region) for row in chosen]
        return torch.stack(states).mean(0)

    compliant, refused = mean("benign"), mean("harmful")
    files = load_file(study / "anchors/published.safetensors")
    torch.testing.assert_close(files["compliant"], compliant, atol=1e-4, rtol=0)
    torch.testing.assert_close(files["refused"], refused, atol=1e-4, rtol=0)
    # Far from both anchors the log-odds hold still; near one they need its exact place.
    compliant, refused = files["compliant"], files["refused"]
    if mode == "robust":
        middle = (compliant + refused) / 2
    else:
        middle = torch.zeros_like(compliant)
    for row in list(rows.values())[::40]:
        states = slow_states(model, row, positions, region=region)
        near, far = (
            1 - torch.cosine_similarity((states - middle).double(), side, dim=-1)
            for side in (compliant - middle, refused - middle)
        )
        expected = torch.sigmoid((torch.log(far + 1e-8) - torch.log(near + 1e-8)) / 0.1)
        torch.testing.assert_close(
            torch.sigmoid(found[row.row_id]).double(), expected, atol=1e-4, rtol=0
        )


def test_the_signal_while_decoding_is_the_same(watched, thinker):
    rows, found = rows_of(watched), signal_of(watched)
    adapter = load(thinker)
    identity = json.loads((watched / "anchors/published.json").read_text())["identity"]
    held = anchor_signal(read_anchors(watched, PUBLISHED, identity).anchors)
    chosen = list(rows.values())[::60]
    prompts = [(row.token_ids[: row.spans.prompt[1]], row.seed) for row in chosen]
    traces = generate(
        adapter,
        prompts,
        Sampling(temperature=0.0, max_thinking=64, max_answer=32),
        observe=LiveSignal(held, "committed", "answer"),
    )
    seen = 0
    for drawn in (each for batch in traces for each in batch):
        row = chosen[drawn.index]
        assert drawn.token_ids == row.token_ids
        live = drawn.trace.observed[~drawn.trace.observed.isnan()]
        n = len(row.token_ids) - row.spans.answer[0]
        assert len(live) == min(8, n)
        torch.testing.assert_close(
            torch.sigmoid(live),
            torch.sigmoid(found[row.row_id][: len(live)]),
            atol=1e-4,
            rtol=0,
        )
        seen += 1
    assert seen == len(chosen)


def test_another_batch_size_changes_nothing(watched, audited, tmp_path):
    study = copied(audited, tmp_path)
    assert run(["signal", str(study), *FEW, "--batch-size", "5"]) == 0
    one, other = signal_of(watched), signal_of(study)
    for row_id, values in one.items():
        torch.testing.assert_close(
            torch.sigmoid(other[row_id]), torch.sigmoid(values), atol=1e-4, rtol=0
        )


def test_anchors_tell_held_out_refusals_from_compliance(watched):
    found = json.loads((watched / "signal.json").read_text())
    assert found["figures"]["last_step_auroc"]["low"] > 0.8
    groups = found["groups"]
    assert groups["attack_refused"]["below"]["value"] > 0.9
    assert groups["benign_complied"]["below"]["value"] < 0.1
    # The text-level signal of a refusal falls when its words have come.
    text = [point["mean"] for point in found["curves"]["text"]["attack_refused"]]
    assert text[0] == 1
    assert text[-1] < 0.1
    assert all(p["mean"] == 1 for p in found["curves"]["text"]["benign_complied"])
    taken = set(json.loads((watched / "anchors/published.json").read_text())["taken"])
    test = {row.request_id for row in rows_of(watched).values() if row.split == "test"}
    plain = {
        row.request_id
        for row in rows_of(watched).values()
        if row.role in ("harmful", "benign")
    }
    assert not taken & test & plain


def test_an_interrupted_signal_goes_on_and_ends_the_same(
    watched, audited, tmp_path, monkeypatch
):
    study = copied(audited, tmp_path)
    whole = hidden_states.read_windows
    calls = []

    def breaking(*arguments, **named):
        calls.append(len(arguments[1]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(*arguments, **named)

    monkeypatch.setattr(dynamics_states, "read_windows", breaking)
    command = ["signal", str(study), *FEW, "--batch-size", "32"]
    assert run(command) == 130
    monkeypatch.setattr(dynamics_states, "read_windows", whole)
    assert list((study / "parts").rglob("*.parquet"))
    assert run(command) == 0
    assert not (study / "parts").exists()
    straight = copied(audited, tmp_path / "straight")
    assert run(["signal", str(straight), *command[2:]]) == 0
    names = ("signal.safetensors", "anchors/published.safetensors", "signal.json")
    for name in names:
        assert (study / name).read_bytes() == (straight / name).read_bytes()


def test_done_is_said_and_other_settings_are_redone(watched, tmp_path, capsys):
    study = copied(watched, tmp_path)
    before = (study / "signal.json").read_bytes()
    assert run(["signal", str(study), *FEW, "--json"]) == 0
    captured = capsys.readouterr()
    assert "up to date" in captured.err
    assert json.loads(captured.out) == json.loads(before)
    assert run(["signal", str(study), *FEW, "--mode", "robust"]) == 0
    # Other coordinates need no other anchors.
    assert "The anchors are there" in capsys.readouterr().err
    assert (study / "signal.json").read_bytes() != before


def test_shares_of_the_answer_end_where_the_answer_ends(audited, watched, tmp_path):
    study = copied(audited, tmp_path)
    assert run(["signal", str(study), *FEW, "--time", "fraction"]) == 0
    rows, found = rows_of(study), signal_of(study)
    row = next(row for row in rows.values() if row.role == "benign")
    assert len(row.token_ids) - row.spans.answer[0] > 8
    assert not torch.allclose(found[row.row_id], signal_of(watched)[row.row_id])


def test_too_few_refusals_are_refused_with_the_counts(audited, tmp_path, capsys):
    study = copied(audited, tmp_path)
    assert run(["signal", str(study), "--steps", "8"]) == 4
    said = capsys.readouterr().err
    assert "at least 20 training requests" in said
    assert "harmful refused" in said
    assert "--unfiltered" in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--steps", "9"), "steps 9; found steps 8"),
        (("--mode", "repo"), '"producing"'),
        (("--region", "completion"), 'region "completion"'),
        (("--time", "fraction"), 'time "fraction"'),
    ],
)
def test_anchors_of_other_settings_are_refused(
    watched, audited, tmp_path, capsys, flags, says
):
    study = copied(audited, tmp_path)
    few = FEW[:2] if "--steps" in flags else FEW
    command = ["signal", str(study), *few, *flags, "--anchors", str(watched)]
    assert run(command) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Fit anchors with these settings" in said


def test_anchors_of_another_sampler_or_model_are_refused(
    watched, audited, tmp_path, capsys
):
    study = copied(audited, tmp_path)
    for key, value, says in (
        ("sampler", {"kind": "diffusion", "steps": 32}, '"diffusion"'),
        ("weights_sha256", "0" * 64, "weights_sha256"),
    ):
        other = copied(watched, tmp_path / key)
        path = other / "anchors/published.json"
        facts = json.loads(path.read_text())
        facts["identity"][key] = value
        path.write_text(json.dumps(facts))
        assert run(["signal", str(study), *FEW, "--anchors", str(other)]) == 2
        assert says in capsys.readouterr().err


def test_what_differs_in_the_middle_of_a_long_value_is_seen():
    long = {"sampler": {"kind": "x" * 80, "steps": 32, "rest": "y" * 80}}
    other = {"sampler": long["sampler"] | {"steps": 64}}
    require_identity(long, long)
    with pytest.raises(InputError, match=r"sampler\.steps 64; found sampler\.steps 32"):
        require_identity(long, other)


def test_anchors_of_another_study_are_used_as_they_are(watched, audited, tmp_path):
    study = copied(audited, tmp_path)
    command = ["signal", str(study), *FEW, "--anchors", str(watched)]
    assert run(command) == 0
    assert not (study / "anchors").exists()
    for row_id, values in signal_of(study).items():
        assert torch.equal(values, signal_of(watched)[row_id])
        break


def test_a_study_without_rollouts_or_with_damaged_anchors_is_refused(
    watched, audited, tmp_path, capsys
):
    assert run(["signal", str(tmp_path)]) == 2
    study, other = copied(audited, tmp_path), copied(watched, tmp_path / "other")
    (other / "anchors/published.safetensors").write_bytes(b"nothing")
    assert run(["signal", str(study), *FEW, "--anchors", str(other)]) == 2
    assert "none that can be read" in capsys.readouterr().err


@pytest.fixture(scope="module")
def guarded(watched, tmp_path_factory):
    study = copied(watched, tmp_path_factory.mktemp("guarded"))
    assert run(["guard", "fit", str(study), *GUARD]) == 0
    assert run(["guard", "evaluate", str(study), "--choose-on", "maybe"]) == 0
    return study


def test_detectors_are_chosen_on_some_families_and_reported_on_others(guarded):
    found = json.loads((guarded / "guard/evaluation.json").read_text())
    assert found["chosen_on"] == ["maybe"]
    assert found["reported_on"] == ["song", "sternly"]
    best = found["recommended"]["detector"]
    chosen = {row["detector"]: row["auroc"] for row in found["chosen"]}
    assert chosen[best] == found["recommended"]["auroc"]
    assert chosen[best]["low"] == max(
        each["low"] for each in chosen.values() if each["low"] is not None
    )
    # All of `sternly` is refused: flagged or not, no attack there has succeeded.
    sternly = found["by_family"]["sternly"]["table"]
    for row in sternly:
        assert row["auroc"]["value"] is None
        [level] = row["levels"]
        assert level["attack_complied"]["n"] == 0
        assert level["attack_refused"]["n"] > 0
    # The signal of a refusal is far from benign, so the published detector flags it.
    row = next(row for row in sternly if row["detector"] == "autoencoder")
    assert row["levels"][0]["attack_refused"]["value"] > 0.9


def test_thresholds_are_of_rows_that_nothing_else_was_fitted_on(guarded):
    facts = json.loads((guarded / "guard/detectors.json").read_text())
    taken = set(json.loads((guarded / "anchors/published.json").read_text())["taken"])
    rows = rows_of(guarded).values()
    train = {
        row.request_id
        for row in rows
        if row.role == "benign" and row.split == "train" and not row.is_refused
    }
    counts = facts["requests"]
    assert counts["train"] + counts["calibration"] == len(train - taken)
    for each in facts["detectors"].values():
        [threshold] = each["thresholds"]
        assert threshold["n_requests"] == counts["calibration"]
        assert threshold["low"] < 0.2 < threshold["high"]


def test_a_guard_needs_a_signal_and_enough_benign_rows(
    watched, audited, tmp_path, capsys
):
    study = copied(audited, tmp_path)
    assert run(["guard", "fit", str(study)]) == 2
    assert "holdfast signal" in capsys.readouterr().err
    other = copied(watched, tmp_path / "other")
    assert run(["guard", "fit", str(other)]) == 4
    said = capsys.readouterr().err
    assert "at least 1000 benign requests to set thresholds" in said
    assert "beside" in said
    assert run(["guard", "evaluate", str(other)]) == 2
    assert "holdfast guard fit" in capsys.readouterr().err
    assert run(["guard", "fit", str(other), *GUARD[:4], "--rates", "0.01"]) == 4
    assert "99 benign calibration requests" in capsys.readouterr().err


def test_another_study_adds_domains_and_families_and_the_page_shows_them(
    guarded, audited, tmp_path, capsys
):
    study, other = copied(guarded, tmp_path), tmp_path / "elsewhere"
    shutil.copytree(audited, other)
    assert run(["signal", str(other), *FEW, "--anchors", str(study)]) == 0
    capsys.readouterr()
    assert run(["guard", "evaluate", str(study), "--on", str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"plain", "elsewhere: plain"} <= set(found["by_domain"])
    assert "elsewhere: song" in found["by_family"]
    # The same answers: the same rates, and the same anchors left out of both.
    for name in ("plain", "in wrappers"):
        own, same = found["by_domain"][name], found["by_domain"][f"elsewhere: {name}"]
        assert own["rows"] == same["rows"]
        for one, two in zip(own["table"], same["table"], strict=True):
            rates = [row["levels"][0]["false_positives"]["value"] for row in (one, two)]
            assert rates[0] == rates[1]
    assert run(["report", str(study)]) == 0
    report = json.loads((study / "report.json").read_text())
    assert report["guard"]["by_domain"].keys() == found["by_domain"].keys()
    assert report["signal"]["figures"]["last_step_auroc"]["value"] > 0.9
    page = (study / "report.html").read_text()
    assert 'id="signal"' in page
    assert "autoencoder (published)" in page
    # A signal of other settings makes the old table stale, and the page drops it.
    assert run(["signal", str(study), *FEW, "--mode", "repo"]) == 0
    assert run(["report", str(study)]) == 0
    assert "guard" not in json.loads((study / "report.json").read_text())


def test_detectors_do_not_read_another_signal(guarded, audited, tmp_path, capsys):
    other = copied(audited, tmp_path)
    assert run(["signal", str(other), *FEW, "--mode", "robust"]) == 0
    command = ["guard", "evaluate", str(guarded), "--on", str(other)]
    assert run(command) == 2
    assert 'mode "paper"; found mode "robust"' in capsys.readouterr().err


def test_unknown_families_and_none_left_to_report_on_are_refused(guarded, capsys):
    for names in (("nobody",), ("maybe", "song", "sternly")):
        flags = [word for name in names for word in ("--choose-on", name)]
        assert run(["guard", "evaluate", str(guarded), *flags]) == 2
        assert "--choose-on" in capsys.readouterr().err
