"""Read the step-wise signal of every answer of a study."""

from pathlib import Path
from typing import Any

import torch

from holdfast.analysis.anchors import (
    Anchors,
    fit_anchors,
    separation,
    topic_length_strata,
)
from holdfast.analysis.dynamics import gauge, positions_of
from holdfast.errors import InputError, TooFewExamplesError
from holdfast.judges.rules import JUDGE_ID
from holdfast.session.anchor_files import (
    MATCHED,
    PUBLISHED,
    Anchored,
    names,
    read_anchors,
    write_anchors,
)
from holdfast.session.context import Session
from holdfast.session.figures import study_seed
from holdfast.session.probes import names as probe_names
from holdfast.session.probes import read_own_probe
from holdfast.session.rows import Rollout, from_table
from holdfast.session.signal_assembly import EXAMPLES
from holdfast.session.signal_examples import step_examples
from holdfast.session.signal_files import SIGNAL, write_signal
from holdfast.session.signal_reading import (
    DIFFERENCE,
    KIND,
    LOGIT,
    Readers,
    Watched,
    read_pooled,
    read_signal,
)
from holdfast.session.signal_reading import MATCHED as MATCHED_LOGIT
from holdfast.session.signal_records import Read, summary
from holdfast.session.signal_rows import (
    anchor_rows,
    is_harmful,
    is_refused,
    matched_topics,
    requests_of,
    window_of,
)
from holdfast.session.signal_settings import SignalSettings
from holdfast.study import Study

FIT, STAGE = "anchors", "signal"
ROLLOUTS = "rollouts.parquet"
SUMMARY = "signal.json"


def run(study: Study, settings: SignalSettings, session: Session) -> dict[str, Any]:
    """Fit anchors and read the signal; writes `anchors/` and `signal.safetensors`.

    Args:
        study: A study with rollouts; a probe is read along where there is one.
        settings: Mode, steps, region, anchors.
        session: The model, and where progress is told.

    Returns:
        What `signal.json` holds: figures by group and mean curves.

    Raises:
        TooFewExamplesError: If there are too few refusals or compliances for anchors.
        InputError: If the study has no rollouts, or anchors were given that belong
            to another model, sampler, number of steps or positions.
    """
    items = _watched(study, settings)
    identity = _identity(study, settings)
    if settings.anchors is None:
        directory = study.directory
        _fit(study, settings, session, items, identity)
    else:
        directory = Path(settings.anchors).expanduser()
    found = {
        name: anchored
        for name in (PUBLISHED, MATCHED)
        if (anchored := read_anchors(directory, name, identity)) is not None
    }
    return _read(study, settings, session, items, identity, found)


def _watched(study: Study, settings: SignalSettings) -> list[Watched]:
    """Return the rows whose region has a token, with the tokens that are read."""
    rows = from_table(study.read_table(ROLLOUTS))
    windows = [(row, window_of(row, settings)) for row in rows]
    items = [(row, window) for row, window in windows if window is not None]
    if not items:
        raise InputError(
            f"answers with a token or more in {study.directory}",
            f"{len(rows)} rows without",
            "Ask with a larger --max-answer, or watch --region completion.",
        )
    return items


def _identity(study: Study, settings: SignalSettings) -> dict[str, Any]:
    """Return what states must share with those behind the anchors."""
    model = study.manifest["model"]
    asked = study.record("rollout")["settings"]
    own = ("revision", "weights_sha256", "template_sha256", "dtype")
    sampling = asked.get("sampling", {})
    return {
        **{key: model[key] for key in own},
        "sampler": {"kind": KIND}
        | {key: sampling.get(key) for key in ("temperature", "top_p")},
        "system_prompt": asked.get("system_prompt"),
        "steps": settings.steps,
        "time": settings.time,
        "region": settings.region,
        "positions": positions_of(settings.mode, KIND),
        "after_end": "repeated" if settings.mode == "repo" else "held",
        "site": "final_norm",
    }


def _fit(
    study: Study,
    settings: SignalSettings,
    session: Session,
    items: list[Watched],
    identity: dict[str, Any],
) -> None:
    """Fit the published and the matched anchors, unless they are there."""
    inputs = {ROLLOUTS: study.input_hash(ROLLOUTS)}
    key = identity | {
        "requests": settings.anchor_requests,
        "least": settings.min_anchors,
        "filtered": not settings.unfiltered,
        "judge": JUDGE_ID,
    }
    state, _ = study.stage(FIT, key, inputs)
    if state == "done":
        session.progress.say("The anchors are there and up to date.")
        return
    session.check_same(study)
    windows = {row.row_id: window for row, window in items}
    chosen = anchor_rows([row for row, _ in items], settings)
    rows = chosen.rows
    _require(chosen.published, settings)
    states = read_pooled(
        study, FIT, session, [(row, windows[row.row_id]) for row in rows], settings
    )
    place = {row.row_id: index for index, row in enumerate(rows)}

    def fitted(members: tuple[Rollout, ...], strata: list[str] | None) -> Anchors:
        return fit_anchors(
            states[[place[row.row_id] for row in members]],
            is_harmful(members),
            is_refused(members),
            clusters=requests_of(members),
            filtered=not settings.unfiltered,
            strata=strata,
            min_count=settings.min_anchors,
        )

    lengths = [row.spans.prompt[1] for row in chosen.matched]
    strata = topic_length_strata(matched_topics(chosen.matched), lengths)
    known = {"identity": identity, "taken": chosen.requests}
    published = fitted(chosen.published, None)
    reason, outputs = None, []
    try:
        outputs += _write(study, MATCHED, fitted(chosen.matched, strata), **known)
    except TooFewExamplesError as error:
        reason = str(error)
        for name in names(MATCHED):
            study.path(name).unlink(missing_ok=True)
    outputs += _write(study, PUBLISHED, published, **known, matched_reason=reason)
    study.finish(FIT, outputs)


def _require(rows: tuple[Rollout, ...], settings: SignalSettings) -> None:
    """Refuse before anything is read where a side has too few requests."""
    complied = {row.request_id for row in rows if row.label == "benign"}
    refused = {row.request_id for row in rows if row.label == "harmful"}
    least = settings.min_anchors
    if min(len(complied), len(refused)) < least:
        raise TooFewExamplesError(
            f"at least {least} training requests on each side for the anchors, half "
            "of those that there are",
            f"{len(complied)} harmless complied with and {len(refused)} harmful "
            "refused",
            "Ask more prompts of the rarer kind; for a model that refuses nothing, "
            "--unfiltered.",
        )


def _write(study: Study, name: str, anchors: Anchors, **facts: Any) -> list[str]:
    apart = [round(each, 6) for each in separation(anchors).tolist()]
    return write_anchors(study, name, anchors, separation=apart, **facts)


def _read(
    study: Study,
    settings: SignalSettings,
    session: Session,
    items: list[Watched],
    identity: dict[str, Any],
    found: dict[str, Anchored],
) -> dict[str, Any]:
    """Read every row against the anchors, unless that is done."""
    # Anchors may lie elsewhere, so their hashes are a setting, not files of the study.
    hashes = {name: each.sha256 for name, each in found.items()}
    inputs = {ROLLOUTS: study.input_hash(ROLLOUTS)}
    tensors_name = probe_names(PUBLISHED)[0]
    with_probe = study.path(tensors_name).exists()
    if with_probe:
        inputs[tensors_name] = study.input_hash(tensors_name)
    key = {"settings": settings, "anchors": hashes}
    state, _ = study.stage(STAGE, key, inputs)
    if state == "done":
        session.progress.say("The signal is there and up to date.")
        return dict(study.read_json(SUMMARY))
    session.check_same(study)
    keys = {PUBLISHED: LOGIT, MATCHED: MATCHED_LOGIT}
    gauges = {
        keys[name]: gauge(each.anchors, settings.mode) for name, each in found.items()
    }
    probe, others = read_own_probe(study, PUBLISHED) if with_probe else (None, {})
    # The direction is about first words of answers, and reads nothing else.
    starts = settings.region == "answer"
    difference = others.get("difference") if starts else None
    readers = Readers(gauges, probe, difference)
    channels = read_signal(study, STAGE, session, items, settings, readers)
    rows, taken = [row for row, _ in items], found[PUBLISHED].taken
    about = {
        "identity": identity,
        "mode": settings.mode,
        "anchors": hashes,
        "taken": sorted(taken),
    }
    write_signal(study, [row.row_id for row in rows], channels, about)
    read = Read(rows, channels, taken, study_seed(study))
    made = {
        "mode": settings.mode,
        "identity": identity,
        "anchors": {name: _told(each.anchors) for name, each in found.items()},
        "matched_reason": found[PUBLISHED].matched_reason,
        "channels": sorted(channels),
        "missing_channels": _missing(with_probe, DIFFERENCE in channels),
        **summary(read),
    }
    study.write_json(SUMMARY, made)
    windows = {row.row_id: window for row, window in items}
    tokenizer = session.adapter.tokenizer
    study.write_json(EXAMPLES, step_examples(read, windows, settings, tokenizer))
    study.finish(STAGE, [SIGNAL, SUMMARY, EXAMPLES], rows=len(rows))
    return made


def _told(anchors: Anchors) -> dict[str, Any]:
    apart = separation(anchors)
    return {
        "n_compliant": anchors.n_compliant,
        "n_refused": anchors.n_refused,
        "separation": [round(each, 6) for each in apart.tolist()],
        "least_separation_step": int(torch.argmin(apart)) + 1,
    }


def _missing(with_probe: bool, with_difference: bool) -> list[str]:
    said = []
    if not with_probe:
        said.append("The study has no probe; `holdfast probe` fits one.")
    elif not with_difference:
        said.append("The logit difference is read where an answer begins alone.")
    return said
