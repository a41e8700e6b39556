"""Every flag that a message or a help text names is one that the program has."""

import ast
import functools
import re
from pathlib import Path

import pytest
from cyclopts import App

from holdfast.cli.verbs import app

SRC = Path(__file__).parents[2] / "src" / "holdfast"
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")
OTHERS = (
    "hf download",
    "lm-eval --",
    "--model holdfast/",
    "gguf-split --",
    "lora-rank",
    "vllm serve MODEL",
)
"""What a text holds that names the command of another program."""

OWN = {"judges": ("audit", "rollout", "ablate", "evaluate", "judge", "select")}
"""Verbs whose flags alone a folder may name, since no other verb runs it."""

GENERAL = {"--help", "--version", "--config"}


@functools.cache
def known_to(verbs: tuple[str, ...] | None) -> set[str]:
    """Return the flags of some verbs, or of all; many modules ask for the same."""
    if verbs is None:
        return flags_of(app)
    return {flag for verb in verbs for flag in flags_of(app[verb])}


def flags_of(verb: App) -> set[str]:
    """Return every flag of a verb and of what lies below it."""
    has_own = verb.default_command is not None
    arguments = verb.assemble_argument_collection() if has_own else ()
    named = {name for argument in arguments for name in argument.names}
    for name in verb:
        below = verb[name]
        if name.startswith("-") or below is verb:
            continue
        named |= flags_of(below)
    return named


@functools.cache
def named_in(path: Path) -> set[str]:
    """Return every flag that a text of a module names."""
    return {
        flag
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if not any(other in node.value for other in OTHERS)
        for flag in FLAG.findall(node.value)
    }


MODULES = sorted(path for path in SRC.rglob("*.py") if named_in(path))


def test_the_flags_of_the_program_are_found():
    every = flags_of(app)
    assert {"--limit", "--judge-rubric", "--no-heads", "--if-null"} <= every
    assert "--max-tokens" not in flags_of(app["evaluate"])
    assert len(MODULES) > 40


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_every_flag_that_a_text_names_exists(path):
    known = known_to(OWN.get(path.relative_to(SRC).parts[0]))
    assert named_in(path) <= known | GENERAL
