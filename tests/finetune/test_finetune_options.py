import dataclasses

import pytest

from holdfast.errors import SettingsError
from holdfast.finetune.defenses.options import OPTIONS, read_options
from holdfast.finetune.defenses.registry import DEFENSES
from holdfast.finetune.settings import FinetuneSettings, Recipe


def test_every_defense_has_options_and_a_function():
    assert list(DEFENSES) == list(OPTIONS)
    with pytest.raises(SettingsError, match="--defense none or safeinstr"):
        read_options("moat")


def test_options_are_read_by_their_type():
    found = read_options(
        "surgery", ("weight=2", "detach=yes", "batch=3", "layers=0-1", "against=safe")
    )
    assert dataclasses.asdict(found) == {
        "weight": 2.0,
        "detach": True,
        "batch": 3,
        "layers": "0-1",
        "interval": 1,
        "mean": 0.0,
        "against": "safe",
        "paired": True,
        "parity": False,
    }
    assert read_options("lisa", ("align-steps=4",)).align_steps == 4
    assert read_options("kl") == OPTIONS["kl"]()


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("moat", (), "--defense none or"),
        ("kl", ("moat=1",), "a key of weight, on, batch for --defense kl; found"),
        ("kl", ("weight",), "'weight'"),
        ("none", ("weight=1",), "left out for --defense none"),
        ("kl", ("weight=much",), "weight= with a number; found 'much'"),
        ("kl", ("weight=nan",), "a number"),
        ("kl", ("weight=inf",), "a number"),
        ("kl", ("batch=1.5",), "a whole number"),
        ("kl", ("weight=-1",), "of 0 or more; found -1.0"),
        ("kl", ("batch=0",), "of 1 or more"),
        ("kl", ("on=me",), "on=task or reference"),
        ("kl", ("weight=1", "weight=2"), "named twice"),
        ("surgery", ("paired=perhaps",), "paired=true or yes or false or no"),
        ("surgery", ("mean=1",), "mean= below 1"),
        ("surgery", ("parity=true", "batch=2"), "weight= alone; found also batch"),
        ("lisa", ("align_steps=0", "task_steps=0"), "above 0"),
    ],
)
def test_what_cannot_be_meant_is_named(name, given, said):
    with pytest.raises(SettingsError, match=said):
        read_options(name, given)
    with pytest.raises(SettingsError, match=said):
        Recipe(defense=name, defense_option=given)


def test_parity_stands_for_the_loop_of_the_authors():
    found = read_options("surgery", ("parity=true", "weight=7"))
    assert (found.weight, found.batch, found.paired, found.against) == (
        *(7.0, 1, False),
        "safe",
    )
    assert read_options("surgery", ("parity=true",)).weight == 300.0


def settings(name, *given, **files):
    return FinetuneSettings(
        "rows.jsonl", recipe=Recipe(defense=name, defense_option=given), **files
    )


def test_a_defense_is_given_the_rows_it_reads_and_no_others():
    rows = {"defense_data": "safe.jsonl"}
    both = rows | {"defense_harmful": "harm.jsonl"}
    for right in (
        settings("none"),
        settings("kl"),
        settings("constrained"),
        settings("lisa", "align_steps=0"),
        *(settings(n, **rows) for n in ("safeinstr", "reference-loss", "random-sink")),
        *(settings(n, **rows) for n in ("lisa", "safegrad")),
        settings("kl", "on=reference", **rows),
        settings("surgery", **both),
    ):
        assert right.recipe.options()
    for name in ("safeinstr", "reference-loss", "lisa", "safegrad", "random-sink"):
        with pytest.raises(SettingsError, match=f"--defense-data .* --defense {name}"):
            settings(name)
    with pytest.raises(SettingsError, match="--defense-harmful with rows for"):
        settings("surgery", **rows)
    with pytest.raises(SettingsError, match="expected no --defense-data; found one"):
        settings("kl", "on=task", **rows)
    with pytest.raises(SettingsError, match="no --defense-harmful"):
        settings("safegrad", **both)
