"""What the page of an audit shows of single heads: the grid, and two figures."""

import json
import re

import pytest

from holdfast.audit.page import sections
from holdfast.heads.panel import ablation, ablation_figure, repair_figure
from holdfast.report.terminal import print_section


def figure(value, n=48, width=0.1):
    return {"value": value, "low": value - width, "high": value + width, "n": n}


def condition(name, n_heads, success, benign):
    return {
        "scope": "everywhere",
        "condition": name,
        "n_heads": n_heads,
        "attack_success": figure(success),
        "benign_compliance": figure(benign),
    }


CONDITIONS = [
    condition("none", 0, 0.9, 0.8),
    *(
        condition(name, n, success, 0.8)
        for name, *rates in (
            ("top", 0.5, 0.2),
            ("random", 0.9, 0.85),
            ("positive", 0.95, 0.9),
        )
        for n, success in zip((2, 4), rates, strict=True)
    ),
]


def dots(svg):
    """Places of the filled points of a figure, panel by panel, by colour."""
    found = re.findall(
        r'aria-label="([^"]*)"[^>]*aria-roledescription="point"'
        r'[^>]*transform="translate\(([\d.]+),([\d.]+)\)"[^>]*fill="(#\w+)"',
        svg,
    )
    return [(label, float(x), float(y), colour) for label, x, y, colour in found]


def test_attack_success_stands_over_the_heads_switched_off_with_every_control():
    """220 pixels are 100 %, and 270 are 4 heads; rows of a figure are no heads."""
    points = dots(ablation_figure(CONDITIONS, 128))
    assert len(points) == 2 * 3 * 3
    drawn = {}
    for label, x, y, _ in points[:9]:
        heads, off = re.search(r"of 128: (\d+);.*kind: (.*)$", label).groups()
        assert x == pytest.approx(270 * int(heads) / 4, abs=0.5)
        drawn.setdefault(off, {})[int(heads)] = 1 - y / 220
    expected = {
        "top of the ranking": {0: 0.9, 2: 0.5, 4: 0.2},
        "random, same layers": {0: 0.9, 2: 0.9, 4: 0.85},
        "bottom of the ranking": {0: 0.9, 2: 0.95, 4: 0.9},
    }
    assert drawn.keys() == expected.keys()
    for off, rates in expected.items():
        assert drawn[off] == pytest.approx(rates, abs=1e-3)


def test_the_axis_says_the_share_beside_the_number():
    svg = ablation_figure(CONDITIONS, 128)
    for label in ("2 = 1.6%", "4 = 3.1%"):
        assert label in svg


def test_self_repair_is_drawn_with_both_sides_and_all_new_heads():
    repair = {
        "n_heads": 4,
        "others_before": figure(1.9),
        "others_after": figure(-0.5),
        "final_plain": figure(-9.0),
        "final_edited": figure(0.5),
        "late_plain": figure(-1.6),
        "late_edited": figure(-0.2),
        "new_heads": [
            {"layer": 6, "head": 7, "before": figure(0.0), "after": figure(0.1)},
            {"layer": 5, "head": 1, "before": figure(0.0), "after": figure(0.2)},
        ],
    }
    svg = repair_figure(repair)
    points = dots(svg)
    assert len(points) == 4 + 2 * 3
    for words in ("before the answer", "top 4 heads off", "6:7", "5:1"):
        assert words in svg
    # Higher logits stand higher: -9 is lowest, 0.5 is highest.
    heights = sorted((y for _, _, y, _ in points[:4]), reverse=True)
    assert [y for _, _, y, _ in points[:4]].index(heights[0]) == 0
    missing = repair | {"late_edited": {**figure(0.0), "value": None}}
    assert len(dots(repair_figure(missing))) == 9


def test_the_page_of_an_audit_has_the_grid_both_figures_and_the_controls(audited):
    page = (audited / "report.html").read_text()
    report = json.loads((audited / "report.json").read_text())
    cells = re.findall(r'<td class="s\d+ (checked)?" title="([^"]*)"', page)
    assert len(cells) == 8
    said = {re.match(r"layer (\d), head (\d)", title)[0]: title for _, title in cells}
    assert len(said) == 8
    for each in report["heads"]["heads"]:
        title = said[f"layer {each['layer']}, head {each['head']}"]
        assert re.search(r"contribution .*\(.* to .*\)", title)
        assert ("over the end template" in title) == ("end_template" in each)
        assert ("beyond random heads" in title) == ("beyond_controls" in each)
    for words in ("by share of heads switched off", "Self-repair with the top heads"):
        assert words in page
    section = page.split('id="ablation"')[1].split("</section>")[0]
    for words in ("Top of the ranking", "Random, same layers", "Bottom of the ranking"):
        assert words in section
    assert "Sounds dangerous, refused" in section


def test_the_terminal_says_on_how_many_prompts_heads_were_switched_off(audited, capsys):
    block = json.loads((audited / "report.json").read_text())["ablation"]
    print_section(ablation(block))
    n = block["prompts"]["harmful"]
    said = capsys.readouterr().out
    assert f"All conditions ran on the same {n} harmful and" in said


def test_a_report_without_heads_has_no_such_part():
    assert sections({}, ()) == []
