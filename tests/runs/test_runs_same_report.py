import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "same_report.py"
REPORT = {"verdict": {"cliff": True}, "outcomes": [{"value": 0.5, "n": 4}], "x": None}


@pytest.fixture(scope="module")
def differences():
    return runpy.run_path(str(SCRIPT))["differences"]


def test_equal_reports_have_no_difference(differences):
    near = REPORT | {"outcomes": [{"value": 0.5 + 1e-8, "n": 4}]}
    assert list(differences(REPORT, near)) == []


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"outcomes": [{"value": 0.50001, "n": 4}]}, "report.outcomes[0].value"),
        ({"verdict": {"cliff": 1}}, "report.verdict.cliff"),
        ({"outcomes": []}, "report.outcomes: 1 and 0"),
        ({"x": 0}, "report.x"),
        ({"y": 0}, "report.y: in one report alone"),
    ],
)
def test_a_changed_figure_is_named_by_its_place(differences, change, place):
    [found] = differences(REPORT, REPORT | change)
    assert found.startswith(place)
