"""Rank heads by what they take from refusal, and check the first by removal."""

from typing import Any

from holdfast.analysis.heads import drops, rank_heads
from holdfast.errors import EvidenceError, TooFewExamplesError
from holdfast.session.attributing import CAUSAL, Read, read_in_batches, take_away
from holdfast.session.choosing import Selected, select
from holdfast.session.context import Session
from holdfast.session.figures import generator, study_seed
from holdfast.session.head_records import (
    Checked,
    agreement_of,
    found_in_words,
    parts_of,
    table_of,
    to_check,
)
from holdfast.session.head_settings import HeadsSettings
from holdfast.session.probes import names, read_own_probe
from holdfast.session.rows import from_table
from holdfast.study import Study

STAGE = "heads"
ROLLOUTS = "rollouts.parquet"
OUTPUT = "heads.parquet"
SUMMARY = "heads.json"


def run(study: Study, settings: HeadsSettings, session: Session) -> dict[str, Any]:
    """Rank every head; writes `heads.parquet` and `heads.json`.

    Ranked on complied harmful answers to training requests; checked on held-out ones.

    Args:
        study: A study with rollouts and a probe.
        settings: The ranking, and how many heads are checked.
        session: The model, and where progress is told.

    Returns:
        The block `heads` of the report.

    Raises:
        InputError: If the earlier stages are missing, or the probe belongs to another
            model or template.
        TooFewExamplesError: If there are too few complied harmful answers, or the
            model does not think; the reason stays in the study.
    """
    _require_thinking(study)
    published = names("published")
    inputs = {name: study.input_hash(name) for name in (ROLLOUTS, *published)}
    state, _ = study.stage(STAGE, settings, inputs)
    if state == "done":
        session.progress.say("The heads are ranked and up to date.")
        return dict(study.read_json(SUMMARY))
    if state == "redo":
        study.clear_parts(CAUSAL)
    try:
        selected = _select(study, settings)
    except EvidenceError as error:
        study.manifest["stages"][STAGE]["reason"] = str(error)
        study.save()
        raise
    session.check_same(study)
    summary = _rank(study, settings, session, selected)
    study.write_json(SUMMARY, summary)
    study.finish(STAGE, [OUTPUT, SUMMARY])
    study.clear_parts(CAUSAL)
    return summary


def _require_thinking(study: Study) -> None:
    if study.manifest.get("model", {}).get("thinking") is None:
        raise TooFewExamplesError(
            "a model that thinks, so that there is a plateau to fall from",
            "a chat template without a thinking format",
            "Heads can be ranked for reasoning models alone.",
        )


def _select(study: Study, settings: HeadsSettings) -> Selected:
    rows = from_table(study.read_table(ROLLOUTS))
    return select(rows, settings.selection_prompts)


def _rank(
    study: Study, settings: HeadsSettings, session: Session, selected: Selected
) -> dict[str, Any]:
    probe, _ = read_own_probe(study, "published")
    adapter, seed = session.adapter, study_seed(study)
    train, test = list(selected.ranking), list(selected.checking)
    both = read_in_batches(study, session, [*train, *test], probe)
    ranking_on, held_out = _split(both, len(train))
    ranking = rank_heads(
        ranking_on.readings,
        ranking_on.clusters,
        generator(seed, "heads/ranking"),
        by=settings.ranking,
    )
    heads, n_top = to_check(ranking, settings.checked_heads, adapter.n_heads, seed)
    effects = take_away(study, session, test, probe, heads)
    checked = Checked(heads, n_top, effects, held_out.clusters)
    closed_form = drops(held_out.readings).total
    if settings.ranking == "published":
        closed_form = -held_out.readings.published
    table, records = table_of(ranking, checked, seed)
    study.write_table(OUTPUT, table)
    total = len(ranking)
    return {
        "by": settings.ranking,
        "n_layers": adapter.n_layers,
        "n_heads": adapter.n_heads,
        "ranked_on": _counts(ranking_on),
        "checked_on": _counts(held_out),
        "n_checked": n_top,
        "parts": parts_of(held_out, seed),
        "agreement": agreement_of(closed_form, checked, seed),
        "evidence": found_in_words(records, total),
        "heads": records,
    }


def _split(both: Read, place: int) -> tuple[Read, Read]:
    """Return what was read on the rows before a place, and on those after it."""
    parts = [
        Read(
            type(both.readings)(*(column[part] for column in both.readings)),
            both.others[part],
            both.clusters[part],
        )
        for part in (slice(None, place), slice(place, None))
    ]
    return parts[0], parts[1]


def _counts(found: Read) -> dict[str, int]:
    return {"rows": len(found.clusters), "requests": len(set(found.clusters))}
