"""Fit detectors on the signal of benign answers, and measure them on attacks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from holdfast.dynamics.rows import groups_of
from holdfast.dynamics.settings import GuardEvaluateSettings, GuardFitSettings
from holdfast.dynamics.sources import require_identity
from holdfast.dynamics.stage import SIGNAL
from holdfast.errors import TooFewExamplesError
from holdfast.guard.conformal import first_flagged, running_maximum
from holdfast.guard.detection import Calibrated, Detection, calibrate, detect
from holdfast.guard.detectors import PUBLISHED, fit_detectors
from holdfast.guard.files import FACTS, TENSORS, Guard, read_guard, write_guard
from holdfast.guard.rows import (
    ROLLOUTS,
    Seen,
    attacks,
    benign_tests,
    choose_families,
    fit_rows,
    joined,
    read_seen,
)
from holdfast.rollout.rows import requests_of
from holdfast.rollout.session import Session
from holdfast.stats.auroc import auroc_difference, stratified_auroc
from holdfast.stats.bootstrap import undefined
from holdfast.stats.groups import ATTACK_COMPLIED
from holdfast.stats.rates import clustered_rate
from holdfast.study import Study
from holdfast.study.figures import figure_of, generator, study_seed

FIT, EVALUATE = "guard_fit", "guard_evaluate"
OUTPUT = "guard/evaluation.json"


def fit(study: Study, settings: GuardFitSettings, session: Session) -> dict[str, Any]:
    """Fit every detector and set its thresholds; writes `guard/`.

    Args:
        study: A study with a signal.
        settings: Rates of false positives, and how many rows are needed.
        session: Where progress is told; the model is not loaded.

    Returns:
        Rows and requests on each side, and the thresholds of every detector.

    Raises:
        TooFewExamplesError: If there are too few benign requests to fit or to
            calibrate on; gives the counts.
        InputError: If the study has no signal of its answers.
    """
    inputs = {name: study.input_hash(name) for name in (SIGNAL, ROLLOUTS)}
    seed = study_seed(study)
    state, _ = study.begin(FIT, settings, inputs)
    if state != "done":
        seen = read_seen(study)
        rows = fit_rows(seen, wrapped=settings.wrapped)
        n_requests = {
            "train": len({row.request_id for row in rows.train.rows}),
            "calibration": len({row.request_id for row in rows.calibration.rows}),
        }
        _require(n_requests, settings)
        session.progress.say(
            f"Fitting detectors on {len(rows.train.rows)} benign answers."
        )
        detectors = fit_detectors(
            rows.train.channels,
            requests_of(rows.train.rows),
            seed=seed,
            min_requests=settings.min_train,
        )
        names = requests_of(rows.calibration.rows)
        calibrated = {
            name: calibrate(
                each,
                rows.train.channels[each.channel],
                rows.calibration.channels[each.channel],
                names,
                settings.rates,
            )
            for name, each in detectors.items()
        }
        facts = {
            **seen.facts,
            "seed": seed,
            "requests": n_requests,
            "roles": ["benign", *(["benign_wrapped"] if settings.wrapped else [])],
            "rates": list(settings.rates),
        }
        study.finish(FIT, write_guard(study, calibrated, facts))
    else:
        session.progress.say("The detectors are there and up to date.")
    return dict(study.read_json(FACTS))


def evaluate(
    study: Study,
    settings: GuardEvaluateSettings,
    session: Session,
    others: tuple[Path, ...] = (),
) -> dict[str, Any]:
    """Try fitted detectors on rows that nothing was fitted on.

    Args:
        study: A study with detectors.
        settings: Families to choose on.
        session: Where progress is told; the model is not loaded.
        others: Further studies of the same model with a signal held against the same
            anchors: other benign domains, other attacks.

    Returns:
        What `guard/evaluation.json` holds: the detector that is recommended, tables
        on the families it was chosen on and on the others, every benign domain,
        shorter and longer answers, answers looked at after every step.

    Raises:
        InputError: If there are no detectors, or another study has another signal.
    """
    read = (SIGNAL, ROLLOUTS, TENSORS, FACTS)
    inputs = {name: study.input_hash(name) for name in read}
    opened = [Study.open(each) for each in others]
    # Where another study lies is no part of the result, so its hash is a setting.
    hashes = {each.directory.name: each.input_hash(SIGNAL) for each in opened}
    key = {"settings": settings, "others": hashes}
    state, _ = study.begin(EVALUATE, key, inputs)
    if state == "done":
        session.progress.say("The detectors have been tried, and nothing has changed.")
        return dict(study.read_json(OUTPUT))
    guard = read_guard(study.directory)
    seen = read_seen(study)
    _require_same(guard, seen)
    benign, families = benign_tests(seen), attacks(seen)
    for other in opened:
        further = read_seen(other)
        _require_same(guard, further)
        name = other.directory.name
        benign |= {
            f"{name}: {key}": each for key, each in benign_tests(further).items()
        }
        families |= {f"{name}: {key}": each for key, each in attacks(further).items()}
    made = _tables(guard, seen, benign, families, settings, study_seed(study))
    study.write_json(OUTPUT, made)
    study.finish(EVALUATE, [OUTPUT])
    return made


def _require(n_requests: dict[str, int], settings: GuardFitSettings) -> None:
    if n_requests["calibration"] < settings.min_calibration:
        raise TooFewExamplesError(
            f"at least {settings.min_calibration} benign requests to set thresholds "
            "(--min-calibration)",
            f"{n_requests['calibration']}, beside {n_requests['train']} to fit on",
            "Ask more benign prompts (`holdfast rollout --benign FILE`), or lower "
            "--min-calibration and mind the interval of the thresholds.",
        )


def _require_same(guard: Guard, seen: Seen) -> None:
    """Refuse a signal of another model, sampler, mode or pair of anchors."""
    keys = ("mode", "anchors")
    wanted = guard.facts["identity"] | {key: guard.facts[key] for key in keys}
    found = seen.facts["identity"] | {key: seen.facts[key] for key in keys}
    require_identity(found, wanted)


def _tables(
    guard: Guard,
    seen: Seen,
    benign: dict[str, Seen],
    families: dict[str, Seen],
    settings: GuardEvaluateSettings,
    seed: int,
) -> dict[str, Any]:
    chosen, reported = choose_families(sorted(families), settings.choose_on)
    nothing = seen.nothing()
    own = benign.get("plain", nothing)
    chosen_on = joined(families, chosen, nothing)
    reported_on = joined(families, reported, nothing)
    detectors = guard.detectors

    def against(attack: Seen, where: str) -> list[dict[str, Any]]:
        return detection_rows(detectors, own, attack, where, seed)

    level = min(guard.facts["rates"])
    choice = against(chosen_on, "chosen")
    return {
        "facts": guard.facts,
        "chosen_on": chosen,
        "reported_on": reported,
        "recommended": recommended(choice),
        "chosen": choice,
        "reported": against(reported_on, "reported"),
        "by_family": {
            name: {"rows": len(each.rows), "table": against(each, f"family/{name}")}
            for name, each in families.items()
        },
        "by_domain": {
            name: {
                "rows": len(each.rows),
                "table": detection_rows(
                    detectors, each, nothing, f"domain/{name}", seed
                ),
            }
            for name, each in benign.items()
        },
        "by_length": _by_length(guard, own, reported_on, seed),
        "within_wrappers": within_wrappers(
            detectors, benign.get("in wrappers", nothing), reported_on, seed
        ),
        "streaming": {
            "level": level,
            "table": streaming_rows(detectors, own, reported_on, level, seed),
        },
        "notes": _notes(benign, settings, families),
    }


def _by_length(guard: Guard, benign: Seen, attack: Seen, seed: int) -> dict[str, Any]:
    """Return the table on answers below and above the median length of benign ones."""
    if not benign.rows:
        return {}
    middle = median(len(row.answer) for row in benign.rows)
    made: dict[str, Any] = {"characters": middle}
    for name, keep in (
        ("shorter", lambda row: len(row.answer) <= middle),
        ("longer", lambda row: len(row.answer) > middle),
    ):
        parts = [each.only(keep) for each in (benign, attack)]
        made[name] = {
            "rows": sum(len(part.rows) for part in parts),
            "table": detection_rows(
                guard.detectors, parts[0], parts[1], f"length/{name}", seed
            ),
        }
    return made


def _notes(
    benign: dict[str, Seen], settings: GuardEvaluateSettings, families: dict[str, Seen]
) -> list[str]:
    said = [
        f"There are fewer than {settings.min_test} benign test rows in the domain "
        f"`{name}` ({len(each.rows)}): mind the intervals of its false positives."
        for name, each in benign.items()
        if len(each.rows) < settings.min_test
    ]
    if len(families) < 2:
        said.append(
            "There are fewer than two attack families, so that a detector cannot be "
            "chosen on one and reported on another."
        )
    return said


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
    """Return one record per detector: attacks against benign rows."""
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
    """Return one record per detector that is asked after every step."""
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

    `rows`: Records of `detection_rows` on those families.
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
