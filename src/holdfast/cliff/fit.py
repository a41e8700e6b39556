"""Fit the refusal probe and its control, and measure both on held-out requests.

Which is which is a type: nothing here that fits can be handed a test row.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor, nn

from holdfast.cliff.groups import PROBE_FIGURES
from holdfast.cliff.probe import Probe, fit_probe, fit_stratified_probe
from holdfast.cliff.probe_files import model_fingerprint, names, write_probe
from holdfast.data.splits import Splits, Test, Train
from holdfast.errors import TooFewExamplesError
from holdfast.models.hidden_states import final_states
from holdfast.rollout.rows import (
    Fractions,
    Rollout,
    from_table,
    is_refused,
    judging_record,
    plain,
    requests_of,
    require_plain,
    splits_of,
)
from holdfast.rollout.session import Session
from holdfast.rollout.settings import ProbeSettings
from holdfast.stats.auroc import auroc_interval
from holdfast.stats.bootstrap import Estimate, undefined
from holdfast.stats.rates import calibration_error, clustered_rate, pearson
from holdfast.study import Study
from holdfast.study.batches import ROW_ID, Batches
from holdfast.study.directory import Stage
from holdfast.study.figures import figure_of, generator, null_figures, study_seed
from holdfast.study.rows import vectors, vectors_of

MIN_PER_WRAPPER = 20


@dataclass(frozen=True)
class States:
    """The final state of every decided row, by row id."""

    index: dict[str, int]
    values: Float[Tensor, "example d_model"]

    def of(self, rows: Sequence[Rollout]) -> Float[Tensor, "_ d_model"]:
        """Return the states of these rows, in their order."""
        return self.values[[self.index[row.row_id] for row in rows]]


@dataclass(frozen=True)
class Fitted:
    """What was fitted on the training rows."""

    probe: Probe  # The published probe.
    # Mean unembedding of the first answer token of refusals, minus that of compliances;
    # a direction in the space of the states.
    difference: Float[Tensor, "d_model"]


def fit_published(
    train: Train[Rollout], states: States, head: nn.Module, *, folds: int, seed: int
) -> Fitted:
    """Fit the published probe: refused harmful against complied benign, both plain.

    Raises:
        TooFewExamplesError: If a class has too few requests.
    """
    rows = plain(train.rows)
    labels = is_refused(rows)
    probe = fit_probe(
        states.of(rows),
        labels,
        clusters=requests_of(rows),
        seed=seed,
        folds=folds,
    )
    tokens = torch.tensor([row.token_ids[row.spans.answer[0]] for row in rows])
    weights = head.get_parameter("weight").detach()
    unembedded = weights[tokens.to(weights.device)].float().cpu()
    return Fitted(probe, unembedded[labels].mean(0) - unembedded[~labels].mean(0))


def evaluate(
    test: Test[Rollout],
    second: Sequence[Rollout],
    fitted: Fitted,
    states: States,
    seed: int,
) -> dict[str, Any]:
    """Measure the published probe on rows that it has not seen."""
    rows = plain(test.rows)
    wrapped = [row for row in test.rows if row.role in ("wrapped", "benign_wrapped")]
    everything = [*rows, *wrapped]
    logits, labels = fitted.probe.logit(states.of(rows)), is_refused(rows)
    calibration = calibration_error(
        torch.sigmoid(logits),
        labels,
        requests_of(rows),
        generator(seed, "probe/calibration"),
    )
    estimates = {
        "accuracy": clustered_rate(
            (logits > 0) == labels, requests_of(rows), generator(seed, "probe/accuracy")
        ),
        "auroc": _auroc(rows, fitted.probe, states, seed, "auroc"),
        "wrapped_auroc": _auroc(wrapped, fitted.probe, states, seed, "wrapped"),
        "second_source_auroc": _second(second, rows, fitted, states, seed),
        "logit_difference_correlation": pearson(
            fitted.probe.logit(states.of(everything)).double(),
            (states.of(everything) @ fitted.difference).double(),
            requests_of(everything),
            generator(seed, "probe/correlation"),
        ),
        "calibration_error": calibration.expected_error,
        "brier": calibration.brier,
    }
    return {name: figure_of(estimate) for name, estimate in estimates.items()}


def _auroc(
    rows: Sequence[Rollout], probe: Probe, states: States, seed: int, name: str
) -> Estimate:
    """Return the AUROC of refused against complied."""
    labels = is_refused(rows)
    reason = (
        f"{int(labels.sum())} refused and {int((~labels).sum())} complied rows "
        "are held out; both are needed"
    )
    logits = probe.logit(states.of(rows))
    return refusal_auroc(rows, logits, generator(seed, f"probe/{name}"), reason)


def refusal_auroc(
    rows: Sequence[Rollout],
    logits: Float[Tensor, "example"],
    generator: torch.Generator,
    reason: str,
) -> Estimate:
    """Return the AUROC of refused against complied; undefined where one is missing."""
    labels = is_refused(rows)
    if not 0 < int(labels.sum()) < len(rows):
        return undefined(len(rows), reason)
    return auroc_interval(logits, labels, requests_of(rows), generator)


def _second(
    second: Sequence[Rollout],
    rows: Sequence[Rollout],
    fitted: Fitted,
    states: States,
    seed: int,
) -> Estimate:
    """Return the AUROC of a second source's refusals against complied benign rows."""
    if not second:
        return undefined(0, "no second source was given (--second)")
    refused = [row for row in second if row.is_refused]
    benign = [row for row in second if row.label == "benign" and row.is_complied]
    complied = benign or [row for row in rows if row.is_complied]
    return _auroc([*refused, *complied], fitted.probe, states, seed, "second")


class Strata(NamedTuple):
    """Wrappers with enough of both outcomes, and why there is none."""

    names: frozenset[str]  # The wrappers.
    reason: str  # The nearest counts, in words.


def strata(splits: Splits[Rollout]) -> Strata:
    """Return the wrappers under which harmful requests are refused and complied with.

    Each has at least 20 of either over both splits; else the control probe would tell
    wrappers apart and not outcomes.
    """
    rows = [*splits.train, *splits.test]
    counts = Counter((row.wrapper, row.is_refused) for row in rows if _is_wrapped(row))
    pairs = {str(name): (counts[name, True], counts[name, False]) for name, _ in counts}
    best = max(pairs.values(), key=min, default=(0, 0))
    return Strata(
        frozenset(name for name, pair in pairs.items() if min(pair) >= MIN_PER_WRAPPER),
        f"no wrapper has {MIN_PER_WRAPPER} refused and {MIN_PER_WRAPPER} complied "
        f"harmful rows; the nearest has {best[0]} and {best[1]}",
    )


def fit_control(
    train: Train[Rollout],
    states: States,
    wrappers: Strata,
    *,
    folds: int,
    seed: int,
) -> Probe:
    """Fit the control: refused against complied harmful, within each wrapper.

    Raises:
        TooFewExamplesError: If too few requests of either outcome are left.
    """
    if not wrappers.names:
        raise TooFewExamplesError(
            f"a wrapper with {MIN_PER_WRAPPER} refused and as many complied rows",
            wrappers.reason,
            "Add harmful requests under wrappers that work at times.",
        )
    rows = [row for row in train if row.wrapper in wrappers.names and _is_wrapped(row)]
    return fit_stratified_probe(
        states.of(rows),
        is_refused(rows),
        [str(row.wrapper) for row in rows],
        clusters=requests_of(rows),
        seed=seed,
        folds=folds,
    )


def evaluate_control(
    test: Test[Rollout], probe: Probe, states: States, wrappers: Strata, seed: int
) -> Estimate:
    """Return the AUROC of the control probe over pairs within a wrapper."""
    rows = [row for row in test if row.wrapper in wrappers.names and _is_wrapped(row)]
    return auroc_interval(
        probe.logit(states.of(rows)),
        is_refused(rows),
        requests_of(rows),
        generator(seed, "probe/control"),
        [str(row.wrapper) for row in rows],
    )


def _is_wrapped(row: Rollout) -> bool:
    return row.role == "wrapped" and row.wrapper is not None


def count_plain(splits: Splits[Rollout]) -> dict[str, int]:
    """Count the plain rows of both splits."""
    counted = {}
    for name, part in (("train", splits.train), ("test", splits.test)):
        counter = Counter(row.verdict for row in plain(part.rows))
        for verdict in ("refused", "complied"):
            counted[f"{name}_{verdict}"] = counter[verdict]
    return counted


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
        Every figure of the block `probe` of the report; all null, with the reason,
        for a model that does not think and has too few rows for a probe.

    Raises:
        TooFewExamplesError: If there are too few refusals or compliances.
    """
    with study.stage(
        STAGE,
        settings,
        [ROLLOUTS],
        progress=session.progress,
        done="The probes are there and up to date.",
    ) as stage:
        if stage.is_done:
            reason = study.record(STAGE).get("reason")
            return _without_probe(stage, reason) if reason else stage.read_json(SUMMARY)
        rows = from_table(study.read_table(ROLLOUTS))
        train, validation, test = judging_record(study)["fractions"]
        fractions = (train, validation, test)
        try:
            require_plain(rows, fractions)
        except TooFewExamplesError as error:
            stage.facts["reason"] = _reason_unfit(study, error)
            return _without_probe(stage, stage.facts["reason"])
        session.check_same(study)
        return _fit(stage, settings, session, rows, fractions)


def _fit(
    stage: Stage,
    settings: ProbeSettings,
    session: Session,
    rows: Sequence[Rollout],
    fractions: Fractions,
) -> dict[str, Any]:
    study, seed = stage.study, study_seed(stage.study)
    asked = [row for row in rows if row.role != "safe_lookalike"]
    decided = [row for row in asked if row.is_decided]
    adapter, batches = session.adapter, Batches(stage, session.batch_size)
    values = vectors_per_row(
        batches,
        decided,
        lambda batch: final_states(
            adapter,
            [row.token_ids for row in batch],
            [row.final for row in batch],
            batch_size=batches.batch_size,
        ),
        "Reading final states",
    )
    states = States({row.row_id: i for i, row in enumerate(decided)}, values)
    splits = splits_of([row for row in decided if row.role != "second"], fractions)
    fitted = fit_published(
        splits.train, states, adapter.lm_head, folds=settings.folds, seed=seed
    )
    other = [row for row in decided if row.role == "second"]
    figures = evaluate(splits.test, other, fitted, states, seed)
    counts = count_plain(splits)
    facts = SITE | {"fractions": fractions, "rows": counts, "figures": figures}
    facts |= {"model": model_fingerprint(study)}
    write_probe(study, "published", fitted.probe, facts, difference=fitted.difference)
    control, outputs = _control(study, splits, states, settings, seed)
    summary = figures | {"control_auroc": control, "l2": fitted.probe.l2} | counts
    stage.write_json(SUMMARY, summary)
    stage.outputs += [*names("published"), *outputs]
    return summary


def vectors_per_row(
    batches: Batches,
    rows: Sequence[Rollout],
    measure: Callable[[Sequence[Rollout]], Float[Tensor, "example _"]],
    label: str,
) -> Float[Tensor, "example _"]:
    """Return one vector per row, measured batch by batch."""
    table = batches.run(
        rows,
        lambda batch: pa.table(
            {
                ROW_ID: [row.row_id for row in batch],
                "values": vectors(measure(batch)),
            }
        ),
        name=lambda row: row.row_id,
        length=lambda row: row.final,
        label=label,
    )
    return vectors_of(table, "values")


def _reason_unfit(study: Study, error: TooFewExamplesError) -> str:
    """Return why there is no probe; only a model that thinks needs one.

    Raises:
        TooFewExamplesError: If it does; it says how to have more prompts.
    """
    if study.manifest["model"]["thinking"] is None:
        # More prompts could fit one, but there would be no thinking to read it in.
        return f"{error.found}, and without thinking nothing would be read off it"
    limit = study.manifest["settings"]["rollout"]["limit"]
    if limit is None:
        raise error
    # Where the study asked fewer prompts than there were, more are there to ask.
    step = f"Raise --limit, which was {limit}, if that left prompts out. "
    raise TooFewExamplesError(error.expected, error.found, step + error.next_step)


def _without_probe(stage: Stage, reason: str) -> dict[str, Any]:
    """Say that no probe could be fitted, and return every figure as null."""
    stage.progress.say(f"No probe was fitted: {reason}.")
    return null_figures(PROBE_FIGURES, reason)


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
