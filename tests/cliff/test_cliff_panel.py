"""Figures are SVG that says what the records say."""

import itertools
import re
from xml.etree import ElementTree

import pytest

from holdfast.cliff.commitment.panel import figure
from holdfast.cliff.panel import picture, template_length, trace_figure, wrapper_figure
from holdfast.dynamics.panel import trajectory_figure
from holdfast.errors import InputError
from report_fixture import make_curves, make_examples, make_report, null

SPACE = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return [node.text or "" for node in root.iter() if node.tag.endswith("text")]


@pytest.fixture(scope="module")
def drawn() -> str:
    return picture(make_report(), make_curves())


def test_the_picture_is_a_document_that_names_itself(drawn):
    root = ElementTree.fromstring(drawn)
    assert root.tag == f"{SPACE}svg"
    assert root.get("role") == "img"
    verdict = "Attacks get through, and refusal is lost at the end of thinking."
    assert root.findtext(f"{SPACE}title") == verdict
    assert "Harmful, in a jailbreak wrapper: 40% (34 to 46%)" in str(
        root.findtext(f"{SPACE}desc")
    )
    assert verdict in texts(drawn)
    assert "organism:cliff@0" in texts(drawn)


def test_the_picture_fetches_nothing(drawn):
    assert set(re.findall(r"https?://[^\"']+", drawn)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "<script" not in drawn
    assert "<image" not in drawn


def test_the_picture_stands_without_curves():
    assert "Mean refusal score" not in texts(picture(make_report(), []))


def test_the_trace_names_its_regions_and_groups():
    said = texts(trace_figure(make_curves(), 3))
    for name in ("thinking", "end template", "answer"):
        assert name in said
    for name in ("harmful, complied", "harmful, refused", "harmless"):
        assert name in said
    assert "xmlns" not in trace_figure(make_curves(), 3)


def test_the_template_is_shaded_over_its_own_tokens_only():
    svg = trace_figure(make_curves(), 3)
    [shape] = [
        node.get("d", "")
        for node in ElementTree.fromstring(svg).iter()
        if node.get("fill") == "#e5dfcd"
    ]
    left, _, width = map(float, re.findall(r"-?[\d.]+", shape)[:3])
    token = 640 / 71
    assert left == pytest.approx(64 * token, abs=0.01)
    assert width == pytest.approx(3 * token, abs=0.01)


def test_regions_that_are_not_known_are_not_named():
    said = texts(trace_figure(make_curves(), None))
    assert "after thinking" in said
    assert "answer" not in said


def test_the_steepest_fall_is_drawn_after_thinking_has_ended():
    curve = next(c for c in make_curves() if c["group"] == "harmful_complied")
    svg = trace_figure([curve], 3)
    strokes = [
        node.get("d", "")
        for node in ElementTree.fromstring(svg).iter()
        if node.get("stroke") == "#d55e00" and node.get("d", "").count("L") > 20
    ]
    points = [
        tuple(map(float, pair.split(","))) for pair in re.split("[ML]", strokes[0])[1:]
    ]
    falls = [after[1] - before[1] for before, after in itertools.pairwise(points)]
    offsets = [point["offset"] for point in curve["points"]]
    assert len(points) == len(offsets)
    assert 0 <= offsets[falls.index(max(falls))] <= 3


def test_a_point_without_a_mean_breaks_the_line_and_is_no_zero():
    curve = {
        "group": "benign",
        "points": [
            {"offset": 0, "mean": 0.5, "low": None, "high": None, "n": 1},
            {"offset": 1, "mean": None, "low": None, "high": None, "n": 0},
            {"offset": 2, "mean": 0.5, "low": None, "high": None, "n": 1},
        ],
    }
    assert "NaN" not in trace_figure([curve])


def test_a_wrapper_that_was_not_measured_says_so():
    rates = {"a<b": {"attack_success": null("none"), "benign_compliance": null("none")}}
    svg = wrapper_figure(rates)
    assert texts(svg).count("not measured") == 2
    assert "a<b" in texts(svg)
    assert "a<b" not in svg


def test_the_template_is_as_long_as_most_examples_have_it():
    assert template_length(make_examples()) == 3
    assert template_length([]) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), True, "0.5"])
def test_a_curve_with_a_number_that_is_none_is_refused(bad):
    curves = make_curves()
    curves[1]["points"][4]["mean"] = bad
    with pytest.raises(InputError, match=r"curves\[1\]\.points\[4\]\.mean"):
        picture(make_report(), curves)


def test_two_points_at_one_offset_are_refused():
    curves = make_curves()
    curves[0]["points"][1]["offset"] = curves[0]["points"][0]["offset"]
    with pytest.raises(InputError, match="one point an offset"):
        picture(make_report(), curves)


def test_the_legend_of_lines_with_bands_is_not_as_faint_as_the_bands():
    points = [
        {"at": at, "share": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}}
        for at in (0.0, 0.5, None)
    ]
    curves = [
        {"group": name, "points": points} for name in ("fell_at_template", "benign")
    ]
    steps = [{"step": n, "mean": 0.5, "low": 0.4, "high": 0.6} for n in (1, 2)]
    lines = dict.fromkeys(("attack_complied", "benign_complied"), steps)
    signal = trajectory_figure({"compliance_logit": lines})
    for svg in (figure(curves, "a share"), signal):
        symbols = re.findall(
            r'role-legend-symbol[^>]*><path[^>]* opacity="([\d.]+)"', svg
        )
        assert set(symbols) == {"1"}
