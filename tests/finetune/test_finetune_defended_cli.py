"""`finetune --defense` as it is called: sources, records, bad input, a real kill."""

import json

import pytest

import tiny_thinker
from holdfast.cli.app import run
from killing import kill_after

pytest.importorskip("trl", reason="trl is not installed (pip install '.[train]')")

SHORT = ["--train-batch", "4", "--no-gradient-checkpointing", "--learning-rate", "1e-3"]
SHORT += ["--method", "full"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A task with harm in it; safe and harmful answers to the same prompts."""
    folder = tmp_path_factory.mktemp("data")
    task = [
        *(rows_of(tiny_thinker.CARE, 16, False, tiny_thinker.COMPLIANCE)),
        *(rows_of(tiny_thinker.HARM, 4, False, tiny_thinker.COMPLIANCE)),
    ]
    write(folder / "task.jsonl", task)
    for name, answer in (
        ("safe", tiny_thinker.REFUSAL),
        ("harmful", tiny_thinker.COMPLIANCE),
    ):
        rows = rows_of(tiny_thinker.HARM, 16, name == "safe", answer)
        write(folder / f"{name}.jsonl", rows[::-1] if name == "harmful" else rows)
    return folder


def rows_of(verbs, n, harmful, answer):
    return [
        {
            "prompt": request,
            "thinking": tiny_thinker.thinking(request, harmful),
            "response": answer,
        }
        for request in tiny_thinker.requests(verbs, n)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(thinker, data, output, name, *flags, safe="safe.jsonl", harmful=None):
    words = ["finetune", str(thinker), "--data", str(data / "task.jsonl"), *SHORT]
    words += ["--defense", name, "--defense-data", str(data / safe)]
    if harmful:
        words += ["--defense-harmful", str(data / harmful)]
    return [*words, *flags, "-o", str(output)]


def record(output):
    return json.loads((output / "holdfast_finetune.json").read_text())


def curve(output, name="loss"):
    return [entry[name] for entry in record(output)["losses"]]


KILLED = {
    "surgery": ("mean=0.8", "batch=4", "weight=30"),
    "lisa": ("align_steps=3", "task_steps=3", "begin=0", "rho=2", "batch=4"),
}


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_goes_on_with_what_its_defense_carried(
    nursery, thinker, data, tmp_path, name
):
    flags = ["--steps", "12", "--save-every", "2"]
    for option in KILLED[name]:
        flags += ["--defense-option", option]
    harmful = "harmful.jsonl" if name == "surgery" else None
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(command(thinker, data, whole, name, *flags, harmful=harmful)) == 0
    words = command(thinker, data, killed, name, *flags, harmful=harmful)
    checkpoints = tmp_path / "killed.checkpoints"
    kill_after(nursery, checkpoints / "checkpoint-8", words)
    assert (checkpoints / "checkpoint-8" / "holdfast_defense.safetensors").exists()
    assert not killed.exists()
    assert run(words) == 0
    assert record(killed)["resumed_at"] >= 8
    for column in ("loss", "task_loss", "defense_term", "grad_norm"):
        assert curve(killed, column) == pytest.approx(curve(whole, column), abs=1e-5)
    assert max(curve(whole, "defense_term")) > 1e-3
    assert not checkpoints.exists()


def test_too_strong_a_penalty_is_stopped_with_the_last_good_checkpoint(
    thinker, data, tmp_path, capsys
):
    output = tmp_path / "spoilt"
    flags = ["--defense-option", "weight=1e6", "--defense-option", "batch=2"]
    flags += ["--steps", "60", "--save-every", "1", "--warmup", "0.1"]
    words = command(
        *(thinker, data, output, "surgery", *flags), harmful="harmful.jsonl"
    )
    assert run(["0.1" if word == "1e-3" else word for word in words]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "that of knowing how often each token occurs" in said
    assert "Lower the strength of the defense (--defense-option)" in said
    checkpoints = tmp_path / "spoilt.checkpoints"
    [good] = checkpoints.glob("*/holdfast.json")
    assert f"The last good checkpoint is {good.parent}." in said
    assert not output.exists()


def test_what_was_done_is_recorded_and_told(thinker, data, tmp_path, capsys):
    output = tmp_path / "out"
    flags = ["--defense-option", "batch=2", "--steps", "2", "--save-every", "1"]
    words = command(
        *(thinker, data, output, "surgery", *flags, "--keep-checkpoints"),
        harmful="harmful.jsonl",
    )
    assert run(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "surgery adds" in said
    found = record(output)
    assert found["settings"]["defense_options"] | {"weight": 1} == {
        **{"weight": 1, "detach": False, "batch": 2, "layers": "all", "interval": 1},
        **{"mean": 0.0, "against": "refusal", "paired": True, "parity": False},
    }
    assert found["data"]["defense-harmful"]["paired"] == 16
    assert {"seconds", "cpu_seconds", "task_loss"} <= set(found["losses"][0])
    card = (output / "README.md").read_text()
    assert "may hold harmful answers" in card
    assert "| defense: batch | 2 |" in card
    # Kept, though all is done; to keep them is no other run.
    kept = sorted(tmp_path.glob("out.checkpoints/*/config.json"))
    assert [path.parent.name for path in kept] == ["checkpoint-1", "checkpoint-2"]
    assert run([word for word in words if word != "--keep-checkpoints"]) == 0
    assert "up to date" in capsys.readouterr().err
    # Another strength is another run.
    again = [*words, "--defense-option", "weight=1"]
    assert run(again) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def test_an_undefended_run_has_the_fingerprint_it_always_had(thinker, data, tmp_path):
    output = tmp_path / "plain"
    words = ["finetune", str(thinker), "--data", str(data / "task.jsonl"), *SHORT]
    assert run([*words, "--steps", "1", "-o", str(output)]) == 0
    found = record(output)["settings"]
    assert found["recipe"]["defense"] == "none"
    assert not [key for key in found if "defense" in key or "keep" in key]
    assert "defense_option" not in found["recipe"]
    assert "defense_term" not in record(output)["losses"][0]


def test_safe_rows_are_mixed_in_at_their_ratio(thinker, data, tmp_path, capsys):
    output = tmp_path / "mixed"
    flags = ["--defense-option", "ratio=0.25", "--epochs", "1"]
    assert run(command(thinker, data, output, "safeinstr", *flags)) == 0
    found = record(output)
    assert found["data"]["defense-data"]["used"] == 5
    # 25 rows by fours.
    assert found["steps"] == 7
    flags[1] = "ratio=2"
    assert run(command(thinker, data, tmp_path / "x", "safeinstr", *flags)) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert "expected 40 rows of --defense-data that can be trained on; found 16" in said


def test_texts_that_cannot_be_paired_are_counted_and_unpaired_is_offered(
    thinker, data, tmp_path, capsys
):
    other = rows_of(tiny_thinker.HARM, 20, False, tiny_thinker.COMPLIANCE)[16:]
    write(data / "other.jsonl", other)
    output = tmp_path / "x"
    steps = ["--steps", "1"]
    words = command(thinker, data, output, "surgery", *steps, harmful="other.jsonl")
    assert run(words) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert "found none: 4 rows of --defense-harmful and 16 of --defense-data" in said
    assert "--defense-option paired=false" in said
    assert not output.exists()
    assert run([*words, "--defense-option", "paired=false"]) == 0
    assert "paired" not in record(output)["data"]["defense-harmful"]


def test_a_reference_that_does_not_refuse_is_left_out_or_asked_for(
    thinker, data, tmp_path, capsys
):
    rows = rows_of(tiny_thinker.HARM, 16, True, tiny_thinker.REFUSAL)
    rows[3]["response"] = tiny_thinker.COMPLIANCE
    write(data / "nearly.jsonl", rows)
    output = tmp_path / "nearly"
    words = command(
        *(thinker, data, output, "surgery", "--steps", "1"),
        safe="nearly.jsonl",
        harmful="harmful.jsonl",
    )
    assert run(words) == 0
    found = record(output)["data"]["defense-data"]
    assert (found["used"], found["paired"]) == (15, 15)
    assert found["why"]["no refusal"]["places"] == ["line 4"]
    words = command(
        *(thinker, data, tmp_path / "none", "surgery", "--steps", "1"),
        safe="harmful.jsonl",
        harmful="harmful.jsonl",
    )
    assert run(words) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert "left out: 16 no refusal" in said
    assert "--defense-option against=safe" in said
    assert run([*words, "--defense-option", "against=safe"]) == 0
    assert curve(tmp_path / "none", "defense_term") == pytest.approx([0.0], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("moat", [], "--defense none or safeinstr or"),
        ("kl", ["--defense-option", "moat=1"], "a key of weight, on, batch"),
        ("kl", [], "no --defense-data; found one, which --defense kl does not read"),
        ("surgery", [], "--defense-harmful with rows for --defense surgery"),
    ],
)
def test_bad_input_is_named(thinker, data, tmp_path, capsys, name, flags, said):
    output = tmp_path / "x"
    assert run(command(thinker, data, output, name, *flags)) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not output.exists()
