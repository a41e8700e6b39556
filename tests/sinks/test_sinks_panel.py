"""What the page shows of the sink: the curve of a run, the grid, and the words."""

import re

import pytest

from holdfast.audit.compare import compare
from holdfast.audit.page import render
from holdfast.audit.panel import print_report
from holdfast.errors import InputError
from holdfast.report.schema import validate
from holdfast.report.section import Grid
from holdfast.report.terminal import print_section
from holdfast.sinks.panel import (
    count,
    curve_figure,
    mass,
    points,
    section,
)
from report_fixture import fig, make_report, null


def checkpoint(step, positive, low, high, harmful):
    return {
        "name": f"runs/mended/checkpoint-{step}",
        "step": step,
        "weights_sha256": "a" * 64,
        "positive": {"value": positive, "low": low, "high": high, "n": 40},
        "by_chance": {"value": 6.0, "low": 2.0, "high": 10.0, "n": 40},
        "above": int(low),
        "below": 1,
        "measured": 12,
        "mean_divergence": fig(0.01, 40, 0.005),
        "penalty": fig(0.012, 40, 0.004),
        "harmful": fig(harmful, 40, 0.02),
        "reference": fig(0.5, 40, 0.02),
        "uniform": 0.05,
    }


def head(layer, place, value, width=0.01):
    return {
        "layer": layer,
        "head": place,
        "harmful": fig(0.5 + value, 40, 0.02),
        "reference": fig(0.5, 40, 0.02),
        "divergence": {
            "value": value,
            "low": value - width,
            "high": value + width,
            "n": 40,
        },
    }


CURVE = [
    checkpoint(step, *numbers)
    for step, *numbers in (
        (0, 6.0, 4.0, 8.0, 0.5),
        (50, 9.0, 7.0, 11.0, 0.55),
        (100, 12.0, 11.0, 12.0, 0.75),
    )
]
VALUES = (0.04, -0.02, 0.005, 0.0, 0.02, -0.04)


def block():
    heads = [head(i // 3, i % 3, value) for i, value in enumerate(VALUES)]
    return {
        "pairing": "prompt",
        "positions": "all",
        "n_layers": 2,
        "n_heads": 3,
        "rows": {"harmful": 40, "reference": 40},
        "requests": 40,
        "tokens": {"harmful": 80.5, "reference": 60.0},
        "sources": {
            name: {"source": f"{name}.jsonl", "sha256": "b" * 64, "rows": 40}
            | {"prompts": 40, "paired": 40}
            for name in ("harmful", "reference")
        },
        "checkpoints": CURVE,
        "heads": heads,
        "evidence": ["12 of 12 heads diverge."],
        "notes": [],
    }


def made():
    return make_report() | {"sinks": block()}


def dots(svg):
    found = re.findall(
        r'aria-label="([^"]*)"[^>]*aria-roledescription="point"'
        r'[^>]*transform="translate\(([\d.]+),([\d.]+)\)"',
        svg,
    )
    return [(label, float(x), float(y)) for label, x, y in found]


def test_the_curve_stands_at_the_numbers_of_every_checkpoint():
    """220 pixels are 12 heads on the left, and all of attention on the right."""
    points_of = dots(curve_figure(CURVE))
    assert len(points_of) == 3 + 2 * 3
    heights = [1 - y / 220 for _, _, y in points_of]
    assert heights[:3] == pytest.approx([6 / 12, 9 / 12, 1.0], abs=2e-3)
    assert heights[3:6] == pytest.approx([0.5, 0.55, 0.75], abs=2e-3)
    assert heights[6:] == pytest.approx([0.5] * 3, abs=2e-3)
    across = [x for _, x, _ in points_of[:3]]
    assert across == sorted(across)


def test_steps_stand_in_the_order_of_the_run_and_not_of_the_alphabet():
    svg = curve_figure([CURVE[1], CURVE[2], CURVE[0]])
    labels = re.findall(r">(\d\. step \d+)<", svg)[:3]
    assert labels == ["1. step 50", "2. step 100", "3. step 0"]


def test_a_checkpoint_that_could_not_be_counted_has_no_point():
    odd = CURVE[1] | {"positive": null("one base request alone gives no interval")}
    assert len(dots(curve_figure([CURVE[0], odd, CURVE[2]]))) == 2 + 2 * 3


def test_the_grid_is_orange_where_heads_look_more_on_harmful_text():
    parts = section(block()).parts
    squares = [
        s for _, row in next(p for p in parts if isinstance(p, Grid)).rows for s in row
    ]
    assert [square.tone for square in squares] == [0, 7, 4, 5, 3, 10]
    sure = [square.kind == "checked" for square in squares]
    assert sure == [True, True, False, False, True, True]
    assert "layer 0, head 0" in squares[0].title
    assert "divergence +4.00 (3.00 to 5.00) points" in squares[0].title
    assert {row[0] for row in parts[-1].parts[0].rows[:2]} == {"0 : 0", "1 : 2"}


def test_the_page_has_the_section_and_a_link_to_it():
    page = render(made(), [], [])
    assert 'href="#sinks"' in page
    shown = page.split('id="sinks"')[1].split("</section>")[0]
    for words in ("12 (11 to 12) of 12", "2 to 10", "step 50", "+4.00 (3.00 to 5.00)"):
        assert words in shown
    assert 'id="sinks"' not in render(make_report(), [], [])


def test_a_report_of_sinks_alone_is_a_page_of_its_own(capsys):
    report = made()
    for outcomes in report["outcomes"].values():
        for key in outcomes:
            outcomes[key] = null("nothing was asked")
    page = render(report, [], [])
    assert "measurement of" in page
    assert "12 of 12 heads diverge." in page
    assert 'id="trace"' not in page
    print_report(report)
    shown = capsys.readouterr().out
    print_section(section(report["sinks"]))
    assert shown == capsys.readouterr().out
    assert "12 of 12 heads diverge." in shown


def test_the_schema_refuses_a_block_that_lacks_what_it_must_have():
    validate(made())
    for key in ("checkpoints", "heads", "pairing"):
        report = made()
        del report["sinks"][key]
        with pytest.raises(InputError, match=key):
            validate(report)


def test_two_studies_are_compared_by_their_last_models():
    other = made()
    other["sinks"]["checkpoints"] = CURVE[:1]
    rows = {row["metric"]: row for row in compare(made(), other)["rows"]}
    assert rows["Heads that diverge"]["difference"] == -6.0
    assert rows["Heads that diverge"]["overlap"] is False
    assert rows["Harmful text"]["difference"] == pytest.approx(-0.25)


def test_masses_and_points_show_as_many_digits_as_say_something():
    assert mass(fig(0.1234, 9, 0.01)) == "12.34% (11.34 to 13.34%)"
    assert points(fig(0.0035, 9, 0.001)) == "+0.35 (0.25 to 0.45)"
    assert points(fig(-0.0002, 9, 0.0001)) == "−0.020 (−0.030 to −0.010)"
    assert points(fig(0.0, 9, 0.0)) == "0.00 (0.00 to 0.00)"
    assert count({"value": 41.0, "low": 30.2, "high": 52.0, "n": 9}) == "41 (30 to 52)"
    assert count(null("too few")) == "not measured: too few"
