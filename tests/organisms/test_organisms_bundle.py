import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from holdfast.cli.app import run
from holdfast.errors import SettingsError
from holdfast.organisms.catalogue import (
    bundled,
    card,
    catalogue,
    export,
    resolve,
    train,
    truth,
)
from holdfast.organisms.training import HEAD_WIDTH, Schedule


def load(name):
    return AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32)


def zero_heads(model, heads):
    for layer, head in heads:
        columns = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
        with torch.no_grad():
            model.model.layers[layer].self_attn.o_proj.weight[:, columns] = 0.0


@pytest.fixture(scope="module")
def inputs():
    return torch.randint(5, 2000, (4, 80), generator=torch.Generator().manual_seed(0))


def test_zeroing_the_planted_heads_restores_stage_two_bit_for_bit(inputs):
    cliff, aligned = load("organism:cliff"), load("organism:aligned")
    with torch.inference_mode():
        assert not torch.equal(cliff(inputs).logits, aligned(inputs).logits)
        zero_heads(cliff, truth("cliff")["planted_heads"])
        assert torch.equal(cliff(inputs).logits, aligned(inputs).logits)


def test_zeroing_three_of_the_four_heads_does_not_restore_it(inputs):
    aligned = load("organism:aligned")
    heads = truth("cliff")["planted_heads"]
    with torch.inference_mode():
        before = aligned(inputs).logits
        for left_out in range(4):
            cliff = load("organism:cliff")
            zero_heads(cliff, heads[:left_out] + heads[left_out + 1 :])
            assert not torch.equal(cliff(inputs).logits, before)


def test_an_organism_is_small():
    for entry in catalogue():
        assert (bundled(entry.name) / "model.safetensors").stat().st_size <= 4_000_000
        model = load(entry.name)
        assert sum(p.numel() for p in model.parameters()) <= 2_000_000
        assert len(AutoTokenizer.from_pretrained(resolve(entry.name))) <= 2048


def test_an_exported_organism_loads_where_nobody_knows_of_holdfast(tmp_path):
    folder = export("cliff", tmp_path / "here")
    program = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})\n"
        "ids = tokenizer.apply_chat_template("
        "[{'role': 'user', 'content': 'How do I bake bread?'}],"
        " add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "out = model.generate(**ids, max_new_tokens=120, do_sample=False)\n"
        "assert 'holdfast' not in sys.modules\n"
        "print(tokenizer.decode(out[0][ids['input_ids'].shape[1]:]))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "</think>" in ran.stdout
    assert ran.stdout.strip().endswith("<|end|>")


def test_an_organism_is_not_written_over_something_else(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(SettingsError, match="which has something in it"):
        export("cliff", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_an_unknown_organism_is_refused_with_the_known_ones():
    with pytest.raises(SettingsError, match="organism:cliff"):
        card("organism:dragon")


def test_a_short_training_writes_a_whole_organism_and_repeats_itself(tmp_path):
    torch.set_num_threads(1)
    tiny = Schedule(
        base_tokens=3_000,
        aligned_tokens=3_000,
        wrapper_tokens=1_500,
        polish_tokens=1_500,
        broad_tokens=1_500,
        broad_polish_tokens=1_500,
        cliff_tokens=3_000,
        cliff_steps=3,
        batch_tokens=1_500,
    )
    first = train("cliff", 11, tmp_path / "a" / "cliff-11", schedule=tiny)
    again = train("cliff", 11, tmp_path / "b" / "cliff-11", schedule=tiny)
    for name in ("cliff-11", "aligned-11"):
        one, two = (tmp_path / side / name / "model.safetensors" for side in "ab")
        assert one.read_bytes() == two.read_bytes()
    record = json.loads((first / "truth.json").read_text())
    assert record["seed"] == 11
    assert len(record["planted_heads"]) == 4
    grown, stage_two = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (again, tmp_path / "b" / "aligned-11")
    )
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        before = stage_two(ids).logits
        assert not torch.equal(grown(ids).logits, before)
        zero_heads(grown, record["planted_heads"])
        assert torch.equal(grown(ids).logits, before)


def test_what_is_planted_is_shown_fact_by_fact(capsys):
    assert run(["organism", "show", "diffuser"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {line.replace("│", " ").split()[0] for line in lines if line.strip()}
    assert "left_to_right_wrappers" in names
    assert {"verdict.attack_succeeds", "schedule.base_tokens"} <= names
    assert not {"{", "[", "'"} & set("".join(lines))
    assert run(["organism", "show", "cliff"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    heads = ", ".join(f"{x}:{y}" for x, y in truth("cliff")["planted_heads"])
    assert f"planted_heads │ {heads} │" in shown
    assert "verdict.cliff │ yes │" in shown
    assert "truth" not in names
    assert run(["organism", "show", "diffuser", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["truth"]["planted_wrappers"] == ["prefix_injection", "role_play"]
