"""Read the probe at every token of the held-out answers."""

from typing import Any

import pyarrow as pa
import torch

from holdfast.models.capture import project_states
from holdfast.session.batches import in_batches
from holdfast.session.cliffs import COMPLIED, curves, measure
from holdfast.session.context import Session
from holdfast.session.figures import study_seed
from holdfast.session.head_assembly import NO_PLATEAU
from holdfast.session.probes import names, read_probe
from holdfast.session.reach import reach
from holdfast.session.rows import GROUPS, Rollout, from_table
from holdfast.session.settings import TraceSettings
from holdfast.session.splitting import held_out
from holdfast.session.tracing import (
    AS_GENERATED,
    CONTROLS,
    SCHEMA,
    Traced,
    to_table,
)
from holdfast.session.tracing import from_table as scores_of
from holdfast.study import Study

STAGE = "trace"
ROLLOUTS = "rollouts.parquet"
OUTPUT = "trace.parquet"
SUMMARY = "trace.json"


def run(study: Study, settings: TraceSettings, session: Session) -> dict[str, Any]:
    """Trace the held-out answers; writes `trace.parquet` and `trace.json`.

    Args:
        study: A study with rollouts and probes.
        settings: Rule of the plateau, and the window of the mean trace.
        session: The model, and where progress is told.

    Returns:
        The figures of the blocks `trace` and `controls`, and the mean traces. Empty
        for a model that does not think.

    Raises:
        InputError: If the earlier stages are missing.
    """
    if study.manifest.get("model", {}).get("thinking") is None:
        return _without_thinking(study, settings)
    published = names("published")
    inputs = {name: study.input_hash(name) for name in (ROLLOUTS, *published)}
    state, _ = study.stage(STAGE, settings, inputs)
    if state == "done":
        session.progress.say("The traces are there and up to date.")
        return dict(study.read_json(SUMMARY))
    session.check_same(study)
    rows = from_table(study.read_table(ROLLOUTS))
    groups = held_out(rows)
    table = _read(study, session, groups)
    study.write_table(OUTPUT, table)
    scores, seed = scores_of(table), study_seed(study)
    summary = measure(groups, scores, settings, seed)
    summary["reach"] = reach(groups, scores, settings, seed)
    summary["curves"] = curves(groups, scores, settings.window, seed)
    study.write_json(SUMMARY, summary)
    study.finish(STAGE, [OUTPUT, SUMMARY])
    return summary


def _read(study: Study, session: Session, groups: dict[str, list[Rollout]]) -> pa.Table:
    """Run the model over every row, and over the controls of the complied ones."""
    adapter, batch_size = session.adapter, session.batch_size
    probe, others = read_probe(study, "published")
    direction, offset = probe.raw()
    directions = torch.stack([direction.float(), others["difference"].float()])
    offsets = torch.tensor([offset, 0.0])
    seed = study_seed(study)
    items = [Traced(row, AS_GENERATED) for name in GROUPS for row in groups[name]]
    items += [Traced(row, each) for each in CONTROLS for row in groups[COMPLIED]]

    def work(batch: list[Traced]) -> pa.Table:
        token_ids = [item.token_ids(seed) for item in batch]
        found = project_states(
            adapter, token_ids, directions, offsets, batch_size=batch_size
        )
        return to_table(batch, token_ids, found, adapter.tokenizer)

    if not items:
        return SCHEMA.empty_table()
    return in_batches(
        study,
        STAGE,
        items,
        name=lambda item: item.name,
        length=lambda item: item.row.final,
        batch_size=batch_size,
        work=work,
        progress=session.progress,
        label="Tracing",
    )


def _without_thinking(study: Study, settings: TraceSettings) -> dict[str, Any]:
    """Close the stage with its reason: no thinking, no plateau."""
    inputs = {ROLLOUTS: study.input_hash(ROLLOUTS)}
    state, _ = study.stage(STAGE, settings, inputs)
    if state != "done":
        study.finish(STAGE, [], reason=NO_PLATEAU)
    return {}
