"""Folders and their order: who imports whom, and how large a module may grow.

The base stands in one order, the methods (slices) above it see each other along a list,
and `audit` and `cli` see everything. Every rule has a case that breaks it.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "holdfast"
BASE = (  # Lowest first; each may import those before it.
    "errors",
    "ranges",
    "flags",
    "stats",
    "data",
    "report",
    "study",
    "models",
    "organisms",
    "engines",
    "judges",
    "rollout",
)
SLICES = {  # What else of the slices each may import, beside the whole base.
    "cliff": set(),
    "heads": {"cliff"},
    "dynamics": {"cliff"},
    "select": {"cliff"},
    "guard": {"cliff", "dynamics"},
    "evaluate": set(),
    "sinks": set(),
    "finetune": {"sinks"},
}
TOP = ("audit", "cli", "__init__", "__main__")
FORMULAS = {  # Tensors in, frozen results out: they import `stats` and each other.
    "cliff.cliff",
    "cliff.commitment.accounts",
    "cliff.commitment.causes.swap",
    "cliff.commitment.causes.use",
    "cliff.commitment.causes.words",
    "cliff.probe",
    "cliff.verdict",
    "dynamics.anchors",
    "dynamics.signal",
    "dynamics.trajectories",
    "guard.autoencoder",
    "guard.conformal",
    "guard.detection",
    "guard.detector",
    "guard.detectors",
    "guard.gaussian",
    "guard.monitor.rules",
    "heads.checks",
    "heads.ranking",
    "select.selectors",
    "sinks.divergence",
}
LIGHT = {"settings", "panel"}  # Modules of these names load no tensors.
HEAVY = {"torch", "transformers", "safetensors", "peft", "trl", "datasets"}
OWNERS = {  # Who may import what; everybody else may not.
    "transformers": {"models", "finetune", "organisms"},
    "peft": {"models", "finetune"},
    "trl": {"finetune"},
    "datasets": {"finetune"},
    "ray": {"reading"},
    "altair": {"report", "panel"},
}
MAX_MODULES, MAX_LINES, MAX_STATEMENTS = 12, 450, 40


class Import:
    """One imported name: where it comes from, and whether loading needs it."""

    def __init__(self, module: str, name: str | None, early: bool, typing: bool):
        self.module, self.name, self.early, self.typing = module, name, early, typing

    @property
    def full(self) -> str:
        return self.module if self.name is None else f"{self.module}.{self.name}"


def imports(text: str) -> Iterator[Import]:
    """Everything a module imports, inside functions and for types too."""

    def inside(node: ast.AST, early: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, None, early, typing)
            elif isinstance(child, ast.ImportFrom):
                assert child.module, "relative import"
                assert child.level == 0, "relative import"
                for alias in child.names:
                    yield Import(child.module, alias.name, early, typing)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from inside(child, False, typing)
            else:
                types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(
                    child.test
                )
                yield from inside(child, early, typing or types)

    return inside(ast.parse(text), True, False)


def module_of(path: Path) -> str:
    """The name of a module without `holdfast.`; a package stands for its `__init__`."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and parts[1:] else parts)


PATHS = sorted(SRC.rglob("*.py"))
TEXTS = {module_of(path): path.read_text(encoding="utf-8") for path in PATHS}


@functools.cache
def loaded() -> dict[str, set[str]]:
    """The modules that loading each of ours loads; worked out once for all tests."""
    return edges(TEXTS, early=True)


def room(module: str) -> str:
    return module.split(".")[0]


def may_import(here: str, there: str) -> bool:
    """Whether a module of one room may import from another room."""
    if here == there:
        return True
    if here in TOP:
        return there not in TOP or TOP.index(there) < TOP.index(here)
    if here in BASE:
        return there in BASE and BASE.index(there) < BASE.index(here)
    return there in BASE or there in SLICES[here]


def complaint(module: str, found: Import) -> str | None:
    """What is wrong with a module's import, or None."""
    root, *rest = found.full.split(".")
    words = set(module.split("."))
    if not OWNERS.get(root, words) & words:
        return f"{module} imports {found.full}; only {OWNERS[root]} may"
    if room(module) in {"report", "cli"} and root == "torch":
        return f"{module} imports torch"
    if root != "holdfast":
        return None
    if not rest or rest[0] not in {*BASE, *SLICES, *TOP}:
        # The package root loads nothing, and imports everything by name: from
        # inside it would be a way around the order.
        return f"{module} imports the package root as {found.full}"
    if module in FORMULAS and not (
        rest[0] in {"errors", "ranges", "stats"} or ".".join(rest[:2]) in FORMULAS
    ):
        return f"the formulas of {module} import {found.full}"
    if not may_import(room(module), rest[0]):
        return f"{module} imports {found.full}, which lies above it"
    return None


def edges(texts: Mapping[str, str], *, early: bool) -> dict[str, set[str]]:
    """The modules that each imports; with `early` only those that loading it loads."""
    graph: dict[str, set[str]] = {}
    for module, text in texts.items():
        graph[module] = set()
        for found in imports(text):
            if found.typing or (early and not found.early):
                continue
            whole = found.full.removeprefix("holdfast.")
            near = found.module.removeprefix("holdfast.")
            there = whole if whole in texts else near
            if not found.full.startswith("holdfast."):
                there = found.full.split(".")[0]
            if there != module:
                graph[module].add(there)
    return graph


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    left = {
        node: {each for each in near if each in graph} for node, near in graph.items()
    }
    while free := {node for node, near in left.items() if not near}:
        left = {node: near - free for node, near in left.items() if node not in free}
    return sorted(left)


def way_to_tensors(module: str, graph: Mapping[str, set[str]]) -> list[str]:
    """The modules by which loading one loads torch; empty if it does not."""
    queue, seen = [[module]], {module}
    while queue:
        way = queue.pop(0)
        for near in sorted(graph.get(way[-1], ())):
            if near in HEAVY:
                return [*way, near]
            if near not in seen:
                seen.add(near)
                queue.append([*way, near])
    return []


def too_long(text: str) -> list[str]:
    """What of a module exceeds the limits of lines and of statements."""
    lines = len(text.splitlines())
    found = [f"{lines} lines"] if lines > MAX_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = sum(isinstance(each, ast.stmt) for each in ast.walk(node)) - 1
            if count > MAX_STATEMENTS:
                found.append(f"{node.name}: {count} statements")
    return found


def crowded(paths: list[Path]) -> list[str]:
    """Folders with too many modules."""
    counts: dict[Path, int] = {}
    for path in paths:
        if path.name != "__init__.py":
            counts[path.parent] = counts.get(path.parent, 0) + 1
    return [f"{folder}: {n}" for folder, n in counts.items() if n > MAX_MODULES]


@pytest.mark.parametrize("module", sorted(TEXTS))
def test_imports_follow_the_order(module):
    wrong = [complaint(module, found) for found in imports(TEXTS[module])]
    assert not [message for message in wrong if message]


def test_every_folder_has_its_place():
    assert {room(module) for module in TEXTS} <= {*BASE, *SLICES, *TOP}
    assert set(TEXTS) >= FORMULAS


def test_no_modules_import_each_other():
    assert circle(edges(TEXTS, early=False)) == []


@pytest.mark.parametrize(
    "module", sorted(name for name in TEXTS if name.split(".")[-1] in LIGHT)
)
def test_settings_and_panels_load_no_tensors(module):
    assert way_to_tensors(module, loaded()) == []


@pytest.mark.parametrize("module", sorted(TEXTS))
def test_modules_and_functions_stay_short(module):
    assert too_long(TEXTS[module]) == []


def test_no_folder_is_crowded():
    assert crowded(PATHS) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("stats.rates", "from holdfast.data import prompts"),
        ("stats.rates", "import transformers"),
        ("stats.rates", "import holdfast"),
        ("data.prompts", "from holdfast import __version__"),
        ("data.prompts", "from holdfast.study import Study"),
        ("report.text", "from holdfast.models.model import Adapter"),
        ("report.charts", "import torch.nn"),
        ("study.files", "import altair"),
        ("study.batches", "from holdfast.models.model import Adapter"),
        ("models.scoring", "from holdfast.judges.rules import judge"),
        ("models.loading.weights", "import trl"),
        ("organisms.training", "from holdfast.judges.rules import judge"),
        ("organisms.training", "import peft"),
        ("engines.proof", "from holdfast.judges.verdict import Verdict"),
        ("judges.rules", "from holdfast.rollout.rows import Rollout"),
        ("rollout.stage", "from holdfast.cliff.probe import fit_probe"),
        ("cliff.fit", "from holdfast.heads.rank import run"),
        ("heads.rank", "from holdfast.dynamics.signal import pool_steps"),
        ("dynamics.stage", "from holdfast.guard.detector import Detector"),
        ("evaluate.stage", "from holdfast.cliff.probe import fit_probe"),
        ("sinks.stage", "from holdfast.finetune.targets import example"),
        ("finetune.material", "from holdfast.select.scores import PoolScorer"),
        ("finetune.stage", "from holdfast.audit.stage import run"),
        ("heads.rank", "from holdfast.cli.app import main"),
        ("heads.ranking", "from holdfast.models.model import Adapter"),
        ("cliff.probe", "from holdfast.cliff.fit import run"),
        ("audit.stage", "from holdfast.cli.app import main"),
        ("cliff.fit", "from transformers import AutoModel"),
        ("cli.verbs", "from torch import nn"),
    ],
)
def test_a_forbidden_import_is_named(module, line):
    [found] = imports(line)
    assert complaint(module, found)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("stats.rates", "from holdfast.stats.bootstrap import Estimate"),
        ("cliff.panel", "import altair"),
        ("organisms.training", "import transformers"),
        ("heads.rank", "from holdfast.cliff.probe_files import read_probe"),
        ("guard.stage", "from holdfast.dynamics.rows import Window"),
        ("finetune.trainer", "from holdfast.sinks.divergence import sink_penalty"),
        ("finetune.trainer", "import trl"),
        ("heads.checks", "from holdfast.heads.ranking import Head"),
        ("heads.ranking", "from holdfast.stats.bootstrap import Estimate"),
        ("audit.stage", "from holdfast.heads.rank import run"),
        ("cli.verbs", "from holdfast.audit import stage"),
    ],
)
def test_an_allowed_import_is_not_named(module, line):
    [found] = imports(line)
    assert complaint(module, found) is None


def test_a_relative_import_is_refused():
    with pytest.raises(AssertionError, match="relative import"):
        list(imports("from . import study"))


def test_a_circle_is_found_also_inside_functions():
    texts = {
        "data.pool": "def read():\n    from holdfast.data import hub",
        "data.hub": "from holdfast.data.pool import Pool",
        "data.splits": "from holdfast.data.pool import Pool",
    }
    assert "data.hub" in circle(edges(texts, early=False))
    texts["data.hub"] = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from holdfast.data.pool import Pool"
    )
    assert circle(edges(texts, early=False)) == []


def test_tensors_are_found_behind_other_modules():
    texts = {
        "heads.panel": "from holdfast.heads.rank import run",
        "heads.rank": "import torch",
        "heads.settings": "def heavy():\n    import torch",
    }
    graph = edges(texts, early=True)
    assert way_to_tensors("heads.panel", graph) == [
        "heads.panel",
        "heads.rank",
        "torch",
    ]
    assert way_to_tensors("heads.settings", graph) == []


def test_long_modules_and_functions_are_named():
    body = "    a = 1\n" * (MAX_STATEMENTS + 1)
    assert too_long(f"def long():\n{body}") == ["long: 41 statements"]
    assert too_long("a = 1\n" * (MAX_LINES + 1)) == ["451 lines"]
    assert too_long("a = 1\n" * MAX_LINES) == []


def test_a_crowded_folder_is_named():
    paths = [SRC / "heads" / f"m{number}.py" for number in range(MAX_MODULES + 1)]
    assert len(crowded(paths)) == 1
    assert crowded([*paths[1:], SRC / "heads" / "__init__.py"]) == []


@pytest.mark.parametrize(
    "module",
    ["holdfast", "holdfast.cli.app", "holdfast.report", "holdfast.finetune.settings"],
)
def test_importing_this_loads_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
