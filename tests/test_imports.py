"""Import direction: a module imports only from layers below its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "holdfast"
LAYERS = [  # Lowest first. Names in one set may not import each other.
    {"errors"},
    {"ranges"},
    {"study", "analysis", "data", "report"},
    {"models"},
    {"judges"},
    {"training"},
    {"organisms", "guard"},
    {"session"},
    {"interop"},
    {"stages"},
    {"cli"},
    {"__init__", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
OWNERS = {  # Who may import what; everybody else may not.
    "transformers": {"models", "training", "organisms"},
    "peft": {"models", "training"},
    "trl": {"training"},
    "datasets": {"training"},
    "altair": {"report"},
}
FORBIDDEN = {  # Who must not import what, though it lies below.
    "models": {"holdfast.analysis"},
    "judges": {"holdfast.analysis"},
    "report": {"torch", "holdfast.study", "holdfast.data", "holdfast.analysis"},
    "cli": {"torch"},
}
LIST_OF_STAGES = SRC / "stages" / "audit.py"


def layer(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(text: str, where: str = "text") -> set[str]:
    """Full names of everything a module imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def complaint(path: Path, name: str) -> str | None:
    """What is wrong with `path` importing `name`, or None."""
    here = layer(path)
    root, *rest = name.split(".")
    owners = OWNERS.get(root, {here})
    if here not in owners:
        return f"{here} imports {name}; only {owners} may"
    if any(
        name == bad or name.startswith(f"{bad}.") for bad in FORBIDDEN.get(here, ())
    ):
        return f"{here} must not import {name}"
    if root != "holdfast":
        return None
    if not rest or rest[0] not in RANK:
        # The package root loads nothing, and imports everything by name: from
        # inside it would be a way around the order.
        return f"{here} imports the package root as {name}"
    inside = rest[0] == here and (here != "stages" or path == LIST_OF_STAGES)
    return None if inside or RANK[rest[0]] < RANK[here] else f"{here} imports {name}"


@pytest.mark.parametrize(
    "path", sorted(SRC.rglob("*.py")), ids=lambda path: str(path.relative_to(SRC))
)
def test_imports_point_down(path):
    text = path.read_text(encoding="utf-8")
    wrong = [complaint(path, name) for name in sorted(imports(text, str(path)))]
    assert not [message for message in wrong if message]


def test_every_module_has_a_layer():
    assert {layer(path) for path in SRC.rglob("*.py")} <= set(RANK)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("analysis/probe.py", "from holdfast.data import prompts"),
        ("analysis/probe.py", "import transformers"),
        ("analysis/probe.py", "import holdfast"),
        ("data/prompts.py", "from holdfast import __version__"),
        ("data/prompts.py", "from holdfast.study import Study"),
        ("models/adapter.py", "from holdfast.analysis.probe import fit_probe"),
        ("judges/rules.py", "import holdfast.analysis.probe"),
        ("report/html.py", "import torch.nn"),
        ("report/html.py", "from holdfast.models.adapter import load"),
        ("stages/probe.py", "from holdfast.stages.rollout import run"),
        ("stages/probe.py", "from transformers import AutoModel"),
        ("stages/probe.py", "from holdfast.cli import main"),
        ("organisms/recipe.py", "from holdfast.guard import monitor"),
        ("organisms/recipe.py", "import peft"),
        ("study/files.py", "import altair"),
        ("training/trainer.py", "from holdfast.session.context import Session"),
        ("training/trainer.py", "from holdfast.organisms.world import World"),
        ("models/loading.py", "import trl"),
        ("stages/finetune.py", "from datasets import Dataset"),
        ("cli/verbs.py", "from torch import nn"),
    ],
)
def test_a_forbidden_import_is_named(module, line):
    [name] = imports(line)
    assert complaint(SRC / module, name)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("analysis/probe.py", "from holdfast.analysis.statistics import wilson"),
        ("report/html.py", "import altair"),
        ("organisms/recipe.py", "import transformers"),
        ("stages/audit.py", "from holdfast.stages import rollout"),
        ("stages/probe.py", "from holdfast.analysis.probe import fit_probe"),
        ("cli/verbs.py", "from holdfast.stages import audit"),
        ("training/trainer.py", "import trl"),
        ("training/trainer.py", "from holdfast.models.parts import Adapter"),
        ("stages/finetune.py", "from holdfast.training.trainer import train"),
    ],
)
def test_an_allowed_import_is_not_named(module, line):
    [name] = imports(line)
    assert complaint(SRC / module, name) is None


def test_a_relative_import_is_refused():
    with pytest.raises(AssertionError, match="relative import"):
        imports("from . import study")


@pytest.mark.parametrize(
    "module",
    ["holdfast", "holdfast.cli", "holdfast.report", "holdfast.training.recipe"],
)
def test_importing_this_loads_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
