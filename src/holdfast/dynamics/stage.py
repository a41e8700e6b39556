"""Read the step-wise signal of every answer of a study."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from holdfast.cliff.probe_files import names as probe_names
from holdfast.cliff.probe_files import read_own_probe
from holdfast.dynamics.anchors import Anchors, fit_anchors, separation
from holdfast.dynamics.panel import EXAMPLES
from holdfast.dynamics.rows import (
    DIFFERENCE,
    LOGIT,
    PERPLEXITY,
    PROBE,
    ROLLOUTS,
    SIGNAL,
    SignalRows,
    Watched,
    anchor_rows,
    is_harmful,
    matched_strata,
    window_of,
    write_signal,
)
from holdfast.dynamics.rows import (
    MATCHED as MATCHED_LOGIT,
)
from holdfast.dynamics.settings import SignalSettings
from holdfast.dynamics.signal import Kind, anchor_signal
from holdfast.dynamics.sources import (
    MATCHED,
    PUBLISHED,
    AnchorFile,
    anchor_counts,
    anchor_names,
    fit_step_probe,
    identity_of,
    kind_of,
    probe_of,
    read_anchors,
    source_of,
    write_anchors,
)
from holdfast.dynamics.states import Readers, read_batches
from holdfast.dynamics.summary import step_examples, summary
from holdfast.errors import InputError, TooFewExamplesError
from holdfast.judges.rules.rules import JUDGE_ID
from holdfast.rollout.rows import Rollout, from_table, is_refused, requests_of
from holdfast.rollout.sampling import STEPS, read_steps
from holdfast.rollout.session import Session
from holdfast.study import Study
from holdfast.study.batches import Batches
from holdfast.study.figures import study_seed

FIT, STAGE = "anchors", "signal"
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
    anchors = {
        name: read
        for name in (PUBLISHED, MATCHED)
        if (read := read_anchors(directory, name, identity)) is not None
    }
    return _read(study, settings, session, items, identity, anchors)


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
    key = identity | {
        "requests": settings.anchor_requests,
        "least": settings.min_anchors,
        "filtered": not settings.unfiltered,
        "judge": JUDGE_ID,
    }
    done = "The anchors are there and up to date."
    inputs = _present(study, ROLLOUTS, STEPS)
    with study.stage(FIT, key, inputs, progress=session.progress, done=done) as stage:
        if stage.is_done:
            return
        session.check_same(study)
        chosen = anchor_rows([row for row, _ in items], settings)
        _require(chosen.published, settings)
        rows = {row.row_id: index for index, row in enumerate(chosen.rows)}
        windows = {row.row_id: (row, window) for row, window in items}
        source = source_of(study, settings, session)
        session.progress.say(f"Reading {len(rows)} answers for the anchors.")
        read = read_batches(
            Batches(stage, session.batch_size),
            [windows[name] for name in rows],
            source.pooled,
            "Reading anchors",
        )
        states = read["states"].reshape(len(rows), settings.steps, -1)
        # Nothing else is read off these requests.
        taken = sorted({row.request_id for row in chosen.rows})

        def fit(
            name: str, members: Sequence[Rollout], strata: list[str] | None, **more: Any
        ) -> None:
            anchors = fit_anchors(
                states[[rows[row.row_id] for row in members]],
                is_harmful(members),
                is_refused(members),
                clusters=requests_of(members),
                filtered=not settings.unfiltered,
                strata=strata,
                min_count=settings.min_anchors,
            )
            facts = {"identity": identity, "taken": taken} | more
            stage.outputs.extend(write_anchors(study, name, anchors, facts))

        reason = None
        try:
            fit(MATCHED, chosen.matched, matched_strata(chosen.matched))
        except TooFewExamplesError as error:
            reason = str(error)
            for name in anchor_names(MATCHED):
                study.path(name).unlink(missing_ok=True)
        fit(PUBLISHED, chosen.published, None, matched_reason=reason)
        own = states[[rows[row.row_id] for row in chosen.published]]
        stage.outputs += fit_step_probe(study, session, chosen.published, own)


def _present(study: Study, *names: str) -> list[str]:
    return [name for name in names if study.path(name).exists()]


def _require(rows: Sequence[Rollout], settings: SignalSettings) -> None:
    """Refuse before anything is read where a side has too few requests."""
    complied, refused = (
        len({row.request_id for row in rows if row.label == label})
        for label in ("benign", "harmful")
    )
    least = settings.min_anchors
    if min(complied, refused) < least:
        raise TooFewExamplesError(
            f"at least {least} training requests (--min-anchors) on each side for the "
            "anchors, half of those that there are",
            f"{complied} harmless complied with and {refused} harmful refused",
            "Ask more prompts of the rarer kind, or lower --min-anchors; for a model "
            "that refuses nothing, --unfiltered.",
        )


def _read(
    study: Study,
    settings: SignalSettings,
    session: Session,
    items: list[Watched],
    identity: dict[str, Any],
    anchors: dict[str, AnchorFile],
) -> dict[str, Any]:
    """Read every row against the anchors, unless that is done."""
    # Anchors may lie elsewhere, so their hashes are a setting, not files of the study.
    hashes = {name: each.sha256 for name, each in anchors.items()}
    probe_name = probe_names(probe_of(study))[0]
    inputs = _present(study, ROLLOUTS, STEPS, probe_name)
    with study.stage(
        STAGE,
        {"settings": settings, "anchors": hashes},
        inputs,
        progress=session.progress,
        done="The signal is there and up to date.",
    ) as stage:
        if stage.is_done:
            return stage.read_json(SUMMARY)
        session.check_same(study)
        readers = _readers(study, settings, anchors, with_probe=probe_name in inputs)
        source = source_of(study, settings, session)
        channels = read_batches(
            Batches(stage, session.batch_size),
            items,
            lambda batch: source.channels(batch, readers),
            "Reading the signal",
        )
        published, kind = anchors[PUBLISHED], kind_of(study)
        about = {"identity": identity, "mode": settings.mode}
        rows, taken = [row for row, _ in items], published.taken
        signal = SignalRows(rows, channels, taken, about | {"anchors": hashes})
        write_signal(study, signal)
        stage.outputs.append(SIGNAL)
        block = about | {
            "anchors": {key: _separated(each.anchors) for key, each in anchors.items()},
            "matched_reason": published.matched_reason,
            "channels": sorted(channels),
            "missing_channels": _missing(channels, kind),
            **summary(signal, study_seed(study)),
        }
        stage.write_json(SUMMARY, block)
        windows = {row.row_id: window for row, window in items}
        drafts = read_steps(study) if kind == "diffusion" else None
        tokenizer = session.speaker.tokenizer
        examples = step_examples(signal, windows, settings, tokenizer, drafts)
        study.write_json(EXAMPLES, examples)
        stage.outputs.append(EXAMPLES)
        stage.facts["rows"] = len(items)
        return block


def _readers(
    study: Study,
    settings: SignalSettings,
    anchors: dict[str, AnchorFile],
    *,
    with_probe: bool,
) -> Readers:
    """Return what is read off states: anchors, and the probe where there is one."""
    channels = {PUBLISHED: LOGIT, MATCHED: MATCHED_LOGIT}
    signals = {
        channels[name]: anchor_signal(each.anchors, settings.mode)
        for name, each in anchors.items()
    }
    if not with_probe:
        return Readers(signals, None, None)
    probe, others = read_own_probe(study, probe_of(study))
    # The direction is about first words of answers, and reads nothing else.
    starts = settings.region == "answer" or kind_of(study) == "diffusion"
    return Readers(signals, probe.raw(), others.get("difference") if starts else None)


def _separated(anchors: Anchors) -> dict[str, Any]:
    step = int(separation(anchors).argmin()) + 1
    return anchor_counts(anchors) | {"least_separation_step": step}


def _missing(channels: Collection[str], kind: Kind) -> list[str]:
    reasons, masked = [], kind == "diffusion"
    if PROBE not in channels:
        reasons.append(
            "There is no probe, which is fitted with the anchors."
            if masked
            else "The study has no probe; `holdfast probe` fits one."
        )
    elif DIFFERENCE not in channels:
        reasons.append("The logit difference is read where an answer begins alone.")
    if masked and PERPLEXITY not in channels:
        reasons.append(
            "The perplexity of a prompt is not read: a masked-diffusion model gives "
            "only a bound, at many passes a prompt."
        )
    return reasons
