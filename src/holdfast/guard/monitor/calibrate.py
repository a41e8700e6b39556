"""Fit live detectors on a study, set their thresholds, and write the bundle.

Three kinds of rows, by base request: directions and scales are made of training rows,
thresholds of one half of the test rows, and the other half is for whoever measures.
Directions may see answers that an attack got; thresholds see benign answers alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from holdfast.cliff.probe_files import check_current, names
from holdfast.dynamics.sources import PUBLISHED, anchor_names
from holdfast.errors import SettingsError, TooFewExamplesError
from holdfast.guard.conformal import MIN_REACH, Threshold, conformal_threshold
from holdfast.guard.monitor.bundle import Bundle, Calibration, range_of, write_bundle
from holdfast.guard.monitor.fit import (
    DOMAINS,
    ROLLOUTS,
    LiveRows,
    anchors_of,
    draft_of,
    families_of,
    fit_harm,
    live_rows,
    requests_by_domain,
    written_of,
)
from holdfast.guard.monitor.monitor import Monitor
from holdfast.guard.monitor.rules import ANY, TAILS, Scale
from holdfast.guard.monitor.settings import GuardBundleSettings
from holdfast.rollout.rows import Rollout, from_table
from holdfast.rollout.session import Session
from holdfast.study import Study
from holdfast.study.batches import ROW_ID, Batches
from holdfast.study.directory import Stage
from holdfast.study.files import require_empty

STAGE = "guard_bundle"
CHOSEN_AT = 0.01
"""Rate of false stops at which a detector is chosen, or the nearest there is."""
SCORES = "guard/live_scores.parquet"


def run(
    study: Study, settings: GuardBundleSettings, session: Session, directory: Path
) -> dict[str, Any]:
    """Fit detectors, set thresholds, and write the bundle.

    Args:
        study: A study with a probe; with a signal, its anchors are used too.
        settings: Rates, and shapes of the detectors.
        session: The model, and where progress is told.
        directory: Where the bundle shall lie; it appears whole or not at all.

    Returns:
        What the bundle's JSON holds.

    Raises:
        TooFewExamplesError: If there are too few benign requests to calibrate on, or
            answers that an attack got; gives the counts.
        InputError: If the study has no probe, or the directory is not empty.
    """
    require_empty(directory)
    check_current(study)
    rows = live_rows(from_table(study.read_table(ROLLOUTS)))
    _require_enough(rows, settings)
    session.check_same(study)
    anchors = anchors_of(study)
    inputs = [ROLLOUTS, *names("published")]
    inputs += anchor_names(PUBLISHED) if anchors is not None else ()
    with study.stage(
        STAGE,
        settings,
        inputs,
        progress=session.progress,
        done="The live detectors are there and up to date.",
    ) as stage:
        if not stage.is_done:
            families = families_of(rows, settings)
            fit_harm(stage, session, rows, families)
            draft = draft_of(study, settings, session.adapter, anchors)
            stage.write_table(SCORES, _scores(stage, session, draft, rows))
    draft = draft_of(study, settings, session.adapter, anchors)
    monitor = Monitor(session.adapter, draft, draft.rates[0])
    bundle = _calibrated(study, monitor, rows, settings)
    write_bundle(directory, bundle)
    return bundle.facts()


def _require_enough(rows: LiveRows, settings: GuardBundleSettings) -> None:
    counts = requests_by_domain(rows.calibration)
    found = min(counts.values(), default=0)
    if found < settings.min_calibration:
        raise TooFewExamplesError(
            f"at least {settings.min_calibration} benign requests of each kind to set "
            "thresholds (--min-calibration)",
            ", ".join(f"{n} {name}" for name, n in counts.items()) or "none",
            "Ask more benign prompts (`holdfast rollout --benign FILE`), hold more of "
            "them out (--test-fraction 0.5), or lower --min-calibration and mind the "
            "interval of the thresholds.",
        )


def _scores(stage: Stage, session: Session, draft: Bundle, rows: LiveRows) -> pa.Table:
    """Read benign rows as the monitor would, and keep the highest score of each."""
    monitor = Monitor(session.adapter, draft, draft.rates[0])
    read = [row for row in rows.fit if row.role in DOMAINS and not row.is_refused]
    read += _attacks(rows, draft)
    named = [each.name for each in draft.detectors]

    def work(batch: list[Rollout]) -> pa.Table:
        pairs = [
            (row.token_ids[: row.spans.prompt[1]], written_of(row)) for row in batch
        ]
        last = [each[-1] for each in monitor.score_texts(pairs, len(pairs))]
        columns = {name: [each.scores.get(name) for each in last] for name in named}
        return pa.table(
            {ROW_ID: [row.row_id for row in batch]}
            | {name: pa.array(column, pa.float64()) for name, column in columns.items()}
        )

    return Batches(stage, session.batch_size).run(
        [*read, *rows.calibration],
        work,
        name=lambda row: row.row_id,
        length=lambda row: len(row.token_ids),
        label="Reading benign answers",
    )


def _calibrated(
    study: Study, monitor: Monitor, rows: LiveRows, settings: GuardBundleSettings
) -> Bundle:
    """Return the bundle with scales of training rows and thresholds of the others."""
    table, draft = study.read_table(SCORES), monitor.bundle
    place = {name: i for i, name in enumerate(table.column(ROW_ID).to_pylist())}
    fitted = [place[row.row_id] for row in rows.fit if row.row_id in place]
    columns = {
        each.name: table.column(each.name).to_pylist() for each in draft.detectors
    }
    scales = {
        name: scale
        for name, column in columns.items()
        if (scale := _scale([column[i] for i in fitted])) is not None
    }
    # Where a detector had nothing to read of any training row, there is no threshold.
    columns = {name: column for name, column in columns.items() if name in scales}
    columns[ANY] = [
        max(
            (
                scales[name].rarity(column[i])
                for name, column in columns.items()
                if column[i] is not None
            ),
            default=None,
        )
        for i in range(len(table))
    ]
    at = [place[row.row_id] for row in rows.calibration]
    own = {name: [column[i] for i in at] for name, column in columns.items()}
    thresholds = {
        name: {
            rate: threshold_of(column, rows.calibration, rate)
            for rate in settings.rates
        }
        for name, column in own.items()
    }
    attacks = _attacks(rows, draft)
    found = {
        name: _found(
            [column[place[row.row_id]] for row in attacks], attacks, thresholds[name]
        )
        for name, column in columns.items()
    }
    # Of those that find as many, the one that lets most refusals through.
    best = max(found, key=lambda name: (found[name]["found"], -found[name]["refused"]))
    chosen = {"acts_on": best} if settings.acts_on is None and attacks else {}
    if settings.acts_on not in (None, *thresholds):
        raise SettingsError(
            f"a detector among {', '.join(thresholds)}",
            str(settings.acts_on),
            "Name one with --acts-on, or leave it away.",
        )
    return Bundle(
        **{
            **{name: getattr(draft, name) for name in draft.__dataclass_fields__},
            "detectors": tuple(d for d in draft.detectors if d.name in scales),
            "scales": scales,
            "thresholds": thresholds,
            "calibration": _calibration(monitor, rows.calibration),
            "study": {**draft.study, "chosen_on": found},
        }
        | chosen
    )


def _attacks(rows: LiveRows, draft: Bundle) -> list[Rollout]:
    """Return the attacks that a detector is chosen on, with those that failed."""
    families = draft.study["families"]
    return [row for row in rows.choice if row.wrapper in families]


def _found(
    column: Sequence[float | None],
    attacks: Sequence[Rollout],
    thresholds: Mapping[float, Threshold],
) -> dict[str, Any]:
    """Return how many attacks a detector finds at the rate it is chosen at.

    And how many of those it flags that were refused anyway.
    """
    rate = min(thresholds, key=lambda each: abs(each - CHOSEN_AT))
    limit = thresholds[rate].value
    above = [
        row.is_refused
        for each, row in zip(column, attacks, strict=True)
        if each is not None and each > limit
    ]
    refused = sum(row.is_refused for row in attacks)
    return {
        "rate": rate,
        "n": len(attacks) - refused,
        "found": len(above) - sum(above),
        "n_refused": refused,
        "refused": sum(above),
    }


def _scale(column: Sequence[float | None]) -> Scale | None:
    """Return how rare scores are among training rows; None where there are none."""
    known = torch.tensor([each for each in column if each is not None]).double()
    if not len(known):
        return None
    knots = known.quantile(1 - torch.tensor(TAILS, dtype=torch.float64)).tolist()
    # Scores that many rows share are one knot; the next lies a little above it.
    least = max(1e-6, MIN_REACH * (knots[-1] - knots[0]))
    for at in range(1, len(knots)):
        knots[at] = max(knots[at], knots[at - 1] + least)
    return Scale(tuple(knots))


def threshold_of(
    column: Sequence[float | None], rows: Sequence[Rollout], rate: float
) -> Threshold:
    """Return the highest of the thresholds that each kind of request needs.

    A row of which a detector read nothing scores below all others: it is never flagged,
    and counts as benign all the same.
    """
    found = []
    lowest = min((each for each in column if each is not None), default=0.0) - 1
    for role in DOMAINS:
        own = [i for i, row in enumerate(rows) if row.role == role]
        if own:
            scores = [column[i] for i in own]
            known = [lowest if each is None else each for each in scores]
            requests = [rows[i].request_id for i in own]
            tensor = torch.tensor(known, dtype=torch.float64)
            found.append(conformal_threshold(tensor, requests, rate))
    return max(found, key=lambda each: each.value)


def _calibration(monitor: Monitor, rows: Sequence[Rollout]) -> Calibration:
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: row.row_id):
        digest.update(f"{row.request_id} {row.token_ids}\n".encode())
    lengths = {
        "prompt": max(row.spans.prompt[1] for row in rows),
        "thinking": max(row.spans.answer[0] - row.spans.prompt[1] for row in rows),
        "answer": max(len(row.token_ids) - row.spans.answer[0] for row in rows),
    }
    return Calibration(
        n_rows=len(rows),
        n_requests=len({row.request_id for row in rows}),
        requests=requests_by_domain(rows),
        sha256=digest.hexdigest(),
        longest=lengths,
        scripts=range_of(
            monitor.rules.text(
                list(row.token_ids[: row.spans.prompt[1]]), special=False
            )
            for row in rows
        ),
    )
