"""Put everything a study has found into `report.json` and `report.html`."""

from typing import Any

from holdfast.report.html import render
from holdfast.report.records import Curve, Example
from holdfast.report.schema import validate
from holdfast.session.assembly import assemble
from holdfast.session.browsing import browsed
from holdfast.session.context import Session
from holdfast.session.evaluation_sources import EVALUATED, TABLE, is_evaluated
from holdfast.session.examples import examples
from holdfast.session.head_assembly import STAGES, is_current
from holdfast.session.rows import from_table
from holdfast.session.signal_assembly import EXAMPLES, signal_files
from holdfast.session.sink_sources import MASSES, is_measured
from holdfast.session.splitting import held_out
from holdfast.study import Study, atomic_write_text

STAGE = "report"
ROLLOUTS = "rollouts.parquet"
OUTPUTS = ("report.json", "report.html")
EDITION = 2
"""Raised where rules or page have changed, so that reports of old studies are made
anew and say nothing that the rules of now do not."""


def run(study: Study, session: Session) -> dict[str, Any]:
    """Assemble, check and draw the report.

    Args:
        study: A study with rollouts; what else is missing is null with its reason.
        session: Where progress is told; the model is not loaded.

    Returns:
        The report.

    Raises:
        InputError: If the study has neither rollouts, nor an evaluation, nor sink
            masses.
    """
    below = {stage: study.record(stage) for stage in ("probe", "trace")}
    below |= {stage: study.record(stage) for stage in STAGES}
    read = {
        name
        for stage, record in below.items()
        if stage not in STAGES or is_current(study, stage)
        for name in record.get("outputs", [])
    }
    if is_evaluated(study):
        read |= {EVALUATED, TABLE}
    if is_measured(study):
        read.add(MASSES)
    if study.record("rollout") or not read & {EVALUATED, MASSES}:
        read.add(ROLLOUTS)
    read |= set(signal_files(study))
    inputs = {name: study.input_hash(name) for name in sorted(read)}
    reasons = {stage: record.get("reason") for stage, record in below.items()}
    state, _ = study.stage(STAGE, reasons | {"edition": EDITION}, inputs)
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
