"""The way to inspect_ai; the log itself is read back where inspect_ai is installed."""

import importlib.util
import json
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from holdfast.cli.app import run
from holdfast.data.chat.template import prompt_token_ids
from holdfast.evaluate.inspect_provider import Batcher
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.loading.causal import load
from holdfast.rollout.edits import read_edit
from holdfast.rollout.session import Session
from holdfast.rollout.settings import ModelSettings
from holdfast.study import Study

INSTALLED = importlib.util.find_spec("inspect_ai") is not None
ROOT = Path(__file__).parents[2]
GREEDY = Sampling(temperature=0, max_thinking=64, max_answer=32)


def needs_inspect(test):
    """Skip where inspect_ai is not installed; its own warnings are its own affair."""
    quiet = pytest.mark.filterwarnings("ignore")(test)
    return pytest.mark.skipif(not INSTALLED, reason="inspect_ai is not installed")(
        quiet
    )


@pytest.fixture(scope="module")
def study(thinker, world, tmp_path_factory):
    place = tmp_path_factory.mktemp("studies") / "exported"
    words = ["--suite", f"harmful={world[1]}", "--limit", "6", "--max-thinking", "64"]
    more = ["--max-answer", "32", "-o", str(place)]
    assert run(["evaluate", str(thinker), *words, *more]) == 0
    return place


@pytest.mark.skipif(INSTALLED, reason="inspect_ai is installed")
def test_without_inspect_the_next_step_is_said(study, capsys):
    assert run(["export", str(study)]) == 5
    assert "'.[inspect]'" in capsys.readouterr().err


@needs_inspect
def test_the_log_reads_back_with_every_answer_and_its_verdict(study):
    from inspect_ai.log import list_eval_logs, read_eval_log

    assert run(["export", str(study), "--to", "inspect"]) == 0
    [path] = (study / "inspect").iterdir()
    # What `inspect view` lists, and what it opens.
    [listed] = list_eval_logs(str(path.parent))
    assert (Path(listed.name).name, listed.task_id) == (path.name, "rules2")
    log = read_eval_log(str(path))
    assert log.status == "success"
    rows = Study.open(study).read_table("evaluation.parquet").to_pylist()
    said = {"complied": "C", "refused": "I", "partial": "P"}
    assert [
        (each.input, each.output.completion, score.value, score.explanation)
        for each in log.samples
        for score in each.scores.values()
    ] == [
        (
            row["prompt"],
            row["answer"],
            said.get(row["verdict"], row["verdict"]),
            row["reason"],
        )
        for row in rows
    ]
    [found] = log.results.scores
    shown = json.loads((study / "evaluation.json").read_text())["rows"][0]["figure"]
    assert found.metrics["attack_success"].value == shown["value"]
    assert found.metrics["attack_success_high"].value == shown["high"]


@needs_inspect
def test_a_user_of_inspect_runs_an_edited_model(thinker, tmp_path):
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.model import get_model
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate as answer

    heads = [[layer, head] for layer in range(2) for head in range(4)]
    edit = tmp_path / "edit.json"
    edit.write_text(json.dumps({"heads": heads, "factor": 0}))
    texts = [f"How do I paint {what}?" for what in ("a boat", "a car", "a tree")]
    task = Task(
        dataset=[Sample(input=text, target="brush") for text in texts],
        solver=answer(),
        scorer=includes(),
    )
    adapter = load(str(thinker))
    found = {}
    for name, changes in (("plain", {}), ("edited", {"edit": str(edit)})):
        # By its name alone: inspect_ai finds us by the entry point.
        model = get_model(
            f"holdfast/{thinker}", max_thinking=64, batch_size=3, **changes
        )
        [log] = eval(
            task,
            model=model,
            max_tokens=32,
            log_dir=str(tmp_path / name),
            display="none",
        )
        assert log.status == "success"
        found[name] = [each.output.completion for each in log.samples]
        prompts = [
            (prompt_token_ids(adapter.tokenizer, text, thinking=adapter.thinking), 0)
            for text in texts
        ]
        chosen = read_edit(str(edit), adapter).edit if changes else None
        [parts] = generate(adapter, prompts, GREEDY, edit=chosen)
        assert found[name] == [each.answer for each in parts]
    assert found["plain"] != found["edited"]


def test_the_entry_point_names_what_registers_us():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module = project["project"]["entry-points"]["inspect_ai"]["holdfast"]
    assert importlib.util.find_spec(module) is not None


def test_a_study_without_an_evaluation_cannot_be_exported(tmp_path, capsys):
    assert run(["export", str(tmp_path)]) == 2
    assert "study" in capsys.readouterr().err


def test_prompts_that_wait_together_are_decoded_together(thinker, monkeypatch):
    # Full batches do not wait for the deadline, however slow the machine is.
    monkeypatch.setattr(
        import_module("holdfast.evaluate.inspect_provider"), "WAIT", 600
    )
    batcher = Batcher(Session(str(thinker), ModelSettings()), batch_size=3)
    texts = [f"How do I paint {what}?" for what in ("a boat", "a car", "a tree")]
    waiting = [batcher.ask(text, None, GREEDY, 0) for text in texts]
    made = [each.result(timeout=600) for each in waiting]
    batcher.close()
    assert batcher.batches == [3]
    assert all("boat" not in each.thinking for each in made[1:])
    assert "boat" in made[0].thinking


def test_an_error_reaches_whoever_asked_and_the_thread_lives_on(thinker):
    batcher = Batcher(Session(str(thinker), ModelSettings()), batch_size=8)
    too_long = batcher.ask("a " * 400, None, GREEDY, 0)
    with pytest.raises(Exception, match="tokens"):
        too_long.result(timeout=600)
    assert batcher.ask("How do I paint a boat?", None, GREEDY, 0).result(timeout=600)
    batcher.close()
