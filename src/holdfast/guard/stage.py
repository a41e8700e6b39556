"""Fit detectors on the signal of benign answers, and measure them on attacks."""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from holdfast.dynamics.rows import ROLLOUTS, SIGNAL, SignalRows, is_harmful
from holdfast.dynamics.sources import require_identity
from holdfast.errors import TooFewExamplesError
from holdfast.guard.conformal import first_flagged, running_maximum
from holdfast.guard.detection import NO_ROWS, Calibrated, calibrate, detect
from holdfast.guard.detectors import PUBLISHED, fit_detectors
from holdfast.guard.files import FACTS, TENSORS, Guard, read_guard, write_guard
from holdfast.guard.rows import (
    PLAIN,
    WRAPPED,
    attacks,
    benign_tests,
    choose_families,
    fit_rows,
    read_rows,
)
from holdfast.guard.settings import GuardEvaluateSettings, GuardFitSettings
from holdfast.rollout.rows import Rollout
from holdfast.rollout.session import Session
from holdfast.stats.auroc import auroc_difference, auroc_interval
from holdfast.stats.bootstrap import undefined
from holdfast.stats.groups import ATTACK_COMPLIED, ATTACK_REFUSED
from holdfast.stats.rates import clustered_rate
from holdfast.study import Study
from holdfast.study.figures import draws_of, figure_of, generator, study_seed

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
    with study.stage(
        FIT,
        settings,
        [SIGNAL, ROLLOUTS],
        progress=session.progress,
        done="The detectors are there and up to date.",
    ) as stage:
        if not stage.is_done:
            guard = _fit(study, settings, session)
            stage.outputs += write_guard(study, guard)
    return dict(study.read_json(FACTS))


def _fit(study: Study, settings: GuardFitSettings, session: Session) -> Guard:
    signal, seed = read_rows(study), study_seed(study)
    train, calibration = fit_rows(signal, wrapped=settings.wrapped)
    n_requests = {
        "train": len(set(train.requests)),
        "calibration": len(set(calibration.requests)),
    }
    if n_requests["calibration"] < settings.min_calibration:
        raise TooFewExamplesError(
            f"at least {settings.min_calibration} benign requests to set thresholds "
            "(--min-calibration)",
            f"{n_requests['calibration']}, beside {n_requests['train']} to fit on",
            "Ask more benign prompts (`holdfast rollout --benign FILE`), or lower "
            "--min-calibration and mind the interval of the thresholds.",
        )
    session.progress.say(f"Fitting detectors on {len(train.rows)} benign answers.")
    detectors = fit_detectors(
        train.channels, train.requests, seed=seed, min_requests=settings.min_train
    )
    calibrated = {
        name: calibrate(
            each,
            train.channels[each.channel],
            calibration.channels[each.channel],
            calibration.requests,
            settings.rates,
        )
        for name, each in detectors.items()
    }
    facts = {
        **signal.facts,
        "seed": seed,
        "requests": n_requests,
        "roles": [PLAIN, WRAPPED] if settings.wrapped else [PLAIN],
        "rates": list(settings.rates),
    }
    return Guard(calibrated, facts)


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
    opened = [Study.open(each) for each in others]
    # Where another study lies is no part of the result, so its hash is a setting.
    hashes = {each.directory.name: each.input_hash(SIGNAL) for each in opened}
    with study.stage(
        EVALUATE,
        {"settings": settings, "others": hashes},
        [SIGNAL, ROLLOUTS, TENSORS, FACTS],
        progress=session.progress,
        done="The detectors have been tried, and nothing has changed.",
    ) as stage:
        if stage.is_done:
            return stage.read_json(OUTPUT)
        return stage.write_json(OUTPUT, _evaluate(study, opened, settings))


def _evaluate(
    study: Study, others: Sequence[Study], settings: GuardEvaluateSettings
) -> dict[str, Any]:
    """Read the signals of all studies, and return the tables on them."""
    guard = read_guard(study.directory)
    signals = {"": read_rows(study)}
    signals |= {f"{each.directory.name}: ": read_rows(each) for each in others}
    benign: dict[str, SignalRows] = {}
    families: dict[str, SignalRows] = {}
    for prefix, signal in signals.items():
        _require_same(guard, signal)
        benign |= {prefix + name: each for name, each in benign_tests(signal).items()}
        families |= {prefix + name: each for name, each in attacks(signal).items()}
    nothing = signals[""].empty()
    return _tables(guard, nothing, benign, families, settings, study_seed(study))


def _require_same(guard: Guard, signal: SignalRows) -> None:
    """Refuse a signal of another model, sampler, mode or pair of anchors."""
    wanted, found = (
        facts["identity"] | {key: facts[key] for key in ("mode", "anchors")}
        for facts in (guard.facts, signal.facts)
    )
    require_identity(found, wanted)


def _tables(
    guard: Guard,
    nothing: SignalRows,
    benign: dict[str, SignalRows],
    families: dict[str, SignalRows],
    settings: GuardEvaluateSettings,
    seed: int,
) -> dict[str, Any]:
    chosen, reported = choose_families(sorted(families), settings.choose_on)
    own = benign.get("plain", nothing)
    chosen_on, reported_on = (
        reduce(SignalRows.concat, (families[name] for name in names), nothing)
        for names in (chosen, reported)
    )
    detectors = guard.detectors

    def table(
        harmless: SignalRows, harmful: SignalRows, where: str
    ) -> list[dict[str, Any]]:
        return detection_rows(detectors, harmless, harmful, where, seed)

    by_length: dict[str, Any] = {}
    if own.rows:
        middle = median(len(row.answer) for row in own.rows)
        by_length["characters"] = middle

        def half(row: Rollout) -> str:
            return "shorter" if len(row.answer) <= middle else "longer"

        halves = [each.by(half) for each in (own, reported_on)]
        for name in ("shorter", "longer"):
            harmless, harmful = (each.get(name, nothing) for each in halves)
            by_length[name] = {
                "rows": len(harmless.rows) + len(harmful.rows),
                "table": table(harmless, harmful, f"length/{name}"),
            }
    level = min(guard.facts["rates"])
    choice = table(own, chosen_on, "chosen")
    return {
        "facts": guard.facts,
        "chosen_on": chosen,
        "reported_on": reported,
        "recommended": recommended(choice),
        "chosen": choice,
        "reported": table(own, reported_on, "reported"),
        "by_family": {
            name: {"rows": len(each.rows), "table": table(own, each, f"family/{name}")}
            for name, each in families.items()
        },
        "by_domain": {
            name: {
                "rows": len(each.rows),
                "table": table(each, nothing, f"domain/{name}"),
            }
            for name, each in benign.items()
        },
        "by_length": by_length,
        "within_wrappers": within_wrappers(
            detectors, benign.get("in wrappers", nothing), reported_on, seed
        ),
        "streaming": {
            "level": level,
            "table": streaming_rows(detectors, own, reported_on, level, seed),
        },
        "notes": _notes(benign, settings, families),
    }


def _notes(
    benign: dict[str, SignalRows],
    settings: GuardEvaluateSettings,
    families: dict[str, SignalRows],
) -> list[str]:
    notes = [
        f"There are fewer than {settings.min_test} benign test rows in the domain "
        f"`{name}` ({len(each.rows)}): mind the intervals of its false positives."
        for name, each in benign.items()
        if len(each.rows) < settings.min_test
    ]
    if len(families) < 2:
        notes.append(
            "There are fewer than two attack families, so that a detector cannot be "
            "chosen on one and reported on another."
        )
    return notes


Detectors = Mapping[str, Calibrated]


def _usable(
    detectors: Detectors, signal: SignalRows
) -> Iterator[tuple[str, Calibrated, Tensor]]:
    """Yield the detectors whose channel these rows have, each with that channel."""
    for name, each in detectors.items():
        if each.detector.channel in signal.channels:
            yield name, each, signal.channels[each.detector.channel]


def detection_rows(
    detectors: Detectors,
    benign: SignalRows,
    attack: SignalRows,
    where: str,
    seed: int,
) -> list[dict[str, Any]]:
    """Return one record per detector: attacks against benign rows."""
    signal = benign.concat(attack)
    groups, requests = signal.groups, signal.requests
    kept = [i for i, group in enumerate(groups) if group != ATTACK_REFUSED]
    labels = torch.tensor(
        [groups[i] == ATTACK_COMPLIED for i in kept], dtype=torch.bool
    )
    names = [requests[i] for i in kept]
    scores = {
        name: each.detector.score(channel)
        for name, each, channel in _usable(detectors, signal)
    }
    records = []
    for name, column in scores.items():
        draws = draws_of(seed, f"guard/{where}/{name}")
        detection = detect(column, detectors[name].thresholds, groups, requests, draws)
        record = {
            "detector": name,
            "auroc": figure_of(detection.auroc),
            "levels": [
                {
                    "level": level,
                    "false_positives": figure_of(detection.false_positives[level]),
                    **{group: figure_of(each) for group, each in flagged.items()},
                }
                for level, flagged in detection.flagged.items()
            ],
        }
        defined = detection.auroc.value is not None
        if name != PUBLISHED and PUBLISHED in scores and defined:
            difference = auroc_difference(
                column[kept], scores[PUBLISHED][kept], labels, names, draws("published")
            )
            record["auroc_minus_published"] = figure_of(difference)
        records.append(record)
    return records


def streaming_rows(
    detectors: Detectors,
    benign: SignalRows,
    attack: SignalRows,
    level: float,
    seed: int,
) -> list[dict[str, Any]]:
    """Return one record per detector that is asked after every step."""
    complied = attack.filter(lambda row: not row.is_refused)
    records = []
    for name, each, _ in _usable(detectors, benign.concat(attack)):
        record: dict[str, Any] = {"detector": name}
        for key, signal in (("false_positives", benign), ("detected", complied)):
            if not signal.rows:
                record[key] = figure_of(undefined(0, NO_ROWS))
                continue
            prefixes = each.detector.prefixes(signal.channels[each.detector.channel])
            path = running_maximum(prefixes, each.scale)
            step = first_flagged(path, each.path_thresholds[level])
            flagged = step < path.shape[1]
            draws = generator(seed, f"guard/streaming/{name}/{key}")
            record[key] = figure_of(clustered_rate(flagged, signal.requests, draws))
            steps = (step[flagged] + 1).tolist()
            record[f"{key}_median_step"] = median(steps) if steps else None
        records.append(record)
    return records


def within_wrappers(
    detectors: Detectors, benign: SignalRows, attack: SignalRows, seed: int
) -> list[dict[str, Any]]:
    """Return the AUROC of each detector over pairs in the same wrapper.

    A detector that sees the wrapper and not the failure has 0.5 here.
    """
    signal = benign.concat(attack.filter(lambda row: not row.is_refused))
    wrappers = [str(row.wrapper) for row in signal.rows]
    figures = {
        name: auroc_interval(
            each.detector.score(channel),
            is_harmful(signal.rows),
            signal.requests,
            generator(seed, f"guard/within/{name}"),
            wrappers,
        )
        if signal.rows
        else undefined(0, "there are no rows in wrappers")
        for name, each, channel in _usable(detectors, signal)
    }
    return [
        {"detector": name, "auroc": figure_of(each)} for name, each in figures.items()
    ]


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
