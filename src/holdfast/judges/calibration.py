"""Calibration records: what a judge's verdicts are worth, kept where rates find it.

A record belongs to one judge, down to the bytes of its prompt: with another template,
model or version the agreement that was measured says nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from holdfast.errors import InputError
from holdfast.judges.base import JudgeIdentity
from holdfast.study import fingerprint

SCHEMA = "holdfast-calibration/1"
BRIEF = ("two_way", "three_way", "people_two_way", "people_three_way", "read")


def identity_record(identity: JudgeIdentity) -> dict[str, Any]:
    """Return the judge as JSON, with the label that its verdicts carry."""
    record = asdict(identity)
    record["settings"] = dict(identity.settings)
    return {"label": identity.label, **record}


def is_same(one: dict[str, Any] | str, other: dict[str, Any]) -> bool:
    """Return whether two records name one judge, wherever its server stands.

    `one`: A record, or the label alone, as older studies have it.
    """
    if isinstance(one, str):
        return bool(one == other["label"])
    known, here = (
        each | {"settings": {**each["settings"], "url": None}} for each in (one, other)
    )
    return known == here


def file_name(identity: JudgeIdentity) -> str:
    """Return the name of the file in which this judge's record lies."""
    stem = "".join(c if c.isalnum() or c in "-." else "-" for c in identity.label)
    return f"{stem}-{fingerprint(identity_record(identity))[:12]}.json"


def find_calibration(
    identity: JudgeIdentity, folders: Sequence[str | Path] = ()
) -> dict[str, Any] | None:
    """Return the calibration record of a judge, if it was ever calibrated.

    The record of the rules on the XSTest labels comes with the package; one of the
    user's own goes before it.

    `folders`: Where `holdfast judge calibrate` wrote its records.
    """
    for folder in folders:
        path = Path(folder) / file_name(identity)
        if path.is_file():
            record = _read(path.read_text(encoding="utf-8"), str(path))
            # A record without a kappa, as older versions wrote, is none.
            kappas = (record["pooled"][key]["value"] for key in BRIEF[:2])
            return record if any(kappa is not None for kappa in kappas) else None
    bundled = files("holdfast.judges").joinpath("calibration.json")
    if bundled.is_file():
        record = _read(bundled.read_text(encoding="utf-8"), "calibration.json")
        if record["judge"] == identity_record(identity):
            return record
    return None


def brief(record: dict[str, Any]) -> dict[str, Any]:
    """Return what of a record travels with a rate: the pooled figures and sources."""
    return {
        "judge": record["judge"]["label"],
        **{key: record["pooled"][key] for key in BRIEF},
        "sources": [
            {key: source[key] for key in ("name", "sha256", "rows")}
            for source in record["sources"]
        ],
    }


def _read(text: str, name: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"a calibration record in {name}",
            f"a damaged file ({error})",
            "Remove it and run `holdfast judge calibrate` again.",
        ) from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise InputError(
            f"a record of schema {SCHEMA} in {name}",
            "another one",
            "Run `holdfast judge calibrate` again.",
        )
    return record
