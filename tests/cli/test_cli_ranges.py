"""No flag takes a number that is none: over all settings, found and not listed."""

import importlib
import math
import pkgutil
from dataclasses import MISSING, fields, is_dataclass
from typing import get_args, get_type_hints

import pytest

import holdfast
from holdfast.cli.app import run
from holdfast.errors import SettingsError
from holdfast.finetune.settings import Recipe
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.diffusion.unmasking import UnmaskingSchedule

NEEDED = {
    "data": "d",
    "pool": "p",
    "budget": "1",
    "harmful": "h",
    "reference": "r",
    "guard": "g",
}


def _settings():
    """Every class of settings of a verb."""
    kinds = {Recipe}
    for each in pkgutil.walk_packages(holdfast.__path__, "holdfast."):
        if each.name.endswith(".settings"):
            module = importlib.import_module(each.name)
            kinds |= {
                kind
                for kind in vars(module).values()
                if isinstance(kind, type) and is_dataclass(kind)
            }
    return sorted(kinds, key=lambda kind: kind.__name__)


def _holds(hint, kind):
    return hint is kind or any(_holds(each, kind) for each in get_args(hint))


def _numbers(kind):
    """Every field of some type, of every class of settings."""
    return [
        pytest.param(each, field.name, id=f"{each.__name__}.{field.name}")
        for each in _settings()
        for field in fields(each)
        if _holds(get_type_hints(each)[field.name], kind)
    ]


def _given(kind, name, value):
    hint = get_type_hints(kind)[name]
    needed = {
        field.name: NEEDED[field.name]
        for field in fields(kind)
        if field.default is MISSING and field.default_factory is MISSING
    }
    several = tuple in (getattr(hint, "__origin__", None),) or "tuple" in str(hint)
    return kind(**needed | {name: (value,) if several else value})


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize(("kind", "name"), _numbers(float))
def test_a_flag_for_a_number_takes_a_number(kind, name, value):
    with pytest.raises(SettingsError, match="--" + name.replace("_", "-")):
        _given(kind, name, value)


@pytest.mark.parametrize("value", [-1, 1 << 32, 1 << 70])
@pytest.mark.parametrize(
    ("kind", "name"), [each for each in _numbers(int) if each.values[1] == "seed"]
)
def test_a_seed_is_one_that_every_library_takes(kind, name, value):
    with pytest.raises(SettingsError, match="--seed from 0"):
        _given(kind, name, value)


def test_every_kind_of_settings_with_a_number_was_looked_at():
    found = {f"{kind.__name__}.{name}" for kind, name in map(_pair, _numbers(float))}
    assert {
        "RolloutSettings.temperature",
        "AblateSettings.fractions",
        "BakeSettings.factor",
        "Recipe.learning_rate",
        "SelectSettings.similar",
        "JudgeSettings.judge_timeout",
        "DiffusionSettings.cfg_scale",
        "FinetuneSettings.benign_ratio",
    } <= found


def _pair(case):
    return case.values


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_draws_refuses_such_a_temperature_too(value):
    with pytest.raises(SettingsError, match="temperature"):
        Sampling(temperature=value, max_thinking=1, max_answer=1)
    with pytest.raises(SettingsError, match="temperature"):
        UnmaskingSchedule(temperature=value)
    with pytest.raises(SettingsError, match="cfg_scale"):
        UnmaskingSchedule(cfg_scale=value)


@pytest.mark.parametrize(
    "words",
    [
        ("rollout", "organism:cliff", "--temperature", "inf"),
        ("evaluate", "organism:cliff", "--temperature", "nan"),
        ("finetune", "organism:cliff", "--data", "d", "--learning-rate", "inf"),
        ("bake", "s", "--factor", "nan"),
        ("finetune", "organism:cliff", "--data", "d", "--seed", "-1"),
    ],
    ids=" ".join,
)
def test_the_command_line_says_so_in_one_line(words, tmp_path, capsys):
    assert run([*words, "-o", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err.strip()
    assert words[-2] in said
    assert len(said.splitlines()) == 1
