"""Two studies side by side."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from holdfast.errors import InputError
from holdfast.report.compare import Comparison, compare
from holdfast.report.html import render_compare
from holdfast.report.schema import validate
from holdfast.session.evaluation_sources import TABLE, is_evaluated
from holdfast.session.pairing import pair
from holdfast.study import Study, atomic_write_text, require_place


def run(first: Path, second: Path, page: Path | None = None) -> Comparison:
    """Compare the reports of two studies.

    Args:
        first: A study, or its `report.json`.
        second: Another.
        page: Where an HTML page goes; None for no page.

    Returns:
        Settings that differ, and every figure of both. Where both hold an evaluation,
        also the paired difference on every prompt that both asked.

    Raises:
        InputError: If a report is missing or not valid, or the page has no place.
        StorageError: If the page cannot be written.
    """
    if page is not None:
        require_place(page, folder=False)
    a, b = read_report(first), read_report(second)
    found = compare(a, b)
    judged = [_evaluation(place) for place in (first, second)]
    tables = [table for table in judged if table is not None]
    paired = pair(*tables) if len(tables) == 2 else []
    if paired:
        found["paired"] = paired
    if page is not None:
        atomic_write_text(page, render_compare(a, b, paired))
    return found


def _evaluation(place: Path) -> pa.Table | None:
    """Return the judged rows of a study, if it has an evaluation."""
    if place.is_file():
        place = place.parent
    if not (place / TABLE).is_file():
        return None
    study = Study.open(place)
    return study.read_table(TABLE) if is_evaluated(study) else None


def read_report(place: Path) -> dict[str, Any]:
    """Read the report of a study.

    Args:
        place: A study, or the file itself.

    Raises:
        InputError: If there is none, or it is not valid.
    """
    if place.is_file():
        try:
            report = json.loads(place.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"JSON in {place}", f"a damaged file ({error})", "Make it anew."
            ) from error
    else:
        report = Study.open(place).read_json("report.json")
    validate(report)
    return dict(report)
