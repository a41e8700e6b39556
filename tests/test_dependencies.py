import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MODULES = {  # Where a package's name is not that of its module.
    "mkdocs-material": "mkdocs",
    "scikit-learn": "sklearn",
    "vl-convert-python": "vl_convert",
}
TOOLS = {"mypy", "pre-commit", "ruff", "codespell"}  # Run, and imported by nobody.


def named(requirement: str) -> str:
    """The name of the module that a requirement brings."""
    package = re.split(r"[\[<>=!~ ]", requirement)[0]
    return MODULES.get(package, package.replace("-", "_"))


@cache
def imported(*folders: str) -> set[str]:
    """The outermost name of every module that is imported, lazily or by name."""
    names = set()
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names.add(node.module.partition(".")[0])
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    names.add(node.value.partition(".")[0])
    return names


@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_the_source_imports_every_hard_dependency(requirement):
    assert named(requirement) in imported("src")


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_something_imports_a_package_of_every_extra(extra):
    requirements = PROJECT["optional-dependencies"][extra]
    assert any(
        named(each) in imported("src", "benchmarks", "runs", "docs")
        for each in requirements
        if named(each) not in TOOLS
    )


@pytest.mark.parametrize("package", ["psutil", "sklearn"])
def test_a_package_that_only_tests_use_is_no_import_of_the_source(package):
    assert package not in imported("src")
