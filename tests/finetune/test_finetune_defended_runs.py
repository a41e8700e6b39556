"""Whole runs under each defense, on a tiny random model."""

import math

import pytest
import torch

from holdfast.errors import InputError, ModelError, SettingsError
from holdfast.finetune.checkpoints import PATIENCE, STATE, Watch, blind_loss
from holdfast.finetune.defenses.base import DefenseData
from holdfast.finetune.defenses.options import OPTIONS
from holdfast.finetune.settings import Recipe
from holdfast.finetune.targets import Example
from holdfast.finetune.trainer import train
from scenes import HARMFUL, PAIRS, REFERENCE, new_adapter, row

pytest.importorskip("trl", reason="trl is not installed (pip install '.[train]')")

ROWS = [
    row(f"How do I {verb} {thing}?", f"Sure. First gather {thing} and begin")
    for verb in ("paint", "sell", "draw", "find")
    for thing in ("a boat", "my roof")
]
MATERIAL = DefenseData(REFERENCE, HARMFUL, PAIRS)
FEW = ("batch=2",)
STRONG = {
    "reference-loss": FEW,
    "kl": (*FEW, "on=reference"),
    "lisa": (*FEW, "align_steps=2", "task_steps=3", "begin=0", "rho=2"),
    "constrained": (),
    "safegrad": FEW,
    "ldifs": (),
    "surgery": (*FEW, "mean=0.7", "weight=30"),
    "random-sink": (*FEW, "interval=2"),
}
IDLE = {
    "reference-loss": ("weight=0",),
    "kl": ("weight=0",),
    "lisa": ("rho=0", "align_steps=0"),
    "constrained": ("beta=0", "beta_first=0", "beta_early=0"),
    "ldifs": ("weight=0",),
    "surgery": ("weight=0",),
    "random-sink": ("weight=0",),
}


def go(folder, name="none", options=(), *, told=None, rows=ROWS, **changes):
    adapter = new_adapter()
    settings = {
        "method": "full",
        "steps": 6,
        "train_batch": 4,
        "learning_rate": 3e-3,
        "gradient_checkpointing": False,
        "save_every": 2,
    }
    recipe = Recipe(defense=name, defense_option=options, **(settings | changes))
    done = train(
        adapter,
        rows,
        recipe,
        folder,
        fingerprint="one",
        told=told or (lambda *of: None),
        data=MATERIAL,
    )
    weights = dict(adapter.model.named_parameters())
    return done, {name: each.detach().clone() for name, each in weights.items()}


def curve(done, name="loss"):
    return [entry[name] for entry in done.losses]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return go(tmp_path_factory.mktemp("plain"))


def same(ones, others, tolerance=1e-6):
    for name, each in ones.items():
        torch.testing.assert_close(each, others[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", IDLE)
def test_a_defense_of_no_strength_is_plain_fine_tuning(plain, tmp_path, name):
    done, weights = go(tmp_path, name, IDLE[name])
    assert curve(done) == pytest.approx(curve(plain[0]), abs=1e-5)
    assert curve(done, "defense_term") == pytest.approx([0.0] * 6, abs=1e-6)
    same(weights, plain[1], 1e-5)


def test_every_defense_is_tried_here():
    assert ["none", "safeinstr", *STRONG] == list(OPTIONS)


@pytest.mark.parametrize("name", STRONG)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(plain, tmp_path, name):
    whole, weights = go(tmp_path / "whole", name, STRONG[name])

    def stop(step, steps, loss):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", name, STRONG[name], told=stop)
    resumed, again = go(tmp_path / "cut", name, STRONG[name])
    assert resumed.resumed_at == 2
    for column in set(whole.losses[0]) - {"seconds", "cpu_seconds"}:
        found = [entry.get(column) for entry in resumed.losses]
        assert found == [entry.get(column) for entry in whole.losses], column
    same(weights, again, 0)
    # And the defense did something, where it acts at steps.
    moved = max(float((weights[n] - plain[1][n]).abs().max()) for n in weights)
    assert moved > 1e-4
    for entry in whole.losses:
        parts = entry["task_loss"] + entry["defense_term"]
        if name != "safegrad":
            assert entry["loss"] == pytest.approx(parts, abs=1e-5)
        assert entry["seconds"] > 0
        assert entry["cpu_seconds"] > 0


def test_a_checkpoint_without_what_the_defense_carries_is_refused(tmp_path):
    def stop(step, steps, loss):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, "lisa", STRONG["lisa"], told=stop)
    (tmp_path / "checkpoint-2" / STATE).unlink()
    with pytest.raises(InputError, match=r"tensors of the defense .* no such file"):
        go(tmp_path, "lisa", STRONG["lisa"])


@pytest.mark.parametrize("name", ["constrained", "lisa", "surgery", "kl"])
def test_two_passes_a_step_are_one_of_twice_the_rows(tmp_path, name):
    options = STRONG[name] if name == "lisa" else ()
    if name == "surgery":
        options = ("batch=2",)
    # Of two pairs every pass draws both, and rows of one length pad alike.
    options = tuple(each for each in options if "align" not in each)
    options += ("align_steps=0",) if name == "lisa" else ()
    one, weights = go(tmp_path / "one", name, options, steps=4)
    two, others = go(
        tmp_path / "two", name, options, steps=4, train_batch=2, accumulate=2
    )
    for column in ("loss", "task_loss", "defense_term"):
        assert curve(two, column) == pytest.approx(curve(one, column), abs=2e-4)
    assert max(map(abs, curve(one, "defense_term"))) > 1e-3
    same(weights, others, 1e-3)


# PEFT warns that the base is no folder.
@pytest.mark.filterwarnings("ignore:.*base_model_name_or_path.*")
@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize("name", ["ldifs", "safegrad", "surgery"])
def test_adapters_and_checkpointed_activations_go_with_a_defense(tmp_path, name):
    # Small enough that rounding does not grow from step to step.
    changes = {"method": "lora", "gradient_checkpointing": True, "learning_rate": 5e-3}
    done, _ = go(tmp_path / "with", name, STRONG[name], **changes)
    changes["gradient_checkpointing"] = False
    without, _ = go(tmp_path / "without", name, STRONG[name], **changes)
    assert curve(done) == pytest.approx(curve(without), rel=1e-4)
    assert curve(done, "defense_term")[-1] > 0


def test_rows_of_lisas_safe_state_take_the_place_of_the_tasks(tmp_path):
    options = ("batch=2", "align_steps=9", "task_steps=0", "rho=0")
    done, _ = go(tmp_path / "lisa", "lisa", options)
    alone, _ = go(tmp_path / "alone", rows=list(REFERENCE), train_batch=2)
    # Two rows a step of two there are: the same rows whatever their order.
    assert curve(done, "task_loss") == pytest.approx(curve(alone), abs=1e-5)
    assert curve(done, "safe_state") == [1.0] * 6


def test_a_defense_across_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="one process for --defense kl; found 2"):
        go(tmp_path, "kl")


def test_too_strong_a_defense_is_stopped_and_the_last_good_checkpoint_kept(tmp_path):
    steps = []
    with pytest.raises(ModelError) as raised:
        go(
            tmp_path,
            "reference-loss",
            (*FEW, "weight=1000"),
            told=lambda step, *of: steps.append(step),
            steps=60,
            learning_rate=0.3,
            schedule="constant",
            save_every=1,
        )
    said = str(raised.value)
    assert "at most, that of knowing how often each token occurs or 1.5 times" in said
    assert f"at step {len(steps) + 1}, and above it for {PATIENCE} steps" in said
    assert "--defense-option" in said
    kept = [int(each.parent.name.split("-")[1]) for each in marks(tmp_path)]
    # The one of the first loss that was bad was saved, and is good no longer.
    [last] = kept
    assert last == len(steps) - PATIENCE
    assert f"The last good checkpoint is {tmp_path / f'checkpoint-{last}'}." in said
    assert (tmp_path / f"checkpoint-{last + 1}").is_dir()


def marks(folder):
    return sorted(folder.glob("checkpoint-*/holdfast.json"))


def test_a_model_that_knows_frequencies_alone_has_their_entropy_as_its_loss():
    first, second = (Example((0, *ids), (-100, *ids), 1) for ids in ((3, 5), (3, 3)))
    assert blind_loss([first, first]) == pytest.approx(math.log(2))
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert blind_loss([first, second]) == pytest.approx(expected)


def test_a_loss_above_that_of_knowing_nothing_is_borne_for_some_steps(tmp_path):
    bound = math.log(100)
    watch = Watch(bound, tmp_path, defended=False)
    for step in range(50):
        watch.step(3.0, step)
    for step in range(50, 49 + PATIENCE):
        watch.step(bound + 1, step)
    watch.step(bound - 0.1, 60)
    for step in range(61, 60 + PATIENCE):
        watch.step(bound + 1, step)
    with pytest.raises(
        ModelError, match=r"5\.605 at step 71, .* No good checkpoint"
    ) as it:
        watch.step(bound + 1, 70)
    assert "--defense-option" not in str(it.value)


def test_a_run_that_begins_above_is_stopped_where_it_gets_worse_yet(tmp_path):
    watch = Watch(4.6, tmp_path, defended=False)
    for step in range(50):
        watch.step(7.0 - step / 100, step)
    for step in range(50):
        watch.step(10.4, step)
    for step in range(PATIENCE - 1):
        watch.step(10.6, step)
    with pytest.raises(ModelError, match=r"of 10\.5 at most"):
        watch.step(10.6, 99)


def test_a_term_that_is_no_number_is_told_from_a_loss_that_is_none(tmp_path):
    watch = Watch(4.6, tmp_path, defended=True)
    watch.require_number(1.0, "task", 0)
    with pytest.raises(ModelError, match="found nan at step 4 in the defense's term"):
        watch.require_number(math.nan, "the defense's term", 3)
    with pytest.raises(ModelError, match=r"found inf at step 4\. No good"):
        watch.require_number(math.inf, "task", 3)
