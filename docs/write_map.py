"""Write docs/map.md from the tree itself: `python docs/write_map.py`."""

import ast
from pathlib import Path

PAGE = Path(__file__).with_name("map.md")
SRC = Path(__file__).parents[1] / "src" / "holdfast"
HEAD = """<!-- Written by docs/write_map.py; change the code and run it again. -->

# Map of the code

Lowest first: a folder imports only what stands above it, and `tests/test_imports.py`
keeps it so. The base is what methods share, a slice is one method, and `audit` and
`cli` see everything. To find the room of a line, ask whether it names a quantity or
verb of one method: then it is in that method's folder, else in the lowest folder of
the base whose nouns it speaks. In a slice, `settings` are flags (no torch), `stage`
or the verb's name reads and writes a study, `panel` is what page and terminal show.
"""
PARTS = {
    "Base": (
        "stats",
        "data",
        "report",
        "study",
        "models",
        "organisms",
        "engines",
        "judges",
        "rollout",
    ),
    "Slices": (
        "cliff",
        "heads",
        "dynamics",
        "select",
        "guard",
        "evaluate",
        "sinks",
        "finetune",
    ),
    "On top": ("audit", "cli"),
}


def summary(path: Path) -> str:
    """Return the first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def folder(place: Path) -> list[str]:
    """Return the lines of one folder and of those in it."""
    name = place.relative_to(SRC).as_posix()
    lines = [f"### `{name}/`", "", summary(place / "__init__.py"), ""]
    lines += ["| module | holds |", "|---|---|"]
    for path in sorted(place.glob("*.py")):
        if path.name != "__init__.py":
            lines.append(f"| `{path.stem}` | {summary(path)} |")
    lines.append("")
    for inner in sorted(each.parent for each in place.glob("*/__init__.py")):
        lines += folder(inner)
    return lines


def page() -> str:
    """Return the page as it should be."""
    lines = [HEAD]
    for part, names in PARTS.items():
        lines += [f"## {part}", ""]
        for name in names:
            lines += folder(SRC / name)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
