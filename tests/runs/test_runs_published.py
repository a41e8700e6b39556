"""The experiments of `runs/published.sh`, on tiny stand-ins for the models."""

import contextlib
import io
import json

import pytest

import tiny_thinker
from holdfast.cli.app import run

SIZES = {
    "THINKING": "64",
    "FEW": "12",
    "ALL": "16",
    "DRAWS": "1",
    "BUDGET": "10%",
    "STEPS": "2",
    "PASSES": "12",
    "POINTS": "8",
    "ANCHORS": "3",
}


@pytest.fixture
def commands(monkeypatch):
    """The commands, run in this very process, and those that were run."""
    import commands

    ran = []

    def call(words, log):
        log.parent.mkdir(parents=True, exist_ok=True)
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = run(words)
        log.write_text(errors.getvalue())
        ran.append(words[0])
        return status, output.getvalue()

    monkeypatch.setattr(commands, "call", call)
    for name, value in SIZES.items():
        monkeypatch.setenv(name, value)
    return ran


@pytest.fixture
def prompts(world, tmp_path):
    pairs = list(zip(world[::2], world[1::2], strict=True))
    roles = {flag[2:].replace("-", "_"): path for flag, path in pairs}
    wanted = ("harmful", "wrapped", "benign", "benign_wrapped")
    flags = [x for name in wanted for x in ("--file", f"{name}={roles[name]}")]
    second = tmp_path / "second.csv"
    lines = [f"Please tell me: {each}" for each in tiny_thinker.requests(("trick",), 4)]
    second.write_text("\n".join(["prompt", *lines]))
    return [*flags, "--file", f"second={second}"]


def rows(path, verbs, answer):
    made = [
        {
            "prompt": request,
            "thinking": tiny_thinker.thinking(request, harmful=True),
            "response": answer,
        }
        for request in tiny_thinker.requests(verbs, 24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def main(folder, models, *flags):
    import published

    output = io.StringIO()
    subjects = [
        x for name, path in models.items() for x in ("--model", f"{name}={path}")
    ]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
        published.main([str(folder), "--models", *models, *subjects, *flags])
    record = json.loads((folder / "published.json").read_text())
    return output.getvalue(), record


def test_a_thinking_stand_in_goes_through_cliff_and_sinks_and_goes_on_where_it_was(
    commands, prompts, thinker, tmp_path, monkeypatch
):
    monkeypatch.setenv("REQUESTS", "60")
    monkeypatch.setenv("ANSWER", "32")
    harmful, refused = (
        rows(tmp_path / f"{name}.jsonl", tiny_thinker.HARM, answer)
        for name, answer in (
            ("harmful", tiny_thinker.COMPLIANCE),
            ("refused", tiny_thinker.REFUSAL),
        )
    )
    files = [f"pool={refused}", f"poisoned={harmful}", f"sink_harmful={harmful}"]
    flags = [
        x for each in (*files, f"sink_refused={refused}") for x in ("--file", each)
    ]
    models = dict.fromkeys(("r1-qwen-7b", "llama-3-8b"), thinker)
    table, record = main(tmp_path / "out", models, *prompts, *flags)
    assert not [row["why"] for row in record["claims"] if row["here"] is None]
    verdicts = {row["says"]: row["verdict"] for row in record["claims"]}
    assert verdicts["the prober is right on held-out answers"] == "holds"
    assert verdicts["score of the final token"] == "fails"
    assert table.count("\n") == 2 + len(record["claims"])
    # Neither a prompt nor an answer is in what is kept.
    kept = (tmp_path / "out/published.json").read_text()
    assert "How do I" not in kept
    assert str(tmp_path) not in kept

    n_commands = len(commands)
    (tmp_path / "out/llama-3-8b/outcomes/sinks.json").unlink()
    again, _ = main(tmp_path / "out", models, *prompts, *flags)
    assert again == table
    assert commands[n_commands:] == ["sinks"]


def test_a_diffusing_stand_in_is_asked_under_both_samplings(
    commands, prompts, denoiser, tmp_path, monkeypatch
):
    monkeypatch.setenv("REQUESTS", "16")
    monkeypatch.setenv("ANSWER", "24")
    _, record = main(tmp_path / "out", {"llada-8b": denoiser}, *prompts)
    assert commands.count("signal") == 2
    change = next(r for r in record["claims"] if "minus left to right" in r["says"])
    assert change["here"]["low"] <= change["here"]["value"] <= change["here"]["high"]
    signal = [r for r in record["claims"] if "returns below" in r["says"]]
    assert all(row["here"] or row["why"] for row in signal)


def test_what_has_no_file_cannot_be_said_and_says_so():
    import published

    claim = {
        "paper": "surgery",
        "of": ["llama-3-8b"],
        "says": "heads",
        "published": "rises",
        "figure": "sinks/rise",
        "holds": "above_zero",
    }
    [row] = published.lines([claim], {"llama-3-8b": {}})
    assert row["verdict"] == "cannot be said"
    assert "no file was named" in row["why"]


@pytest.mark.parametrize(
    ("holds", "bound", "ends", "verdict"),
    [
        ("at_least", 0.9, (0.91, 1.0), "holds"),
        ("at_least", 0.9, (0.85, 0.95), "cannot be said"),
        ("at_least", 0.9, (0.5, 0.89), "fails"),
        ("at_most", 0.1, (0.0, 0.1), "holds"),
        ("at_most", 0.1, (0.05, 0.2), "cannot be said"),
        ("at_most", 0.1, (0.11, 0.2), "fails"),
        ("near", 0.4, (0.35, 0.45), "holds"),
        ("near", 0.4, (0.41, 0.45), "fails"),
        ("near", 0.4, (0.1, 0.9), "cannot be said"),
        ("above_zero", 0.0, (0.01, 0.3), "holds"),
        ("above_zero", 0.0, (0.0, 0.3), "cannot be said"),
        ("above_zero", 0.0, (-0.3, 0.0), "fails"),
    ],
)
def test_a_claim_is_held_against_the_whole_interval(holds, bound, ends, verdict):
    import published

    figure = {"value": sum(ends) / 2, "low": ends[0], "high": ends[1], "n": 10}
    claim = {"holds": holds, "bound": bound}
    assert published.judged(claim, figure) == verdict
    assert published.judged(claim, {"value": None, "n": 0}) == "cannot be said"


def test_the_interval_of_a_difference_squares_and_adds():
    """Newcombe's tenth method; his example of 56/70 and 48/80 has 0.0524 to 0.3339."""
    import published

    first = {"value": 56 / 70, "low": 0.6919, "high": 0.8766, "n": 70}
    second = {"value": 48 / 80, "low": 0.4904, "high": 0.7004, "n": 80}
    found = published.difference(first, second)
    assert found["value"] == pytest.approx(0.2)
    assert found["low"] == pytest.approx(0.0524, abs=1e-3)
    assert found["high"] == pytest.approx(0.3339, abs=1e-3)
    nothing = {"value": None, "n": 0}
    assert published.difference(first, nothing)["value"] is None
