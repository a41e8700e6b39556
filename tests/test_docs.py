import dataclasses
import re
import runpy
import warnings
from pathlib import Path

import pytest

from holdfast.cliff.commitment.accounts import AccountThresholds
from holdfast.cliff.verdict import Thresholds
from holdfast.finetune.defenses.options import OPTIONS, SinkOptions

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_the_command_line_is_up_to_date():
    script = runpy.run_path(str(DOCS / "write_cli.py"))
    assert (DOCS / "cli.md").read_text() == script["page"](), "run docs/write_cli.py"


def test_the_map_of_the_code_is_that_of_the_tree():
    script = runpy.run_path(str(DOCS / "write_map.py"))
    assert (DOCS / "map.md").read_text() == script["page"](), "run docs/write_map.py"
    folders = {path.parent.name for path in script["SRC"].glob("*/__init__.py")}
    assert folders == {name for names in script["PARTS"].values() for name in names}


def test_the_page_of_the_verdict_gives_the_thresholds_of_the_code():
    numbers = set(re.findall(r"\d+(?:\.\d+)?", (DOCS / "verdict.md").read_text()))
    for name, value in dataclasses.asdict(Thresholds()).items():
        assert f"{value:g}" in numbers, name
    # The rules of accounts stand in a table by the names of their lines.
    text = (DOCS / "verdict.md").read_text()
    for name, value in dataclasses.asdict(AccountThresholds()).items():
        assert f"| `{name}` | {value:g} |" in text


def test_the_page_of_the_defenses_has_a_section_for_each_with_its_options():
    text = (DOCS / "defenses.md").read_text()
    sections = dict(
        part.split("\n", 1) for part in re.split(r"^## ", text, flags=re.M)[1:]
    )
    assert list(sections) == list(OPTIONS)
    shared = {field.name for field in dataclasses.fields(SinkOptions)}
    for name, kind in OPTIONS.items():
        for field in dataclasses.fields(kind):
            page = "surgery" if field.name in shared and "sink" in name else name
            assert f"`{field.name}" in sections[page], (name, field.name)


def test_the_table_of_organisms_is_that_of_its_records(capsys):
    script = runpy.run_path(str(DOCS.parent / "runs" / "organisms_table.py"))
    script["main"](str(DOCS / "records" / "organisms"))
    table = capsys.readouterr().out
    assert table == (DOCS / "organisms-table.md").read_text(), "run runs/organisms.sh"
    claim = table.partition("## Claim")[2].partition("### Claim:")[0]
    rows = [row for row in claim.splitlines() if row.startswith("| ")][1:]
    first = ("| aligned-", "| cliff-", "| spread-", "| early-", "| alarmed-")
    audited = [row for row in rows if row.startswith(first)]
    assert len(audited) == 15
    assert all(row.endswith("| yes |") for row in audited)
    # Where an account was planted, a null may be said of the cliff, and nothing wrong.
    others = [row for row in rows if row not in audited]
    assert len(others) == 12
    assert all(row.endswith("| yes |") or "cliff null" in row for row in others)


def test_the_table_of_accounts_is_that_of_its_records(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS.parent / "runs"))
    script = runpy.run_path(str(DOCS.parent / "runs" / "accounts_table.py"))
    script["main"](str(DOCS / "records" / "accounts"))
    table = capsys.readouterr().out
    assert table == (DOCS / "accounts-table.md").read_text(), "run runs/accounts.sh"


def test_the_tables_of_dynamics_are_those_of_their_records(capsys, tmp_path):
    script = runpy.run_path(str(DOCS.parent / "runs" / "dynamics_table.py"))
    figure = tmp_path / "dynamics.svg"
    script["main"](str(DOCS / "records" / "dynamics"), str(figure))
    page = (DOCS / "dynamics-table.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == page
    assert figure.exists()


def test_the_example_in_python_runs_as_it_is_written(
    thinker, world, tmp_path, monkeypatch, capsys
):
    for role in ("harmful", "benign"):
        source = Path(world[world.index(f"--{role}") + 1])
        (tmp_path / f"{role}.txt").write_text(source.read_text())
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.S)
    code = "\n".join(blocks).replace("path/to/model", str(thinker))
    names = {}
    with warnings.catch_warnings():
        # The example opens its two files without closing them, as people do.
        warnings.simplefilter("ignore", ResourceWarning)
        exec(compile(code, "python.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("[]\n")
    assert names["report"]["verdict"]["attack_succeeds"] is True
    assert (
        names["report"]["attack_success"]["by_wrapper"]["song"]["attack_success"][
            "value"
        ]
        >= 0.95
    )
    assert (tmp_path / "studies" / "mine" / "report.html").exists()


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+\.md)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_nobody_is_sent_to_another_project_of_our_name():
    """The package index has one; extras are installed as the package is, from here."""
    root = DOCS.parent
    texts = [root / "README.md", *DOCS.glob("*.md"), *root.glob("src/**/*.py")]
    sent = [each for each in texts if "pip install 'holdfast" in each.read_text()]
    assert sent == []
