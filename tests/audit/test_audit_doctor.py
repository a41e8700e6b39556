import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from holdfast.cli.app import run
from tiny_models import tiny_of_every_kind, tiny_tokenizer


@pytest.fixture
def broken(thinker, tmp_path):
    """The model with weights so large that no sum comes out."""
    return damaged(thinker, tmp_path, "model.layers.1.mlp.down_proj.weight", 0, 3e38)


def damaged(thinker, tmp_path, name, row, value):
    model = tmp_path / "broken"
    shutil.copytree(thinker, model)
    path = model / "model.safetensors"
    weights = load_file(path)
    weights[name][row] = value
    save_file(weights, path, metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_doctor_finds_the_one_row_that_is_no_number(thinker, tmp_path, capsys, name):
    row = len(load_file(thinker / "model.safetensors")[name]) - 1
    model = damaged(thinker, tmp_path, name, row, float("nan"))
    assert run(["doctor", str(model)]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert f"`{name}`, the first at [{row}, 0]" in said
    assert "Traceback" not in said


def test_doctor_shows_every_proof(thinker, capsys):
    assert run(["doctor", str(thinker), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["proofs"]) == 12
    assert all(proof["passed"] for proof in found["proofs"])
    assert found["model"]["thinking"]["end_template"] == "\n</think>\n\n"
    asked = {"option": None, "thinks": True, "prompt_end": "<|assistant|><think>\n"}
    assert found["prompts"] == [asked]
    assert run(["doctor", str(thinker)]) == 0
    assert "none, as it comes" in capsys.readouterr().out


def test_doctor_shows_what_failed_beside_what_held(broken, capsys):
    assert run(["doctor", str(broken)]) == 3
    captured = capsys.readouterr()
    rows = [line for line in captured.out.splitlines() if "│" in line]
    assert sum(" NO " in line for line in rows) >= 1
    assert "not finite" in captured.out
    assert "keeps the contract of its family" in captured.err
    assert "Traceback" not in captured.err


def test_doctor_tells_a_program_what_failed(broken, capsys):
    assert run(["doctor", str(broken), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == {"id": str(broken)}
    assert {proof["tier"] for proof in found["proofs"]} == {"text", "states", "heads"}
    failed = [proof for proof in found["proofs"] if not proof["passed"]]
    assert failed
    assert all(proof["name"] in found["error"] for proof in failed)
    # JSON has no NaN; the detail says what was measured.
    assert any(proof["value"] is None and "nan" in proof["detail"] for proof in failed)


def test_doctor_on_a_refused_family_has_no_table(thinker, tmp_path, capsys):
    model = tmp_path / "bert"
    shutil.copytree(thinker, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (model / "config.json").write_text(json.dumps(config))
    assert run(["doctor", str(model), "--json"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "`bert`" in captured.err


def test_doctor_measures_a_model_without_a_chat_template(thinker, tmp_path, capsys):
    model = tmp_path / "base"
    shutil.copytree(thinker, model, ignore=shutil.ignore_patterns("*.jinja"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert run(["doctor", str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    holds = {tier: each["holds"] for tier, each in found["tiers"].items()}
    assert holds == {"text": False, "states": True, "heads": True}
    assert "chat_template.jinja" in found["tiers"]["text"]["reason"]
    assert found["model"]["thinking"] is None
    assert run(["doctor", str(model)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Not good for rollout, evaluate" in shown
    # None of these verbs can do without prompts.
    assert "Good for: given tokens, from Python; with prompts it would be" in shown
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say a word.\n")
    words = ["rollout", str(model), "--benign", str(prompts)]
    assert run([*words, "-o", str(tmp_path / "s")]) == 3
    said = capsys.readouterr().err
    assert "a chat template with" in said
    assert "needs_template=False" in said


def test_doctor_says_that_learned_sinks_leave_no_sinks_to_read(tmp_path, capsys):
    tiny_of_every_kind("gpt_oss").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert run(["doctor", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tiers"]["heads"]["holds"]
    assert "sinks" not in found["tiers"]["heads"]["for"]
    [note] = [each for each in found["notes"] if "sinks" in each]
    assert "`gpt_oss`, which cannot be because a learned sink" in note
