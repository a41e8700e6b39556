"""Compare how much heads look at the first token on harmful and on reference text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from holdfast.analysis.sinks import SinkFigures, paired_sinks, unpaired_sinks
from holdfast.errors import InputError
from holdfast.session.checkpoint_series import Step, series
from holdfast.session.context import Session
from holdfast.session.figures import generator
from holdfast.session.sink_measuring import measure_texts
from holdfast.session.sink_records import (
    checkpoint_record,
    found_in_words,
    head_records,
    lengths_of,
    notes_on,
    table_of,
)
from holdfast.session.sink_settings import SinksSettings
from holdfast.session.sink_sources import MASSES, STAGE
from holdfast.session.sink_texts import Material, Texts, gather_texts, render_texts
from holdfast.study import Study

OUTPUT = "sinks.parquet"
PARTS = "parts"


class Measured(NamedTuple):
    """What was found of one checkpoint.

    Attributes:
        record: What the report says of it.
        heads: Figures of every head.
        texts: The texts as its tokens.
        shape: Layers, and heads of a layer.
    """

    record: dict[str, Any]
    heads: list[dict[str, Any]]
    texts: Texts
    shape: tuple[int, int]


def run(
    study: Study,
    settings: SinksSettings,
    session: Session,
    models: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare sink masses under one model or several; writes `sinks.parquet`.

    Args:
        study: Where everything goes; it belongs to the last model.
        settings: Texts and how they are compared.
        session: The last model, or a way to load it, and where progress is told.
        models: Checkpoints in their order, as the user named them; by default that of
            the session alone.

    Returns:
        The block `sinks` of the report.

    Raises:
        InputError: If texts cannot be read or paired, or models differ in shape.
        TooFewExamplesError: If fewer than two prompts are left.
        ModelError: If a model does not fit, or its attention cannot be tapped.
    """
    session.remember(study)
    material = gather_texts(settings)
    steps = series(models) if models else [Step(session.name, None)]
    sessions = [_session(step, session) for step in steps]
    # A study of another model is refused before anything is loaded.
    sessions[-1].check_owner(study)
    identities = [each.fingerprints() for each in sessions]
    key = settings.kept() | {"steps": [step.step for step in steps]}
    inputs = {name: record["sha256"] for name, record in material.records.items()}
    for place, identity in enumerate(identities):
        inputs |= {f"{place} {name}": value for name, value in identity.items()}
    state, _ = study.stage(STAGE, key, inputs)
    if state != "continue":
        _clear(study)
    if state == "done":
        session.progress.say("The sink masses are there and up to date.")
        return dict(study.read_json(MASSES))
    found: dict[int, Measured] = {}
    # The last comes first, since the study is its own.
    for place in reversed(range(len(steps))):
        if place == len(steps) - 1:
            sessions[place].claim(study)
        found[place] = _measure(
            study, place, sessions[place], steps[place], (material, settings)
        )
        sessions[place].release()
    measured = [found[place] for place in range(len(steps))]
    block = _block(measured, material, settings)
    heads = [(step, each.heads) for step, each in zip(steps, measured, strict=True)]
    study.write_table(OUTPUT, table_of(heads))
    study.write_json(MASSES, block)
    study.finish(STAGE, [OUTPUT, MASSES])
    _clear(study)
    return block


def last_of(models: Sequence[str]) -> str:
    """Return the last model that names stand for, to which the study belongs.

    Raises:
        SettingsError: If nothing is named, or one model twice.
    """
    return series(models)[-1].name


def _session(step: Step, given: Session) -> Session:
    if step.name == given.name:
        return given
    return Session(step.name, given.settings, given.progress)


def _clear(study: Study) -> None:
    for folder in study.path(PARTS).glob(f"{STAGE}-*"):
        study.clear_parts(folder.name)


def _measure(
    study: Study,
    place: int,
    session: Session,
    step: Step,
    given: tuple[Material, SinksSettings],
) -> Measured:
    adapter, (material, settings) = session.adapter, given
    texts = render_texts(adapter, material, settings)
    label = "Sink mass" if step.step is None else f"Sink mass, step {step.step}"
    parts = f"{STAGE}-{place}"
    harmful, reference = measure_texts(study, parts, session, texts, label)
    # The same draws for every checkpoint, so that a curve moves by its heads alone.
    drawn = generator(settings.seed, STAGE)
    found = _estimate(harmful, reference, texts, settings, drawn)
    return Measured(
        checkpoint_record(step, session.model_record(), found, texts),
        head_records(found, adapter.n_heads),
        texts,
        (adapter.n_layers, adapter.n_heads),
    )


def _estimate(
    harmful: Any, reference: Any, texts: Texts, settings: SinksSettings, drawn: Any
) -> SinkFigures:
    prompts = [text.prompt for text in texts.harmful]
    if settings.pairing == "prompt":
        return paired_sinks(harmful, reference, prompts, drawn)
    others = [text.prompt for text in texts.reference]
    return unpaired_sinks(harmful, prompts, reference, others, drawn)


def _block(
    measured: Sequence[Measured], material: Material, settings: SinksSettings
) -> dict[str, Any]:
    """Return the block `sinks` of the report; single heads are of the last model."""
    last = measured[-1]
    odd = [each for each in measured if each.shape != last.shape]
    if odd:
        raise InputError(
            f"checkpoints of {last.shape[0]} layers of {last.shape[1]} heads",
            f"{odd[0].shape[0]} of {odd[0].shape[1]} in {odd[0].record['name']}",
            "Give checkpoints of one run.",
        )
    texts = last.texts
    block: dict[str, Any] = {
        "pairing": settings.pairing,
        "positions": settings.positions,
        "n_layers": last.shape[0],
        "n_heads": last.shape[1],
        "rows": {"harmful": len(texts.harmful), "reference": len(texts.reference)},
        "requests": len({text.prompt for text in texts.harmful}),
        "tokens": lengths_of(texts),
        "sources": material.records,
        "checkpoints": [each.record for each in measured],
        "heads": last.heads,
    }
    block["evidence"] = found_in_words(block)
    block["notes"] = notes_on(block, texts.left_out)
    return block
