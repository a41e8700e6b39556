"""What detectors do on test rows, as figures."""

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

from holdfast.analysis.auroc import auroc_difference, stratified_auroc
from holdfast.analysis.bootstrap import undefined
from holdfast.analysis.conformal import first_flagged, running_maximum
from holdfast.analysis.detection import (
    ATTACK_COMPLIED,
    Calibrated,
    Detection,
    detect,
)
from holdfast.analysis.detector_kinds import PUBLISHED
from holdfast.analysis.statistics import clustered_rate
from holdfast.session.figures import figure_of, generator
from holdfast.session.guard_rows import Seen
from holdfast.session.signal_rows import groups_of, requests_of

Detectors = Mapping[str, Calibrated]


def usable(detectors: Detectors, seen: Seen) -> dict[str, Calibrated]:
    """Return the detectors whose channel these rows have."""
    return {
        name: each
        for name, each in detectors.items()
        if each.detector.channel in seen.channels
    }


def detection_rows(
    detectors: Detectors, benign: Seen, attack: Seen, where: str, seed: int
) -> list[dict[str, Any]]:
    """Return one record a detector: attacks against benign rows.

    Args:
        detectors: Each with its thresholds.
        benign: Benign test rows.
        attack: Harmful rows.
        where: Names the condition; every figure draws by it.
        seed: Seed of the study.
    """
    seen = benign.beside(attack)
    groups, requests = groups_of(seen.rows), requests_of(seen.rows)
    attacked = [group == ATTACK_COMPLIED for group in groups]
    kept = [
        place
        for place, row in enumerate(seen.rows)
        if attacked[place] or row.label == "benign"
    ]
    labels = torch.tensor([attacked[place] for place in kept], dtype=torch.bool)
    names = [requests[place] for place in kept]
    scores = {
        name: each.detector.score(seen.channels[each.detector.channel])
        for name, each in usable(detectors, seen).items()
    }
    made = []
    for name, column in scores.items():
        draws = _draws(seed, f"guard/{where}/{name}")
        found = detect(column, detectors[name].thresholds, groups, requests, draws)
        record = {"detector": name, **_figures(found)}
        if name != PUBLISHED and PUBLISHED in scores and found.auroc.value is not None:
            difference = auroc_difference(
                column[kept], scores[PUBLISHED][kept], labels, names, draws("published")
            )
            record["auroc_minus_published"] = figure_of(difference)
        made.append(record)
    return made


def streaming_rows(
    detectors: Detectors, benign: Seen, attack: Seen, level: float, seed: int
) -> list[dict[str, Any]]:
    """Return one record a detector that is asked after every step.

    Args:
        detectors: Each with its thresholds.
        benign: Benign test rows.
        attack: Harmful rows.
        level: Rate of false positives over all steps together.
        seed: Seed of the study.
    """
    complied = attack.only(lambda row: not row.is_refused)
    made = []
    for name, each in usable(detectors, benign.beside(attack)).items():
        record: dict[str, Any] = {"detector": name}
        for key, seen in (("false_positives", benign), ("detected", complied)):
            if not seen.rows:
                record[key] = figure_of(undefined(0, "there are no such rows"))
                continue
            prefixes = each.detector.prefixes(seen.channels[each.detector.channel])
            path = running_maximum(prefixes, each.scale)
            step = first_flagged(path, each.path_thresholds[level])
            flagged = step < path.shape[1]
            draws = generator(seed, f"guard/streaming/{name}/{key}")
            rate = clustered_rate(flagged, requests_of(seen.rows), draws)
            record[key] = figure_of(rate)
            steps = (step[flagged] + 1).tolist()
            record[f"{key}_median_step"] = median(steps) if steps else None
        made.append(record)
    return made


def within_wrappers(
    detectors: Detectors, benign: Seen, attack: Seen, seed: int
) -> list[dict[str, Any]]:
    """Return the AUROC of each detector over pairs in the same wrapper.

    A detector that sees the wrapper and not the failure has 0.5 here.

    Args:
        detectors: Each with its thresholds.
        benign: Benign test rows in wrappers.
        attack: Harmful rows.
        seed: Seed of the study.
    """
    seen = benign.beside(attack.only(lambda row: not row.is_refused))
    labels = torch.tensor(
        [row.label == "harmful" for row in seen.rows], dtype=torch.bool
    )
    strata = [str(row.wrapper) for row in seen.rows]
    made = []
    for name, each in usable(detectors, seen).items():
        if not seen.rows:
            found = undefined(0, "there are no rows in wrappers")
        else:
            found = stratified_auroc(
                each.detector.score(seen.channels[each.detector.channel]),
                labels,
                strata,
                requests_of(seen.rows),
                generator(seed, f"guard/within/{name}"),
            )
        made.append({"detector": name, "auroc": figure_of(found)})
    return made


def recommended(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the detector whose AUROC is surely the highest, on families to choose on.

    Args:
        rows: Records of `detection_rows` on those families.

    Returns:
        Its name and its figure there; the highest lower end decides.
    """
    known = [row for row in rows if row["auroc"]["low"] is not None]
    if not known:
        reason = rows[0]["auroc"].get("reason") if rows else "no detector was fitted"
        return {"detector": None, "reason": reason}
    best = max(known, key=lambda row: float(row["auroc"]["low"]))
    return {"detector": best["detector"], "auroc": best["auroc"]}


def _figures(found: Detection) -> dict[str, Any]:
    return {
        "auroc": figure_of(found.auroc),
        "levels": [
            {
                "level": level,
                "false_positives": figure_of(found.false_positives[level]),
                **{group: figure_of(each) for group, each in groups.items()},
            }
            for level, groups in found.flagged.items()
        ],
    }


def _draws(seed: int, name: str) -> Callable[[str], torch.Generator]:
    return lambda part: generator(seed, f"{name}/{part}")
