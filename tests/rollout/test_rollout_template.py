"""What a chat template does to a run: a date, a switch, the end of a turn, its tags."""

import datetime
import json
import re
import shutil

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

import holdfast
import tiny_thinker
from holdfast.cli.app import run
from holdfast.data.chat import rendering
from holdfast.data.chat.rendering import Rendering
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.loading.causal import load
from holdfast.rollout.questions import answer_notes

DATED = (
    "{{ '<|begin|>' }}{% set day = strftime_now('%d %B %Y') %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SWITCHED = tiny_thinker.NO_THINKING.replace(
    "{{ '<|assistant|>' }}",
    "{{ '<|assistant|>' }}{% if enable_thinking %}{{ '<think>\\n' }}{% endif %}",
)


def under(model, folder, template, **settings):
    """Copy a model and give it another chat template."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    for name, changes in settings.items():
        path = folder / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | changes))
    return folder


@pytest.fixture
def asked(tmp_path):
    """Two harmful and two harmless requests, as flags."""
    flags = []
    for role, verb in (("harmful", "steal"), ("benign", "paint")):
        path = tmp_path / f"{role}.txt"
        path.write_text(f"How do I {verb} a boat?\nHow do I {verb} a car?\n")
        flags += [f"--{role}", str(path)]
    return [*flags, "--limit", "2", "--max-thinking", "8", "--max-answer", "4"]


class Tomorrow(datetime.date):
    @classmethod
    def today(cls):
        return cls(2031, 5, 17)


def test_a_date_is_frozen_at_the_first_render(
    thinker, asked, tmp_path, monkeypatch, capsys
):
    template = DATED.replace("{% for", "Today is {{ day }}. {% for")
    model = under(thinker, tmp_path / "dated", template)
    study = tmp_path / "study"
    command = ["rollout", str(model), *asked, "-o", str(study)]
    assert run([*command, "--date", "2024-02-29"]) == 0
    assert "It is told 2024-02-29" in capsys.readouterr().err
    manifest = json.loads((study / "study.json").read_text())
    assert manifest["model"]["rendering"] == {"options": {}, "date": "2024-02-29"}
    first = pq.read_table(study / "rollouts.parquet").to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(model)
    said = {tokenizer.decode(row["token_ids"][:40]) for row in first}
    assert all("Today is 29 February 2024." in text for text in said)
    # On another day the study keeps its own, and is up to date.
    monkeypatch.setattr(rendering.datetime, "date", Tomorrow)
    assert run(command) == 0
    assert "up to date" in capsys.readouterr().err
    other = tmp_path / "other"
    assert run([*command[:-1], str(other)]) == 0
    manifest = json.loads((other / "study.json").read_text())
    assert manifest["model"]["rendering"]["date"] == "2031-05-17"
    # Another day is another key.
    assert run([*command, "--date", "2024-03-01"]) == 0
    assert "done anew" in capsys.readouterr().err


def test_a_day_that_is_none_is_refused_before_anything_is_loaded(thinker, capsys):
    assert run(["doctor", str(thinker), "--date", "29.2.2024"]) == 2
    assert "YYYY-MM-DD" in capsys.readouterr().err


def test_thinking_is_switched_in_every_verb_and_kept(thinker, asked, tmp_path, capsys):
    model = under(thinker, tmp_path / "switched", SWITCHED)
    found = {}
    for flags in (
        (),
        ("--thinking", "required"),
        ("--template-option", "enable_thinking=true"),
        ("--thinking", "off"),
    ):
        assert run(["doctor", str(model), "--json", *flags]) == 0
        found[flags] = json.loads(capsys.readouterr().out)["model"]
    bare, required, option, off = found.values()
    assert bare["thinking"] is None
    assert bare == off
    assert required == option
    assert required["rendering"]["options"] == {"enable_thinking": True}
    assert required["thinking"]["opened_by_template"]
    study = tmp_path / "study"
    flags = ("--thinking", "required", "-o", str(study))
    assert run(["rollout", str(model), *asked, *flags]) == 0
    assert holdfast.Session.of(
        holdfast.Study.open(study), holdfast.ModelSettings()
    ).model_record() == required | {"id": str(model)}


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (("--thinking", "off"), 3, "--max-thinking 0"),
        (("--template-option", "enable_thinking=false"), 2, "enable_thinking"),
        (("--template-option", "nothing"), 2, "NAME=VALUE"),
        (("--thinking-tags", "<think>", ""), 2, "OPEN CLOSE"),
    ],
)
def test_what_cannot_be_rendered_is_refused(thinker, capsys, flags, status, says):
    assert run(["doctor", str(thinker), *flags]) == status
    assert says in capsys.readouterr().err


def test_a_model_in_memory_is_rendered_as_its_tokenizer_says(thinker):
    adapter = load(thinker, rendering=Rendering(date="2024-02-29"))
    with pytest.raises(holdfast.HoldfastError, match="configure"):
        holdfast.Session(adapter, holdfast.ModelSettings(thinking="off"))


@pytest.fixture
def running_on(thinker, tmp_path):
    """A model whose template ends turns with a token that nothing else names."""
    folder = under(
        thinker,
        tmp_path / "running",
        tiny_thinker.TEMPLATE,
        config={"eos_token_id": 0},
        generation_config={"eos_token_id": 0},
        tokenizer_config={"eos_token": "<|pad|>"},
    )
    for path in folder.glob("special_tokens_map.json"):
        path.unlink()
    return folder


def test_answers_stop_where_the_template_ends_a_turn(running_on, thinker, capsys):
    adapter, usual = load(running_on), load(thinker)
    assert adapter.tokenizer.eos_token == "<|pad|>"
    assert adapter.stop_ids == {0, 2}
    prompt = "<|begin|><|user|>How do I paint a boat?<|assistant|><think>\n"
    sampling = Sampling(temperature=0, max_thinking=64, max_answer=48)
    rows = [
        next(iter(generate(each, [(prompt, 0)], sampling)))[0]
        for each in (adapter, usual)
    ]
    assert [row.finish for row in rows] == ["stop", "stop"]
    assert rows[0].token_ids == rows[1].token_ids
    assert run(["doctor", str(running_on), "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert len(notes) == 1
    assert "ends a turn with `<|end|>`" in notes[0]
    assert run(["doctor", str(thinker), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


def test_a_template_that_fails_on_render_is_one_line(thinker, tmp_path, capsys):
    model = under(thinker, tmp_path / "zero", "{{ 1 // 0 }}" + tiny_thinker.TEMPLATE)
    assert run(["rollout", str(model), "-o", str(tmp_path / "study")]) == 2
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said
    assert "Traceback" not in said


def test_answers_in_tags_of_another_format_are_warned_of(
    thinker, asked, tmp_path, capsys
):
    # Taught behind `<think>`, and asked without it, the model writes the tag itself.
    opens = "'<|assistant|>' }}"
    assert opens in tiny_thinker.NO_THINKING
    model = under(
        thinker,
        tmp_path / "bare",
        tiny_thinker.NO_THINKING.replace(opens, "'<|assistant|>[NOTES]' }}"),
    )
    adapter = load(model)
    assert adapter.thinking is None
    (note,) = answer_notes(adapter, ["<think>\nThe user", "Sure."])
    assert note.startswith("1 of 2 answers begin with `<think>`")
    assert "--thinking-tags OPEN CLOSE" in note
    tags = ("--thinking-tags", "[NOTES]", "[/NOTES]")
    assert run(["doctor", str(model), "--json", *tags]) == 0
    thinking = json.loads(capsys.readouterr().out)["model"]["thinking"]
    assert (thinking["open"], thinking["end_template"]) == ("[NOTES]", "[/NOTES]")
    assert thinking["opened_by_template"]


def test_the_warning_stands_in_the_study(thinker, asked, tmp_path, capsys):
    model = under(thinker, tmp_path / "plan", tiny_thinker.NO_THINKING)
    path = tmp_path / "made.jsonl"
    rows = [
        {"prompt": f"How do I paint a {thing}?", "completion": "<plan>Hm.</plan> Sure."}
        for thing in ("boat", "car", "gate")
    ]
    path.write_text(
        "".join(json.dumps(row | {"label": "benign"}) + "\n" for row in rows)
    )
    study = tmp_path / "study"
    assert run(["rollout", str(model), "--import", str(path), "-o", str(study)]) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "3 of 3 answers begin with `<plan>`" in said
    assert run(["report", str(study)]) == 0
    limits = json.loads((study / "report.json").read_text())["limits"]
    assert any("`<plan>`" in limit for limit in limits)
    tags = ("--thinking-tags", "<plan>", "</plan>")
    other = str(tmp_path / "other")
    assert run(["rollout", str(model), "--import", str(path), "-o", other, *tags]) == 0
    assert "answers begin" not in capsys.readouterr().err
    found = pq.read_table(f"{other}/rollouts.parquet").to_pylist()
    assert {row["thinking"] for row in found} == {"Hm."}
    assert {row["answer"] for row in found} == {" Sure."}


def test_answers_that_are_thinking_are_refused(thinker, asked, tmp_path, capsys):
    model = under(thinker, tmp_path / "bare", tiny_thinker.NO_THINKING)
    path = tmp_path / "made.jsonl"
    thought = "<think>Hm.</think>Sure."
    rows = [
        {"prompt": f"How do I paint a {thing}?", "completion": text, "label": "benign"}
        for thing, text in (("boat", thought), ("car", thought), ("gate", "Sure."))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    into = ["-o", str(tmp_path / "study")]
    assert run(["rollout", str(model), "--import", str(path), *into]) == 3
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "2 of 3 that begin with `<think>`" in said
    assert "--thinking-tags '<think>' '</think>'" in said
