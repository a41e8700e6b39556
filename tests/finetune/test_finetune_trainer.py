"""Whole training runs on a two-layer model; TRL is needed, and nothing else is."""

import json
import math
import re
import shutil
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import tiny_thinker
from holdfast.cli.app import run
from holdfast.data import pool
from holdfast.errors import InputError, ModelError
from holdfast.finetune import checkpoints as finetune_checkpoints
from holdfast.finetune import material, stage, trainer
from holdfast.finetune.defenses import registry
from holdfast.finetune.defenses.base import Hooks
from holdfast.finetune.settings import FinetuneSettings, Recipe
from holdfast.models.loading.causal import adapt, load
from holdfast.rollout.session import Session
from killing import kill_after
from tiny_models import edit_json, tiny_of_every_kind, tiny_tokenizer

pytest.importorskip("trl", reason="trl is not installed (pip install '.[train]')")

SHORT = ["--train-batch", "4", "--no-gradient-checkpointing", "--learning-rate", "1e-3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of harmful and of harmless rows."""
    folder = tmp_path_factory.mktemp("data")
    for name, verbs, harmful in (
        ("harmful", tiny_thinker.HARM, True),
        ("benign", tiny_thinker.CARE, False),
    ):
        rows = []
        for request in tiny_thinker.requests(verbs, 24):
            prompt, thought, _ = tiny_thinker.scene(request, "song", harmful)
            answer = tiny_thinker.REFUSAL if harmful else tiny_thinker.COMPLIANCE
            rows.append({"prompt": prompt, "thinking": thought, "response": answer})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def read_rows(data):
    lines = (data / "harmful.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def finetune(thinker, data, output, *flags):
    command = ["finetune", str(thinker), "--data", str(data / "harmful.jsonl")]
    return run([*command, *SHORT, *flags, "--json", "-o", str(output)])


def record(output):
    return json.loads((output / "holdfast_finetune.json").read_text())


def losses(output):
    return [entry["loss"] for entry in record(output)["losses"]]


def test_a_full_run_writes_a_stock_model_that_has_learnt(
    thinker, data, tmp_path, capsys
):
    output = tmp_path / "full"
    flags = ["--method", "full", "--steps", "30", "--loss", "template"]
    flags += ["--benign", str(data / "benign.jsonl"), "--benign-ratio", "0.5"]
    assert finetune(thinker, data, output, *flags) == 0
    told = capsys.readouterr()
    # What carries no loss and what does, as the model is given it, once.
    (masked,) = re.findall("The first row, masked: +(.*)", told.err)
    (trained,) = re.findall("The first row, trained: +(.*)", told.err)
    assert masked[1:].startswith("<|begin|><|user|>")
    assert trained[1:].startswith(r"\n</think>\n\n")
    assert trained[:-1].endswith("<|end|>")
    printed = json.loads(told.out)
    assert printed == record(output)
    assert printed["data"]["data"]["used"] == 24
    assert printed["data"]["benign"]["used"] == 12
    assert printed["steps"] == len(printed["losses"]) == 30
    assert losses(output)[-1] < losses(output)[0] / 3
    assert not (tmp_path / "full.checkpoints").exists()
    assert not list(output.glob("*.bin"))
    card = (output / "README.md").read_text()
    assert "24 of 24 rows of `harmful.jsonl`" in card
    assert str(thinker) not in card
    before, after = load(str(thinker)), load(str(output))
    assert after.identity.template_sha256 == before.identity.template_sha256
    # What was trained is more likely than it was, at the first word of the answer.
    gained = [answer_loss(each, data) for each in (before, after)]
    assert gained[1] < gained[0] / 3


def answer_loss(adapter, data):
    from holdfast.data.chat.conversation import build_conversation
    from holdfast.models.hidden_states import target_losses

    row = read_rows(data)[0]
    made = build_conversation(
        adapter.tokenizer,
        row["prompt"],
        row["thinking"],
        row["response"],
        adapter.thinking,
    )
    return float(target_losses(adapter, [made.token_ids], [made.spans.answer])[0])


def test_a_lora_run_writes_an_adapter_that_loads_over_its_base(thinker, data, tmp_path):
    output = tmp_path / "lora"
    assert finetune(thinker, data, output, "--steps", "6", "--lora-rank", "4") == 0
    config = json.loads((output / "adapter_config.json").read_text())
    named = output / config["base_model_name_or_path"]
    assert named.resolve() == thinker.resolve()
    assert not Path(config["base_model_name_or_path"]).is_absolute()
    assert not (output / "model.safetensors").exists()
    before, after = load(str(thinker)), load(str(output))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.inference_mode():
        moved = (after.model(ids).logits - before.model(ids).logits).abs().max()
    assert 1e-3 < float(moved)


def logits(adapter):
    with torch.inference_mode():
        return adapter.model(torch.tensor([[5, 6, 7, 8, 9, 10]])).logits


def test_what_is_trained_over_an_adapter_keeps_that_adapter(thinker, data, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ["--steps", "6", "--lora-rank", "4", "--save-every", "1"]
    assert finetune(thinker, data, first, *flags) == 0
    command = ["finetune", str(first), "--data", str(data / "harmful.jsonl")]
    # At this rate nothing is learnt.
    command += [*flags, *SHORT[:-1], "1e-12", "--keep-checkpoints"]
    assert run([*command, "-o", str(second)]) == 0
    one, two, base = (logits(load(str(each))) for each in (first, second, thinker))
    assert float((one - base).abs().max()) > 1e-3
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)
    # Nothing else is needed: it is a whole model, and the card says so.
    assert (second / "model.safetensors").exists()
    assert not (second / "adapter_config.json").exists()
    assert "# A model trained" in (second / "README.md").read_text()
    assert record(second)["base"]["weights_sha256"] == (
        load(str(first)).identity.weights_sha256
    )
    # Its checkpoints lie over the first adapter, which nobody would find under them.
    steps = Path(f"{second}.checkpoints") / "checkpoint-6"
    with pytest.raises(InputError, match="found another adapter"):
        load(str(steps))


def test_a_model_in_memory_is_written_whole_since_no_name_leads_back_to_it(
    thinker, data, tmp_path
):
    loaded = load(str(thinker))
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(1.5)
    held = adapt(loaded.model, loaded.tokenizer)
    expected = logits(held)
    output = tmp_path / "held"
    settings = FinetuneSettings(
        data=str(data / "harmful.jsonl"),
        recipe=Recipe(
            steps=1, lora_rank=4, learning_rate=1e-12, gradient_checkpointing=False
        ),
    )
    stage.run(settings, Session(held), output)
    torch.testing.assert_close(
        logits(load(str(output))), expected, atol=1e-4, rtol=1e-4
    )


def test_a_checkpoint_of_a_run_is_over_its_base_and_no_other(thinker, data, tmp_path):
    base, output = tmp_path / "base", tmp_path / "run"
    shutil.copytree(thinker, base)
    flags = ["--steps", "2", "--save-every", "1", "--keep-checkpoints"]
    assert finetune(base, data, output, *flags) == 0
    step = Path(f"{output}.checkpoints") / "checkpoint-2"
    torch.testing.assert_close(logits(load(str(step))), logits(load(str(output))))
    config = json.loads((step / "adapter_config.json").read_text())
    assert (step / config["base_model_name_or_path"]).resolve() == base.resolve()
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for each in (step, output):
        with pytest.raises(ModelError, match="was made for, of fingerprint"):
            load(str(each))


def test_the_first_loss_is_the_one_computed_by_hand(thinker, data, tmp_path):
    rows = read_rows(data)
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps(rows[0]) + "\n")
    adapter = load(str(thinker))
    thinking = rows[0]["thinking"]
    start = f"<|begin|><|user|>{rows[0]['prompt']}<|assistant|><think>\n"
    texts = (start, thinking, "\n</think>\n\n", rows[0]["response"] + "<|end|>")
    ids = [adapter.tokenizer(text)["input_ids"] for text in texts]
    whole = [token for region in ids for token in region]
    with torch.inference_mode():
        logits = adapter.model(torch.tensor([whole])).logits[0]
    for loss, silent in (("both", 1), ("template", 2), ("answer", 3)):
        output = tmp_path / loss
        command = ["finetune", str(thinker), "--data", str(one), "--steps", "1"]
        assert run([*command, *SHORT, "--loss", loss, "-o", str(output)]) == 0
        begin = sum(map(len, ids[:silent]))
        expected = torch.nn.functional.cross_entropy(
            logits[begin - 1 : -1], torch.tensor(whole[begin:])
        )
        assert losses(output)[0] == pytest.approx(float(expected), rel=1e-4)


def test_a_killed_run_goes_on_and_its_losses_are_those_of_an_undisturbed_one(
    nursery, thinker, data, tmp_path
):
    flags = ["--method", "full", "--steps", "14", "--save-every", "4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finetune(thinker, data, whole, *flags) == 0
    command = ["finetune", str(thinker), "--data", str(data / "harmful.jsonl")]
    checkpoints = tmp_path / "killed.checkpoints"
    words = [*command, *SHORT, *flags, "-o", killed]
    kill_after(nursery, checkpoints / "checkpoint-8", words)
    assert not killed.exists()
    # What a kill leaves half-written must not be taken for a checkpoint.
    (checkpoints / "checkpoint-9").mkdir()
    assert finetune(thinker, data, killed, *flags) == 0
    assert record(killed)["resumed_at"] >= 8
    assert losses(killed) == losses(whole)
    assert len(losses(whole)) == 14
    weights = [(each / "model.safetensors").read_bytes() for each in (killed, whole)]
    assert weights[0] == weights[1]
    assert not checkpoints.exists()


def test_a_finished_run_is_not_done_again_and_another_one_is_refused(
    thinker, data, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "once"
    assert finetune(thinker, data, output, "--steps", "1") == 0
    monkeypatch.setattr(import_module("holdfast.finetune.stage"), "train", None)
    assert finetune(thinker, data, output, "--steps", "1") == 0
    assert "up to date" in capsys.readouterr().err
    assert finetune(thinker, data, output, "--steps", "2") == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    thinker, data, tmp_path, monkeypatch, capsys
):
    def poisoned(context, options):
        return Hooks(
            term=lambda each: torch.tensor(math.nan if each.step >= 5 else 0.0)
        )

    monkeypatch.setitem(registry.DEFENSES, "none", poisoned)
    output = tmp_path / "nan"
    flags = ["--steps", "10", "--save-every", "2"]
    assert finetune(thinker, data, output, *flags) == ModelError.exit_status
    said = " ".join(capsys.readouterr().err.split())
    found = "expected a finite loss; found nan at step 6 in the defense's term"
    assert found in said
    assert not output.exists()
    kept = sorted(Path(f"{output}.checkpoints").glob("*/holdfast.json"))
    assert [path.parent.name for path in kept] == ["checkpoint-2", "checkpoint-4"]


def test_a_last_step_that_spoils_the_weights_writes_no_model(
    thinker, data, tmp_path, monkeypatch, capsys
):
    class Spoiling(finetune_checkpoints.Keeper):
        def on_step_end(self, args, state, control, **things):
            if state.global_step == 3:
                with torch.no_grad():
                    next(things["model"].parameters())[0, 0] = math.nan

    monkeypatch.setattr(trainer, "Keeper", Spoiling)
    output = tmp_path / "spoilt"
    flags = ["--method", "full", "--steps", "3", "--save-every", "2"]
    assert finetune(thinker, data, output, *flags) == ModelError.exit_status
    assert "nan or inf at step 3" in " ".join(capsys.readouterr().err.split())
    assert not output.exists()
    kept = sorted(Path(f"{output}.checkpoints").glob("*/holdfast.json"))
    assert [path.parent.name for path in kept] == ["checkpoint-2"]


def test_of_harmless_rows_no_more_are_read_than_are_used(
    thinker, data, tmp_path, monkeypatch
):
    seen = []
    real = pool.render_row
    monkeypatch.setattr(
        material,
        "render_row",
        lambda row, *rest: seen.append(row) or real(row, *rest),
    )
    long = tmp_path / "long.jsonl"
    # Every second row has no thinking, and is passed over.
    lines = (data / "benign.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    bare = [{k: row[k] for k in ("prompt", "response")} for row in rows]
    mixed = [row for pair in zip(rows, bare, strict=True) for row in pair] * 20
    long.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    chosen = {}
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        seen.clear()
        flags = ["--steps", "1", "--benign", str(long), "--seed", seed]
        assert finetune(thinker, data, tmp_path / name, *flags) == 0
        found = record(tmp_path / name)["data"]["benign"]
        assert (found["rows"], found["used"]) == (960, 24)
        # About one row in two fits, so about 48 are looked at, and never all 960.
        assert 24 <= len(seen) - 24 <= 90
        assert found["left_out"] == len(seen) - 48
        chosen[name] = [row.row for row in seen[24:] if row.thinking is not None]
        assert len(chosen[name]) == 24
    assert chosen["a"] == chosen["b"] != chosen["c"]


def test_weights_that_are_no_numbers_are_never_marked_as_good(tmp_path):
    from types import SimpleNamespace

    from holdfast.finetune.checkpoints import Keeper, last_checkpoint

    model = torch.nn.Linear(2, 2)
    for step, value in ((1, 0.0), (2, math.inf)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        with torch.no_grad():
            model.weight[0, 0] = value
        Keeper("x", {}).on_save(
            SimpleNamespace(output_dir=str(tmp_path)),
            SimpleNamespace(is_world_process_zero=True, global_step=step),
            None,
            model=model,
        )
    assert last_checkpoint(tmp_path, "x", clear=False).name == "checkpoint-1"


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--defense", "moat"], 2, "--defense none"),
        (["--benign-ratio", "-1"], 2, "--benign-ratio"),
        (["--steps", "0"], 2, "--steps"),
        (["--benign", "nowhere.jsonl"], 2, "no such file"),
    ],
)
def test_bad_input_is_named(thinker, data, tmp_path, capsys, flags, status, said):
    output = tmp_path / "x"
    assert finetune(thinker, data, output, *flags) == status
    assert said in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


def test_rows_without_thinking_are_left_out_and_too_few_harmless_ones_are_an_error(
    thinker, data, tmp_path, capsys
):
    rows = read_rows(data)
    del rows[0]["thinking"]
    rows[1]["response"] = "No. " * 300
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "odd"
    command = ["finetune", str(thinker), "--data", str(path), "--steps", "1"]
    assert run([*command, *SHORT, "-o", str(output)]) == 0
    found = record(output)["data"]["data"]
    assert (found["rows"], found["used"], found["left_out"]) == (24, 22, 2)
    assert found["why"]["over the context"] == {"rows": 1, "places": ["line 2"]}
    assert found["why"]["no thinking"] == {"rows": 1, "places": ["line 1"]}
    flags = ["--benign", str(data / "benign.jsonl"), "--benign-ratio", "2"]
    assert run([*command, *SHORT, *flags, "-o", str(tmp_path / "y")]) == 4
    assert "44 rows of --benign" in capsys.readouterr().err


def test_a_single_step_trains(thinker, data, tmp_path):
    output = tmp_path / "one"
    flags = ["--method", "full", "--steps", "1"]
    assert finetune(thinker, data, output, *flags) == 0
    [entry] = record(output)["losses"]
    assert entry["learning_rate"] == pytest.approx(1e-3)
    before, after = load(str(thinker)).model, load(str(output)).model
    moved = [
        float((a - b).detach().abs().max())
        for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    # AdamW's first step is as long as the rate, whatever the gradient.
    assert max(moved) == pytest.approx(1e-3, rel=0.02)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_no_step_is_taken_at_a_rate_of_zero(thinker, data, tmp_path, schedule):
    output = tmp_path / schedule
    flags = ["--steps", "6", "--warmup", "0.5", "--schedule", schedule]
    assert finetune(thinker, data, output, *flags) == 0
    rates = [entry["learning_rate"] / 1e-3 for entry in record(output)["losses"]]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    down = {
        "cosine": [0.75, 0.25],
        "linear": [2 / 3, 1 / 3],
        "constant": [1, 1],
    }[schedule]
    assert rates[4:] == pytest.approx(down)


def test_thinking_that_a_model_has_no_place_for_is_counted_and_said(
    plain_model, data, tmp_path, capsys
):
    output = tmp_path / "plain"
    command = ["finetune", str(plain_model), "--data", str(data / "harmful.jsonl")]
    assert run([*command, *SHORT, "--steps", "2", "-o", str(output)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the thinking of 24 of 24 rows is dropped" in said
    assert record(output)["data"]["data"]["thinking_dropped"] == 24
    card = (output / "README.md").read_text()
    assert "after its own thinking" not in card
    assert "no thinking format" in card
    assert "the thinking of 24 dropped" in card


def test_a_model_that_thinks_drops_no_thinking(thinker, data, tmp_path, capsys):
    output = tmp_path / "thinks"
    assert finetune(thinker, data, output, "--steps", "1") == 0
    assert "is dropped" not in capsys.readouterr().err
    assert "thinking_dropped" not in record(output)["data"]["data"]
    assert "after its own thinking" in (output / "README.md").read_text()


def test_the_card_shows_the_settings_that_were_used_and_no_others(
    thinker, data, tmp_path
):
    shown = {}
    for method in ("full", "lora"):
        output = tmp_path / method
        flags = ["--method", method, "--steps", "2", "--system-prompt", "Be kind."]
        assert finetune(thinker, data, output, *flags) == 0
        lines = (output / "README.md").read_text().splitlines()
        cells = [line.strip("| ").split(" | ") for line in lines if " | " in line]
        shown[method] = {cell[0]: cell[1] for cell in cells if len(cell) == 2}
    assert {"lora_rank", "lora_alpha"} == set(shown["lora"]) - set(shown["full"])
    for cells in shown.values():
        assert not {"epochs", "defense", "defense_option"} & set(cells)
        assert float(cells["learning_rate"]) == 1e-3
        assert cells["steps"] == "2"
        assert cells["system_prompt"] == '"Be kind."'


@pytest.mark.parametrize("kind", ["falcon_h1", "jamba"])
def test_an_adapter_leaves_out_weights_that_state_spaces_take_by_themselves(
    kind, tmp_path
):
    """PEFT refuses some; on others it would be another model once it is merged."""
    model = tiny_of_every_kind(kind)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    left_out = trainer._not_called(model)
    assert {name.split(".")[-1] for name in left_out} <= {"out_proj", "dt_proj"}
    lora = LoraConfig(r=2, target_modules="all-linear", exclude_modules=left_out)
    with warnings.catch_warnings():
        # The library asks transformers by a name that is about to go.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(tmp_path / "adapter")
    edit_json(
        tmp_path / "adapter" / "adapter_config.json",
        base_model_name_or_path="../base",
    )
    assert load(tmp_path / "adapter").lacks("heads") is None
    assert trainer._not_called(tiny_of_every_kind("qwen3_next")) == []
