"""The words of a newcomer's field: private ones may not come back."""

import ast
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
TERM = re.compile(r"^\| (?!term )([^|]+?) \|", re.M)
TERMS = {each for row in TERM.findall(GLOSSARY) for each in row.split(", ")}
COUNTED = "numbers?|steps?|rows?|prompts|tokens|records?|columns?"
UNITS = (
    "answer|batch|checkpoint|condition|detector|example|head|layer|pass|position|prompt"
    "|request|row|sampler|step|token"
)
# A private word, the word for it, and a sentence that shows it. A word that is none of
# plain English stands in the glossary.
PRIVATE = {
    r"\b(?:take|taken|takes|taking|took) away\b": ("ablate", "heads taken away"),
    r"\b(?:gives?|gave|given|giving) in\b(?! (?:memory|the|a)\b)": (
        "complied",
        "the model gives in to it",
    ),
    rf"\b(?:{COUNTED}) an? (?:{UNITS})\b(?! may\b)": (
        "per",
        "one number a row",
    ),
    r"\b(?:[Pp]lateau|compliance|published|clean) less\b": (
        "minus",
        "plateau less final",
    ),
    r"\b[Tt]ells? whether\b": ("return whether", '"""Tell whether it is so."""'),
    r"[Nn]othing heavy\b": ("loads no tensors", "nothing heavy is imported"),
    r"\bgauges?\b": ("step-wise signal", "the gauge of a step"),
}
PLAIN = {"per", "minus", "return whether", "loads no tensors"}
# Names that meant something to whoever wrote them.
NAMES = {
    *("Asked", "Canvas", "Denoising", "Gauge", "GrowingLayer", "Look", "Material"),
    *("Pass", "Row", "Rows", "Seen", "Speaker", "Taken", "Temptation"),
    *("agreement_in_words", "alike", "found_in_words", "in_words", "misled"),
    *("rehearsal", "sayings", "take_away"),
}


# The bytes of these name the version of the rules judge, on which calibrations rest.
HASHED = ("language", "phrases", "reading", "rules", "tone", "degenerate")


def sources() -> list[Path]:
    return [path for path in (ROOT / "src").rglob("*.py") if path.stem not in HASHED]


def prose_of(path: Path) -> dict[int, str]:
    """Return the docstrings and comments of a module by their lines."""
    source = path.read_text(encoding="utf-8")
    prose = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = str(node.value.value)
            prose |= {
                node.lineno + at: line for at, line in enumerate(text.split("\n"))
            }
    with path.open(encoding="utf-8") as lines:
        for token in tokenize.generate_tokens(lines.readline):
            if token.type == tokenize.COMMENT:
                prose[token.start[0]] = token.string
    return prose


def pages() -> list[Path]:
    return [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def named_in(tree: ast.AST) -> set[str]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


@pytest.mark.parametrize("pattern", PRIVATE)
def test_a_private_word_is_in_no_docstring_comment_or_page(pattern):
    said = re.compile(pattern)
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.strip()}"
        for path in sources()
        for line, text in prose_of(path).items()
        if said.search(text)
    ]
    for path in pages():
        lines = path.read_text(encoding="utf-8").split("\n")
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:90]}"
            for number, line in enumerate(lines, 1)
            if said.search(line)
        ]
    assert found == []


@pytest.mark.parametrize(("pattern", "word"), [(p, w) for p, (w, _) in PRIVATE.items()])
def test_a_private_word_has_a_word_of_the_field_in_its_place(pattern, word):
    assert word in TERMS | PLAIN
    assert re.search(pattern, PRIVATE[pattern][1])


def test_no_function_or_class_has_a_private_name():
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "src").rglob("*.py")
        for name in named_in(ast.parse(path.read_text(encoding="utf-8"))) & NAMES
    }
    assert found == set()
    assert named_in(ast.parse("class Gauge: ...")) & NAMES == {"Gauge"}


def test_the_glossary_has_each_term_once():
    terms = [each for row in TERM.findall(GLOSSARY) for each in row.split(", ")]
    assert len(terms) == len(set(terms))
    assert len(terms) >= 40
