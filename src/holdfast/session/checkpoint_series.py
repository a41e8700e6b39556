"""The checkpoints of a run, in the order in which they were written."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from holdfast.errors import SettingsError
from holdfast.models.files import ADAPTER_CONFIG, CONFIG

_NUMBERED = re.compile(r"checkpoint-(\d+)")
BESIDE = ".checkpoints"
"""`holdfast finetune` keeps the checkpoints of a running run in a folder beside it."""


class Step(NamedTuple):
    """One model of a series.

    Attributes:
        name: `organism:NAME`, a directory, or a Hub id.
        step: Optimiser step, where the folder says so.
    """

    name: str
    step: int | None


def series(models: Sequence[str]) -> list[Step]:
    """Return every model that names stand for, in order.

    A folder with `checkpoint-N` folders in it, or beside it as `NAME.checkpoints`,
    stands for those by number, and after them for itself if it holds a model.

    Args:
        models: What the user named.

    Raises:
        SettingsError: If nothing is named, or one model twice.
    """
    found = [step for model in models for step in _expand(model)]
    names = [step.name for step in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not found or twice:
        raise SettingsError(
            "each model once",
            f"{', '.join(twice)} twice" if twice else "no model",
            "Name every checkpoint once, or the folder that holds them.",
        )
    return found


def _expand(model: str) -> list[Step]:
    path = Path(model).expanduser()
    if not path.is_dir() and not path.with_name(path.name + BESIDE).is_dir():
        return [Step(model, None)]
    folders = [path, path.with_name(path.name + BESIDE)]
    numbered: dict[int, str] = {}
    for folder in folders:
        for each in folder.glob("checkpoint-*"):
            number = _NUMBERED.fullmatch(each.name)
            if number and each.is_dir():
                numbered.setdefault(int(number[1]), str(each))
    steps = [Step(numbered[number], number) for number in sorted(numbered)]
    if not steps or any((path / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        steps.append(Step(model, None))
    return steps
