"""Fit the refusal probe and its control, and measure both on held-out requests."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from holdfast.analysis.bootstrap import undefined
from holdfast.data.splits import Splits
from holdfast.errors import TooFewExamplesError
from holdfast.models.capture import final_states
from holdfast.session.batches import ROW_ID, in_batches
from holdfast.session.context import Session
from holdfast.session.figures import figure_of, study_seed
from holdfast.session.fitting import (
    States,
    count_plain,
    evaluate,
    evaluate_control,
    fit_control,
    fit_published,
    strata,
)
from holdfast.session.probes import model_fingerprint, names, write_probe
from holdfast.session.rows import Rollout, from_table
from holdfast.session.settings import ProbeSettings
from holdfast.session.splitting import require_plain, splits_of
from holdfast.study import Study

STAGE = "probe"
ROLLOUTS = "rollouts.parquet"
SUMMARY = "probes/summary.json"
SITE = {
    "layer": "last",
    "site": "final_norm",
    "final_norm": True,
    "position": "last token of the end-of-thinking template, before the answer",
}


def run(study: Study, settings: ProbeSettings, session: Session) -> dict[str, Any]:
    """Fit published and control probe; writes `probes/`.

    Args:
        study: A study with rollouts.
        settings: Folds of the cross-validation.
        session: The model, and where progress is told.

    Returns:
        Every figure of the block `probe` of the report.

    Raises:
        TooFewExamplesError: If there are too few refusals or compliances.
    """
    inputs = {ROLLOUTS: study.input_hash(ROLLOUTS)}
    state, _ = study.stage(STAGE, settings, inputs)
    if state == "done":
        session.progress.say("The probes are there and up to date.")
        done = study.record(STAGE)["outputs"]
        return dict(study.read_json(SUMMARY)) if done else {}
    rows = from_table(study.read_table(ROLLOUTS))
    train, validation, test = study.record("rollout")["fractions"]
    fractions = (train, validation, test)
    try:
        require_plain(rows, fractions)
    except TooFewExamplesError as error:
        return _unfit(study, error)
    session.check_same(study)
    asked = [row for row in rows if row.role != "safe_lookalike"]
    decided = [row for row in asked if row.is_decided]
    states = _states(study, session, decided)
    seed = study_seed(study)
    own = [row for row in decided if row.role != "second"]
    splits = splits_of(own, fractions)
    fitted = fit_published(
        splits.train,
        states,
        session.adapter.lm_head,
        folds=settings.folds,
        seed=seed,
    )
    other = [row for row in decided if row.role == "second"]
    figures = evaluate(splits.test, other, fitted, states, seed)
    counts = count_plain(splits)
    facts = SITE | {"fractions": fractions, "rows": counts, "figures": figures}
    facts |= {"model": model_fingerprint(study)}
    write_probe(study, "published", fitted.probe, facts, difference=fitted.difference)
    control, outputs = _control(study, splits, states, settings, seed)
    summary = figures | {"control_auroc": control, "l2": fitted.probe.l2} | counts
    study.write_json(SUMMARY, summary)
    study.finish(STAGE, [SUMMARY, *names("published"), *outputs])
    return summary


def _unfit(study: Study, error: TooFewExamplesError) -> dict[str, Any]:
    """Keep the reason why there is no probe; only a model that thinks needs one."""
    if study.manifest["model"]["thinking"] is None:
        # More prompts could fit one, but there would be no thinking to read it in.
        reason = f"{error.found}, and without thinking nothing would be read off it"
        study.finish(STAGE, [], reason=reason)
        return {}
    limit = study.manifest["settings"]["rollout"]["limit"]
    if limit is not None:
        # Where the study asked fewer prompts than there were, more are there to ask.
        step = f"Raise --limit, which was {limit}, if that left prompts out. "
        error = TooFewExamplesError(error.expected, error.found, step + error.next_step)
    study.manifest["stages"][STAGE]["reason"] = str(error)
    study.save()
    raise error


def _states(study: Study, session: Session, rows: list[Rollout]) -> States:
    """Read the state that predicts the first answer token of every row."""
    adapter, batch_size = session.adapter, session.batch_size

    def work(batch: list[Rollout]) -> pa.Table:
        found = final_states(
            adapter,
            [row.token_ids for row in batch],
            [row.final for row in batch],
            batch_size=batch_size,
        )
        flat = pa.array(found.numpy().reshape(-1), pa.float32())
        return pa.table(
            {
                ROW_ID: [row.row_id for row in batch],
                "state": pa.FixedSizeListArray.from_arrays(flat, found.shape[1]),
            }
        )

    table = in_batches(
        study,
        STAGE,
        rows,
        name=lambda row: row.row_id,
        length=lambda row: row.final,
        batch_size=batch_size,
        work=work,
        progress=session.progress,
        label="Reading final states",
    )
    flat = table.column("state").combine_chunks().flatten().to_numpy()
    values = torch.from_numpy(np.array(flat).reshape(table.num_rows, -1))
    ids = table.column(ROW_ID).to_pylist()
    return States({row_id: place for place, row_id in enumerate(ids)}, values)


def _control(
    study: Study,
    splits: Splits[Rollout],
    states: States,
    settings: ProbeSettings,
    seed: int,
) -> tuple[dict[str, Any], list[str]]:
    """Fit and measure the control probe, or say why there is none."""
    wrappers = strata(splits)
    try:
        probe = fit_control(
            splits.train, states, wrappers, folds=settings.folds, seed=seed
        )
    except TooFewExamplesError as error:
        return _null_control(study, error.found)
    measured = evaluate_control(splits.test, probe, states, wrappers, seed)
    found = figure_of(measured)
    facts = SITE | {"wrappers": sorted(wrappers.names), "auroc": found}
    facts |= {"model": model_fingerprint(study)}
    write_probe(study, "control", probe, facts)
    return found, list(names("control"))


def _null_control(study: Study, reason: str) -> tuple[dict[str, Any], list[str]]:
    tensors_name, facts_name = names("control")
    study.path(tensors_name).unlink(missing_ok=True)
    found = figure_of(undefined(0, reason))
    study.write_json(facts_name, {"auroc": found})
    return found, [facts_name]
