"""The audit as a list of stages; reports, comparisons and proofs."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from holdfast.audit.assemble import STAGES, assemble, browsed, judge_block
from holdfast.audit.compare import Comparison, compare
from holdfast.audit.page import render, render_compare
from holdfast.audit.settings import AuditSettings
from holdfast.cliff import fit, trace
from holdfast.cliff.commitment.panel import decide_files
from holdfast.cliff.trace import examples
from holdfast.data.chat.thinking import settings_shown
from holdfast.dynamics.panel import EXAMPLES, signal_files
from holdfast.errors import (
    AdapterError,
    EndpointError,
    EvidenceError,
    InputError,
    ModelError,
    UnsupportedFamilyError,
)
from holdfast.evaluate.compare import pair
from holdfast.evaluate.panel import EVALUATED, TABLE, is_evaluated
from holdfast.heads import ablate, rank
from holdfast.models.attention import require_tappable
from holdfast.models.model import USES, Adapter, LanguageModel, MaskedModel, Proof
from holdfast.report.schema import Curve, Example, validate
from holdfast.rollout import stage as rollout_stage
from holdfast.rollout.questions import template_notes
from holdfast.rollout.rows import from_table, held_out
from holdfast.rollout.session import Session
from holdfast.sinks.panel import MASSES, is_measured
from holdfast.study import Study, atomic_write_text, require_place
from holdfast.study.directory import is_current


def run(study: Study, settings: AuditSettings, session: Session) -> dict[str, Any]:
    """Run every stage that is not done yet.

    Args:
        study: Where everything goes.
        settings: Settings of the stages.
        session: The model, and where progress is told.

    Returns:
        The report.

    Raises:
        EvidenceError: If there are too few refusals or compliances to fit a probe;
            the outcomes are in the report all the same.
        EndpointError: If the judge's server is down; what it has not judged has no
            verdict in the report, and is judged by the next run.
        HoldfastError: If a stage could not do its work.
    """
    try:
        rollout_stage.run(study, settings.rollout, session, settings.judge)
        fit.run(study, settings.probe, session)
        trace.run(study, settings.trace, session)
        if settings.with_heads:
            _look_at_heads(study, settings, session)
    except (EvidenceError, ModelError, EndpointError):
        # Answers that are there are told, also where too few suffice for more, or a
        # judge could not be asked about all of them.
        if study.path(ROLLOUTS).exists():
            write_report(study, session)
        raise
    return write_report(study, session)


def _look_at_heads(study: Study, settings: AuditSettings, session: Session) -> None:
    """Rank heads and switch them off; where there is nothing to find, say so."""
    try:
        rank.run(study, settings.heads, session)
        ablate.run(study, settings.ablate, session, settings.judge)
    except (EvidenceError, AdapterError) as error:
        session.progress.say(f"Single heads are left out: {error}")


def compare_studies(first: Path, second: Path, page: Path | None = None) -> Comparison:
    """Compare the reports of two studies.

    Args:
        first: A study, or its `report.json`.
        second: Another.
        page: Where an HTML page goes; None for no page.

    Returns:
        Settings that differ, and every figure of both. Where both hold an evaluation,
        also the paired difference on every prompt that both asked.

    Raises:
        InputError: If a report is missing or not valid, or the page has no place.
        StorageError: If the page cannot be written.
    """
    if page is not None:
        require_place(page, folder=False)
    a, b = read_report(first), read_report(second)
    found = compare(a, b)
    judged = [_evaluation(place) for place in (first, second)]
    tables = [table for table in judged if table is not None]
    paired = pair(*tables) if len(tables) == 2 else []
    if paired:
        found["paired"] = paired
    if page is not None:
        atomic_write_text(page, render_compare(a, b, paired))
    return found


def _evaluation(place: Path) -> pa.Table | None:
    """Return the judged rows of a study, if it has an evaluation."""
    if place.is_file():
        place = place.parent
    if not (place / TABLE).is_file():
        return None
    study = Study.open(place)
    return study.read_table(TABLE) if is_evaluated(study) else None


def read_report(place: Path) -> dict[str, Any]:
    """Read the report of a study."""
    if place.is_file():
        try:
            report = json.loads(place.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"JSON in {place}", f"a damaged file ({error})", "Make it anew."
            ) from error
    else:
        report = Study.open(place).read_json("report.json")
    validate(report)
    return dict(report)


def check_model(session: Session) -> dict[str, Any]:
    """Load a model and return what was proved."""
    session.needs_template = False
    speaker = session.speaker
    parts: dict[str, Any] = {
        "d_model": speaker.d_model,
        "max_positions": speaker.max_positions,
    }
    chats = speaker.tokenizer is not None
    notes = template_notes(speaker) if chats else []
    if isinstance(speaker, Adapter):
        if speaker.lacks("heads") is None and (found := _untapped(speaker)):
            notes.append(f"It is not good for sinks: {found}.")
        widths = sorted(set(speaker.head_widths) - {0})
        heads: dict[str, Any] = {"heads": speaker.n_heads, "head_width": widths}
        if len(speaker.layers_with_heads) < speaker.n_layers:
            heads["layers_with_heads"] = list(speaker.layers_with_heads)
        parts = {"layers": speaker.n_layers, **heads, **parts}
    if isinstance(speaker, MaskedModel):
        parts["mask_token_id"] = speaker.mask_id
    return {
        "model": session.model_record(),
        "parts": parts,
        "tiers": tiers_of(speaker),
        "proofs": _rows(speaker.proofs),
        "prompts": settings_shown(speaker.tokenizer) if chats else [],
        "notes": notes,
    }


def tiers_of(speaker: LanguageModel) -> dict[str, dict[str, Any]]:
    """Return what a model is good for, tier by tier, and why it is not for others."""
    tiers: dict[str, dict[str, Any]] = {}
    for tier, verbs in USES.items():
        reason = speaker.lacks(tier)
        if reason is None and tier == "heads" and not isinstance(speaker, Adapter):
            reason = "it fills in masks, and heads are looked at left to right alone"
        if tier == "heads" and _untapped(speaker):
            verbs = verbs.replace("sinks, ", "")
        if speaker.tokenizer is None and tier != "text":
            verbs = f"given tokens, from Python; with prompts it would be for {verbs}"
        tiers[tier] = {"holds": reason is None, "for": verbs, "reason": reason}
    return tiers


def _untapped(speaker: LanguageModel) -> str | None:
    """Return why the sinks of a model cannot be read; None if they can."""
    try:
        require_tappable(speaker.model)
    except UnsupportedFamilyError as error:
        return error.found
    return None


def refused(session: Session, error: AdapterError) -> dict[str, Any]:
    """Return what was proved about a model that does not fit, and what was not.

    Returns: The model's name, its proofs (none if a part of it is missing) and the
    error.
    """
    return {
        "model": {"id": session.name},
        "proofs": _rows(error.proofs),
        "error": str(error),
    }


def _rows(proofs: Sequence[Proof]) -> list[dict[str, Any]]:
    """Return proofs as JSON holds them, which has no NaN and no infinity."""
    rows = []
    for proof in proofs:
        row = proof._asdict()
        if proof.value is not None and not math.isfinite(proof.value):
            row |= {"value": None, "detail": f"{proof.detail} It was {proof.value}."}
        rows.append(row)
    return rows


STAGE = "report"
ROLLOUTS = "rollouts.parquet"
OUTPUTS = ("report.json", "report.html")
EDITION = 3
"""Raised where rules or page have changed, so that reports of old studies are made
anew and say nothing that the rules of now do not."""


def write_report(study: Study, session: Session) -> dict[str, Any]:
    """Assemble, check and draw the report.

    `study`: A study with rollouts; what else is missing is null with its reason.
    `session`: Where progress is told; the model is not loaded.
    """
    below = {stage: study.record(stage) for stage in ("probe", "trace")}
    below |= {stage: study.record(stage) for stage in STAGES}
    read = {
        name
        for stage, record in below.items()
        if is_current(study, stage)
        for name in record.get("outputs", [])
    }
    if is_evaluated(study):
        read |= {EVALUATED, TABLE}
    if is_measured(study):
        read.add(MASSES)
    if study.record("rollout") or not read & {EVALUATED, MASSES}:
        read.add(ROLLOUTS)
    read |= {*signal_files(study).values(), *decide_files(study).values()}
    inputs = {name: study.input_hash(name) for name in sorted(read)}
    known = {stage: record.get("reason") for stage, record in below.items()}
    known |= {"edition": EDITION, "judge": judge_block(study)}
    state, _ = study.begin(STAGE, known, inputs)
    if state == "done":
        session.progress.say("The report is there and up to date.")
        return dict(study.read_json(OUTPUTS[0]))
    rows = from_table(study.read_table(ROLLOUTS)) if ROLLOUTS in read else []
    report = assemble(study, rows)
    validate(report)
    curves: list[Curve] = []
    shown: list[Example] = []
    if "trace.json" in read:
        curves = study.read_json("trace.json")["curves"]
        shown = examples(study.read_table("trace.parquet"), held_out(rows))
    steps = study.read_json(EXAMPLES) if EXAMPLES in read else []
    evaluated = study.read_table(TABLE).to_pylist() if TABLE in read else []
    page = render(report, curves, shown, steps, browsed(rows, evaluated))
    study.write_json(OUTPUTS[0], report)
    atomic_write_text(study.path(OUTPUTS[1]), page)
    study.finish(STAGE, OUTPUTS)
    return report
