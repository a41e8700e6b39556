"""Utility by lm-eval, where it is installed: a thin way to its tasks."""

import importlib
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from holdfast.errors import EnvironmentProblem, HoldfastError, SettingsError
from holdfast.models.edits import HeadEdit, editing
from holdfast.models.parts import Adapter

PACKAGE = "lm_eval"


def require_harness() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        EnvironmentProblem: If it is not installed.
    """
    if find_spec(PACKAGE) is None:
        raise EnvironmentProblem(
            "the package lm-eval, for --lm-eval",
            "no such package here",
            "Install it with `pip install lm-eval`, or measure utility with "
            "`--suite gsm8k`, which needs none.",
        )


def run_harness(
    adapter: Adapter,
    tasks: Sequence[str],
    *,
    edit: HeadEdit | None = None,
    limit: int | None = None,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Run tasks of lm-eval on a model in memory, edited or not.

    Args:
        adapter: The model.
        tasks: Names of tasks, as lm-eval knows them, or YAML files of tasks.
        edit: Heads that are scaled at every position meanwhile.
        limit: At most so many rows of a task.
        batch_size: Rows at once.

    Returns:
        Version, and for each task its version and its numbers as lm-eval gives them,
        with their standard errors.

    Raises:
        EnvironmentProblem: If lm-eval is not installed.
        SettingsError: If it does not know a task, or cannot run it.
    """
    require_harness()
    harness = importlib.import_module(PACKAGE)
    wrapper = importlib.import_module(f"{PACKAGE}.models.huggingface")
    try:
        # What it says on its way must not mix with results on stdout.
        with editing(adapter, edit), redirect_stdout(sys.stderr):
            model = wrapper.HFLM(
                pretrained=adapter.model,
                tokenizer=adapter.tokenizer,
                batch_size=batch_size,
            )
            found = harness.simple_evaluate(
                model=model, tasks=list(tasks), limit=limit, log_samples=False
            )
    except HoldfastError:
        raise
    except Exception as error:
        # Its tasks fail in as many ways as there are tasks, most of them offline.
        raise SettingsError(
            f"tasks of lm-eval that run here: {', '.join(tasks)}",
            f"{type(error).__name__}: {error}",
            "See `lm-eval --tasks list`; most tasks need the Hub, or its cache.",
        ) from error
    return {
        "version": version("lm-eval"),
        "tasks": {
            task: {
                "version": found.get("versions", {}).get(task),
                **{
                    key: value
                    for key, value in numbers.items()
                    if isinstance(value, int | float) and not isinstance(value, bool)
                },
            }
            for task, numbers in found["results"].items()
        },
    }
