"""What a bundle is made of before it has thresholds: rows, directions, detectors."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.cliff.probe import FOLDS, Probe, fit_probe
from holdfast.cliff.probe_files import (
    model_fingerprint,
    names,
    read_own_probe,
    write_probe,
)
from holdfast.data.splits import split_by_hash
from holdfast.dynamics.signal import AnchorSignal, anchor_signal
from holdfast.dynamics.sources import PUBLISHED, anchor_names, read_anchors
from holdfast.errors import TooFewExamplesError
from holdfast.guard.conformal import Threshold
from holdfast.guard.monitor.bundle import Bundle, Calibration, Direction, Serving
from holdfast.guard.monitor.rules import ANY, SIGNAL, LiveDetector
from holdfast.guard.monitor.settings import GuardBundleSettings
from holdfast.guard.rows import PLAIN, WRAPPED, choose_families
from holdfast.models.hidden_states import read_states
from holdfast.models.model import Adapter
from holdfast.rollout.edits import read_edit
from holdfast.rollout.rows import ATTACK_SUCCESS_OUTCOMES, LOST, Rollout
from holdfast.rollout.session import Session
from holdfast.study import Study
from holdfast.study.directory import Stage
from holdfast.study.figures import study_seed

ROLLOUTS = "rollouts.parquet"
REFUSAL, HARM = "refusal", "harm"
CHOICE = (0.7, 0.0, 0.3)
"""Shares of harmful training requests to fit on, and to choose a detector on."""
DOMAINS = (PLAIN, WRAPPED)
"""Kinds of benign requests, each of which has the promise by itself."""


class LiveRows(NamedTuple):
    """Rows by what they are for."""

    fit: list[Rollout]  # Training rows that the judge could read.
    choice: list[Rollout]  # Attacks on other training requests, to choose a detector.
    calibration: list[Rollout]  # Benign ones that set the thresholds.
    test: list[Rollout]  # All others that are held out.


def live_rows(rows: Sequence[Rollout]) -> LiveRows:
    """Deal rows to what they are for; a base request is for one thing alone."""
    read = [
        row
        for row in rows
        if (row.is_refused or row.verdict in ATTACK_SUCCESS_OUTCOMES)
        and row.closed
        and row.tokens != LOST
        and len(row.token_ids) - row.spans.prompt[1] > 1
    ]
    held = [row for row in read if row.split == "test"]
    benign = sorted({row.request_id for row in held if row.label == "benign"})
    halves = split_by_hash(benign, lambda name: f"guard/live/{name}", (0.5, 0.5, 0.0))
    first = set(halves.train)
    calibration = [
        row
        for row in held
        if row.request_id in first and row.role in DOMAINS and not row.is_refused
    ]
    test = [row for row in held if row.request_id not in first]
    train = [row for row in read if row.split == "train"]
    harmful = sorted({row.request_id for row in train if row.label == "harmful"})
    thirds = split_by_hash(harmful, lambda name: f"guard/choice/{name}", CHOICE)
    chosen = set(thirds.test)
    return LiveRows(
        [row for row in train if row.request_id not in chosen],
        [row for row in train if row.request_id in chosen and row.role == "wrapped"],
        calibration,
        test,
    )


def written_of(row: Rollout) -> tuple[int, ...]:
    """Return what a monitor reads of a row while it is written.

    The last token is drawn and never read: with it the row is over.
    """
    return row.token_ids[row.spans.prompt[1] : -1]


def requests_by_domain(rows: Sequence[Rollout]) -> dict[str, int]:
    """Return how many base requests there are of each kind that has rows."""
    return {
        role: len({row.request_id for row in rows if row.role == role})
        for role in DOMAINS
        if any(row.role == role for row in rows)
    }


def families_of(rows: LiveRows, settings: GuardBundleSettings) -> list[str]:
    """Return the attack families whose answers may be seen."""
    known = {str(row.wrapper) for row in rows.fit if row.role == "wrapped"}
    return choose_families(sorted(known), settings.fit_on)[0]


def fit_harm(
    stage: Stage, session: Session, rows: LiveRows, families: Sequence[str]
) -> None:
    """Fit the direction that tells answers to harmful requests from others.

    One state an answer, the mean over its tokens; refusals are on neither side, or it
    would tell refusing from complying.
    """
    study = stage.study
    kept = [
        row
        for row in rows.fit
        if not row.is_refused
        and row.spans.answer[0] < row.spans.answer[1]
        and (row.label == "benign" or row.wrapper in (None, *families))
    ]
    harmful = [row.label == "harmful" for row in kept]
    n_harmful = len({row.request_id for row in kept if row.label == "harmful"})
    if n_harmful < FOLDS:
        raise TooFewExamplesError(
            f"answers to {FOLDS} harmful requests or more, to fit what harm reads like",
            f"{n_harmful} in the families {', '.join(families) or '(none)'}",
            "Ask more harmful requests in wrappers that work, or name families that "
            "do with --fit-on.",
        )
    states = answer_means(session, kept)
    probe = fit_probe(
        states,
        torch.tensor(harmful),
        clusters=[row.request_id for row in kept],
        seed=study_seed(study),
    )
    facts = {
        "model": model_fingerprint(study),
        "n": len(kept),
        "n_harmful_requests": n_harmful,
        "families": list(families),
        "reads": "mean of the answer's states after the final norm",
    }
    write_probe(study, HARM, probe, facts)
    stage.outputs += names(HARM)


def answer_means(
    session: Session, rows: Sequence[Rollout]
) -> Float[Tensor, "example d_model"]:
    """Return the mean state of each answer after the final norm."""
    means = []
    for start in range(0, len(rows), session.batch_size):
        part = rows[start : start + session.batch_size]
        found = read_states(
            session.adapter,
            [row.token_ids[: row.spans.answer[1]] for row in part],
            lambda states, _: states,
            batch_size=session.batch_size,
        )
        means += [
            each[row.spans.answer[0] :].double().mean(0)
            for row, each in zip(part, found, strict=True)
            if isinstance(each, Tensor)
        ]
    return torch.stack(means)


def anchors_of(study: Study) -> AnchorSignal | None:
    """Return the anchors of the study's signal, if live states can be held to them.

    Live states are means over the tokens of the answer, one step per token.
    """
    if not study.path(anchor_names(PUBLISHED)[1]).exists():
        return None
    identity = study.read_json(anchor_names(PUBLISHED)[1])["identity"]
    settings = study.record("signal").get("settings", {}).get("settings", {})
    mode, region = (settings.get(key) for key in ("mode", "region"))
    stepwise = settings.get("time") == "step" and region == "answer"
    own = model_fingerprint(study)
    same = all(identity.get(key) == own[key] for key in own)
    if not same or not stepwise or mode == "repo":
        return None
    read = read_anchors(study.directory, PUBLISHED, identity)
    return None if read is None else anchor_signal(read.anchors, mode)


def detectors_of(
    settings: GuardBundleSettings, *, thinks: bool, signal: bool
) -> tuple[LiveDetector, ...]:
    """Return the live detectors, by what the model and the study have."""
    window, support, band = settings.window, settings.support, settings.band

    def three(name: str, reads: str, channel: Any) -> list[LiveDetector]:
        return [
            LiveDetector(f"{name}_mean", reads, channel, "rolling", window),
            LiveDetector(f"{name}_segment", reads, channel, "segment", window, support),
            LiveDetector(
                f"{name}_hesitation", reads, channel, "hesitation", window, band=band
            ),
        ]

    found = [LiveDetector("refusal_end", REFUSAL, "thinking", "end")]
    if thinks:
        found.append(LiveDetector("cliff", REFUSAL, "thinking", "cliff"))
        found += three("thinking", REFUSAL, "thinking")
    found += three("answer", HARM, "answer")
    if signal:
        found.append(LiveDetector("signal", SIGNAL, "answer", "last", sign=-1.0))
    return tuple(found)


def draft_of(
    study: Study,
    settings: GuardBundleSettings,
    adapter: Adapter,
    anchors: AnchorSignal | None,
) -> Bundle:
    """Return the bundle before it has thresholds; nothing fires, nothing abstains."""
    never = {rate: Threshold(math.inf, rate, 0.0, 1.0, 0, 0) for rate in settings.rates}
    model, asked = study.manifest["model"], study.record("rollout")["settings"]
    sampling = asked.get("sampling", {})
    probes = {
        REFUSAL: read_own_probe(study, "published")[0],
        HARM: read_own_probe(study, HARM)[0],
    }
    return Bundle(
        model={key: model[key] for key in ("id", "weights_sha256", "template_sha256")},
        serving=Serving(
            engine=str(asked.get("engine", {}).get("name", "holdfast")),
            dtype=model["dtype"],
            temperature=float(sampling.get("temperature", 0.0)),
            top_p=float(sampling.get("top_p", 1.0)),
        ),
        detectors=detectors_of(
            settings, thinks=adapter.thinking is not None, signal=anchors is not None
        ),
        directions={name: _direction(each) for name, each in probes.items()},
        thresholds={ANY: never},
        scales={},
        calibration=Calibration(0, 0, {}, "", dict.fromkeys(_LENGTHS, 1 << 40), ()),
        anchors=anchors,
        edit=None
        if settings.edit is None
        else read_edit(settings.edit, adapter).edit.factors,
        acts_on=settings.acts_on or ANY,
        study={
            "name": study.directory.name,
            "seed": study_seed(study),
            "rollouts_sha256": study.input_hash(ROLLOUTS),
            "system_prompt": asked.get("system_prompt"),
            "families": study.read_json(names(HARM)[1])["families"],
        },
    )


_LENGTHS = ("prompt", "thinking", "answer")


def _direction(probe: Probe) -> Direction:
    weight, offset = probe.raw()
    return Direction(weight.float(), offset)
