"""The contract of report.json: what passes, and what is refused by its path."""

import copy
import json
import math
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from holdfast.errors import InputError
from holdfast.report.schema import SCHEMA, figure, report_schema, validate
from report_fixture import make_report


class Estimate(NamedTuple):
    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str | None


def put(report: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """Return a copy with one key replaced, or removed where value is `...`."""
    changed = copy.deepcopy(report)
    *parents, last = path.split(".")
    block = changed
    for key in parents:
        block = block[key]
    if value is ...:
        del block[last]
    else:
        block[last] = value
    return changed


def test_the_schema_is_itself_valid_and_names_the_version():
    Draft202012Validator.check_schema(report_schema())
    assert report_schema()["properties"]["schema"]["const"] == SCHEMA


def test_a_full_report_passes_before_and_after_json():
    validate(make_report())
    validate(json.loads(json.dumps(make_report(), allow_nan=False)))


def test_the_run_block_is_free_and_may_be_absent():
    validate(put(make_report(), "run", ...))
    validate(put(make_report(), "run", {"anything": [1, {"a": None}]}))


WRONG = {"value": None, "low": None, "high": None, "n": 3}
REFUSED = [
    ("schema", "holdfast-report/2", "report.schema to be 'holdfast-report/1'"),
    ("probe.auroc", ..., "report.probe to have `auroc`"),
    ("probe.auroc", 0.9, "report.probe.auroc to be object"),
    ("probe.auroc.value", "0.9", "report.probe.auroc.value to be number or null"),
    ("probe.auroc.n", -1, "report.probe.auroc.n to be at least 0"),
    ("probe.auroc.reason", "why", "report.probe.auroc to have `reason` only where"),
    ("probe.auroc.high", None, "report.probe.auroc.high to be number"),
    ("probe.auroc", WRONG, "report.probe.auroc to have `reason`"),
    ("probe.auroc.low", 1.5, "report.probe.auroc.low to be at most"),
    ("probe.auroc.value", math.nan, "report.probe.auroc.value to be a finite number"),
    ("probe.l2", math.inf, "report.probe.l2 to be a finite number"),
    ("probe.extra", {"value": 1.0}, "report.probe.extra to have `low`, `high`, `n`"),
    ("settings.path", (1, 2), "report.settings.path to be something JSON can hold"),
    ("outcomes.other", {}, "report.outcomes to have no other keys than `harmful`"),
    ("outcomes.wrapped.refused", None, "report.outcomes.wrapped.refused to be object"),
    ("verdict.cliff", "yes", "report.verdict.cliff to be boolean or null"),
    ("verdict.evidence", [""], "report.verdict.evidence[0] to be a text that is not"),
    ("trace.benign", ..., "report.trace to have `benign`"),
    ("controls.other", 3, "report.controls.other to be object"),
    ("data.splits.harmful.test", 2.5, "report.data.splits.harmful.test to be integer"),
]


@pytest.mark.parametrize(("path", "value", "expected"), REFUSED)
def test_a_fault_is_refused_by_its_path(path, value, expected):
    with pytest.raises(InputError) as caught:
        validate(put(make_report(), path, value))
    assert caught.value.expected.startswith(expected)
    assert len(str(caught.value)) < 500


def test_a_control_that_was_not_foreseen_is_welcome_as_a_figure():
    extra = {"value": 0.1, "low": None, "high": None, "n": 4}
    validate(put(make_report(), "controls.random_direction", extra))


@settings(max_examples=25)
@given(st.floats(-5, 5), st.floats(0, 1), st.integers(0, 10_000))
def test_every_finite_estimate_becomes_a_figure_that_passes(value, half, n):
    made = figure(Estimate(value, value - half, value + half, n, None))
    assert made == {"value": value, "low": value - half, "high": value + half, "n": n}
    validate(put(make_report(), "probe.auroc", made))


def test_a_missing_value_keeps_its_reason_and_loses_its_ends():
    made = figure(Estimate(None, 0.1, 0.2, 3, "too few"))
    assert made == {
        "value": None,
        "low": None,
        "high": None,
        "n": 3,
        "reason": "too few",
    }


@pytest.mark.parametrize(
    "estimate",
    [
        Estimate(math.nan, 0.1, 0.2, 3, None),
        Estimate(0.1, -math.inf, 0.2, 3, None),
        Estimate(0.1, 0.3, 0.2, 3, None),
        Estimate(None, None, None, 3, None),
        Estimate(None, None, None, 3, ""),
    ],
)
def test_an_estimate_that_says_nothing_is_no_figure(estimate):
    with pytest.raises(InputError):
        figure(estimate)
