"""Read the step-wise signal of every answer of a study."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from holdfast.cliff.probe_files import names as probe_names
from holdfast.cliff.probe_files import read_own_probe
from holdfast.dynamics.anchors import (
    Anchors,
    fit_anchors,
    separation,
    topic_length_strata,
)
from holdfast.dynamics.panel import EXAMPLES
from holdfast.dynamics.rows import (
    DIFFERENCE,
    LOGIT,
    PERPLEXITY,
    PROBE,
    Readers,
    Watched,
    anchor_rows,
    is_harmful,
    matched_topics,
    read_pooled,
    read_signal,
    window_of,
)
from holdfast.dynamics.rows import MATCHED as MATCHED_LOGIT
from holdfast.dynamics.settings import SignalSettings
from holdfast.dynamics.signal import Kind, gauge
from holdfast.dynamics.sources import (
    MATCHED,
    PUBLISHED,
    Anchored,
    anchor_names,
    fit_step_probe,
    identity_of,
    inputs_of,
    kind_of,
    probe_of,
    read_anchors,
    source_of,
    write_anchors,
)
from holdfast.dynamics.summary import Read, step_examples, summary
from holdfast.errors import InputError, TooFewExamplesError
from holdfast.judges.rules.rules import JUDGE_ID
from holdfast.rollout.rows import Rollout, from_table, is_refused, requests_of
from holdfast.rollout.sampling import read_steps
from holdfast.rollout.session import Session
from holdfast.study import Study, atomic_write_bytes, canonical_json
from holdfast.study.figures import study_seed

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
    identity = identity_of(study, settings)
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


def _fit(
    study: Study,
    settings: SignalSettings,
    session: Session,
    items: list[Watched],
    identity: dict[str, Any],
) -> None:
    """Fit the published and the matched anchors, unless they are there."""
    inputs = inputs_of(study)
    key = identity | {
        "requests": settings.anchor_requests,
        "least": settings.min_anchors,
        "filtered": not settings.unfiltered,
        "judge": JUDGE_ID,
    }
    state, _ = study.begin(FIT, key, inputs)
    if state == "done":
        session.progress.say("The anchors are there and up to date.")
        return
    session.check_same(study)
    windows = {row.row_id: window for row, window in items}
    chosen = anchor_rows([row for row, _ in items], settings)
    rows = chosen.rows
    _require(chosen.published, settings)
    source = source_of(study, settings, session)
    watched = [(row, windows[row.row_id]) for row in rows]
    states = read_pooled(study, FIT, session, watched, source)
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
        for name in anchor_names(MATCHED):
            study.path(name).unlink(missing_ok=True)
    outputs += _write(study, PUBLISHED, published, **known, matched_reason=reason)
    own = states[[place[row.row_id] for row in chosen.published]]
    outputs += fit_step_probe(study, session, chosen.published, own)
    study.finish(FIT, outputs)


def _require(rows: tuple[Rollout, ...], settings: SignalSettings) -> None:
    """Refuse before anything is read where a side has too few requests."""
    complied = {row.request_id for row in rows if row.label == "benign"}
    refused = {row.request_id for row in rows if row.label == "harmful"}
    least = settings.min_anchors
    if min(len(complied), len(refused)) < least:
        raise TooFewExamplesError(
            f"at least {least} training requests (--min-anchors) on each side for the "
            "anchors, half of those that there are",
            f"{len(complied)} harmless complied with and {len(refused)} harmful "
            "refused",
            "Ask more prompts of the rarer kind, or lower --min-anchors; for a model "
            "that refuses nothing, --unfiltered.",
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
    inputs = inputs_of(study)
    probe_name = probe_of(study)
    tensors_name = probe_names(probe_name)[0]
    with_probe = study.path(tensors_name).exists()
    if with_probe:
        inputs[tensors_name] = study.input_hash(tensors_name)
    key = {"settings": settings, "anchors": hashes}
    state, _ = study.begin(STAGE, key, inputs)
    if state == "done":
        session.progress.say("The signal is there and up to date.")
        return dict(study.read_json(SUMMARY))
    session.check_same(study)
    keys = {PUBLISHED: LOGIT, MATCHED: MATCHED_LOGIT}
    gauges = {
        keys[name]: gauge(each.anchors, settings.mode) for name, each in found.items()
    }
    probe, others = read_own_probe(study, probe_name) if with_probe else (None, {})
    # The direction is about first words of answers, and reads nothing else.
    starts = settings.region == "answer" or kind_of(study) == "diffusion"
    difference = others.get("difference") if starts else None
    readers = Readers(gauges, probe, difference)
    source = source_of(study, settings, session)
    channels = read_signal(study, STAGE, session, items, source, readers)
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
        "missing_channels": _missing(channels, kind_of(study)),
        **summary(read),
    }
    study.write_json(SUMMARY, made)
    windows = {row.row_id: window for row, window in items}
    tokenizer = session.speaker.tokenizer
    drafts = read_steps(study) if kind_of(study) == "diffusion" else None
    examples = step_examples(read, windows, settings, tokenizer, drafts)
    study.write_json(EXAMPLES, examples)
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


def _missing(channels: Mapping[str, Any], kind: Kind) -> list[str]:
    said, masked = [], kind == "diffusion"
    if PROBE not in channels:
        said.append(
            "There is no probe, which is fitted with the anchors."
            if masked
            else "The study has no probe; `holdfast probe` fits one."
        )
    elif DIFFERENCE not in channels:
        said.append("The logit difference is read where an answer begins alone.")
    if masked and PERPLEXITY not in channels:
        said.append(
            "The perplexity of a prompt is not read: a masked-diffusion model gives "
            "only a bound, at many passes a prompt."
        )
    return said


SIGNAL = "signal.safetensors"
ABOUT = "about"


class Signal(NamedTuple):
    """The signal of a study."""

    row_ids: list[str]  # Which rows it is of, in order.
    # Every channel, one entry per row.
    channels: dict[str, Float[Tensor, "example step"]]
    facts: dict[str, Any]  # Identity of the anchors, requests behind them, mode.


def write_signal(
    study: Study,
    row_ids: Sequence[str],
    channels: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    """Write the signal of every row."""
    about = {"row_ids": list(row_ids), "facts": dict(facts)}
    tensors = {key: each.contiguous() for key, each in channels.items()}
    # One entry, since the order of several changes from one run to the next.
    data = save(tensors, {ABOUT: canonical_json(about)})
    atomic_write_bytes(study.path(SIGNAL), data)


def read_signal_file(study: Study) -> Signal:
    """Read the signal of every row."""
    path = study.require(SIGNAL)
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()[ABOUT])
            channels = {key: file.get_tensor(key) for key in file.keys()}
        return Signal(about["row_ids"], channels, about["facts"])
    # The reader of safetensors raises its own error, which is no ValueError.
    except Exception as error:
        raise InputError(
            f"the signal of every row in {study.path(SIGNAL)}",
            f"a damaged file ({error})",
            "Remove it and run `holdfast signal` again.",
        ) from error
