"""The example of each page "add a …" runs as it stands there."""

import re
from pathlib import Path

import pytest

from holdfast.finetune.defenses import options, registry
from holdfast.guard import detectors
from holdfast.judges import choose

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("add-*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
# What a page adds to, so that nothing of it is left for other tests.
TABLES = [
    value
    for module in (options, registry, detectors, choose)
    for name, value in vars(module).items()
    if name.isupper() and isinstance(value, dict)
]


@pytest.fixture(autouse=True)
def restored():
    kept = [dict(table) for table in TABLES]
    yield
    for table, before in zip(TABLES, kept, strict=True):
        table.clear()
        table.update(before)


def test_there_is_one_page_for_each_thing_that_is_added():
    assert [page.stem for page in PAGES] == [
        "add-defense",
        "add-detector",
        "add-family",
        "add-judge",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_example_of_a_page_runs(page, tmp_path):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert any("assert" in block for block in blocks)
    names = {"folder": tmp_path, "__name__": page.stem.replace("-", "_")}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
