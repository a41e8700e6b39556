"""Fit detectors on the signal of benign answers, and try them on attacks."""

from pathlib import Path
from statistics import median
from typing import Any

from holdfast.analysis.detection import calibrate
from holdfast.analysis.detector_kinds import fit_detectors
from holdfast.errors import TooFewExamplesError
from holdfast.session.anchor_files import require_identity
from holdfast.session.context import Session
from holdfast.session.figures import study_seed
from holdfast.session.guard_files import (
    FACTS,
    TENSORS,
    Guard,
    read_guard,
    write_guard,
)
from holdfast.session.guard_records import (
    detection_rows,
    recommended,
    streaming_rows,
    within_wrappers,
)
from holdfast.session.guard_rows import (
    ROLLOUTS,
    Seen,
    attacks,
    benign_tests,
    choose_families,
    fit_rows,
    joined,
    read_seen,
)
from holdfast.session.signal_files import SIGNAL
from holdfast.session.signal_rows import requests_of
from holdfast.session.signal_settings import GuardEvaluateSettings, GuardFitSettings
from holdfast.study import Study

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
    state, _ = study.stage(FIT, settings, inputs)
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
    state, _ = study.stage(EVALUATE, key, inputs)
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
