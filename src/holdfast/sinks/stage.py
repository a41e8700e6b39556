"""Compare attention to the first token on harmful and on reference text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from holdfast.errors import InputError
from holdfast.models.model import Adapter
from holdfast.models.sink_mass import read_sinks
from holdfast.rollout.session import Session
from holdfast.sinks.divergence import SinkFigures, paired_sinks, unpaired_sinks
from holdfast.sinks.panel import MASSES, STAGE, summary_sentences
from holdfast.sinks.settings import SinksSettings
from holdfast.sinks.texts import (
    Step,
    Text,
    Texts,
    TextSources,
    gather_texts,
    render_texts,
    series,
)
from holdfast.study import Study, fingerprint
from holdfast.study.batches import Batches
from holdfast.study.figures import figure_of, generator
from holdfast.study.rows import Float32, Int32, rows_of, table_of

OUTPUT = "sinks.parquet"


class Measured(NamedTuple):
    """What was found of one checkpoint."""

    record: dict[str, Any]  # What the report says of it.
    heads: list[dict[str, Any]]  # Figures of every head.
    texts: Texts  # The texts as its tokens.
    shape: tuple[int, int]  # Layers, and heads of a layer.


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
    with study.stage(
        STAGE,
        key,
        inputs,
        progress=session.progress,
        done="The sink masses are there and up to date.",
        parts=[f"{STAGE}-*"],
    ) as stage:
        if stage.is_done:
            return stage.read_json(MASSES)
        found: dict[int, Measured] = {}
        # The last comes first, since the study is its own.
        for place in reversed(range(len(steps))):
            if place == len(steps) - 1:
                sessions[place].claim(study)
            batches = Batches(
                stage, sessions[place].batch_size, parts=f"{STAGE}-{place}"
            )
            found[place] = _measure(
                batches, sessions[place], steps[place], (material, settings)
            )
            sessions[place].release()
        measured = [found[place] for place in range(len(steps))]
        block = _block(measured, material, settings)
        heads = [(step, each.heads) for step, each in zip(steps, measured, strict=True)]
        stage.write_table(OUTPUT, head_table(heads))
        return stage.write_json(MASSES, block)


def last_of(models: Sequence[str]) -> str:
    """Return the last model that names stand for, to which the study belongs."""
    return series(models)[-1].name


def _session(step: Step, given: Session) -> Session:
    if step.name == given.name:
        return given
    return Session(step.name, given.settings, given.progress)


def _measure(
    batches: Batches,
    session: Session,
    step: Step,
    given: tuple[TextSources, SinksSettings],
) -> Measured:
    adapter, (material, settings) = session.adapter, given
    texts = render_texts(adapter, material, settings)
    label = "Sink mass" if step.step is None else f"Sink mass, step {step.step}"
    harmful, reference = measure_texts(batches, adapter, texts, label)
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
    measured: Sequence[Measured], material: TextSources, settings: SinksSettings
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
    block["evidence"] = summary_sentences(block)
    block["notes"] = notes_on(block, texts.left_out)
    return block


@dataclass(frozen=True)
class MassRow:
    """The sink masses of one text in a batch on disk."""

    row_id: str
    mass: Sequence[Float32]  # Of every head, layer by layer.
    seen: Sequence[Int32]  # Queries per layer that see the sink.


def measure_texts(
    batches: Batches, adapter: Adapter, texts: Texts, label: str
) -> tuple[Tensor, Tensor]:
    """Return the sink mass of every text; each distinct one is read once.

    So a text that stands on both sides has the very same mass on both.

    Returns: Mass of the harmful and of the reference texts, `[example, layer, head]`;
    not a number in a layer where no query of the text sees the sink.
    """
    distinct = {_name(text): text for text in (*texts.harmful, *texts.reference)}

    def work(batch: list[Text]) -> pa.Table:
        found = read_sinks(
            adapter,
            [text.token_ids for text in batch],
            [text.start for text in batch],
            batch_size=batches.batch_size,
        )
        names = [_name(text) for text in batch]
        values = (names, found.mass.flatten(1).tolist(), found.seen.tolist())
        return table_of(map(MassRow, *values), MassRow)

    table = batches.run(
        list(distinct.values()),
        work,
        name=_name,
        length=lambda text: len(text.token_ids),
        label=label,
    )
    shape = (adapter.n_layers, adapter.n_heads)
    by_name = {
        row.row_id: _mass(row.mass, row.seen, shape) for row in rows_of(table, MassRow)
    }
    return _stack(texts.harmful, by_name), _stack(texts.reference, by_name)


def _mass(mass: Sequence[float], seen: Sequence[int], shape: tuple[int, int]) -> Tensor:
    found = torch.tensor(mass, dtype=torch.float64).reshape(shape)
    return found.masked_fill((torch.tensor(seen) == 0)[:, None], torch.nan)


def _stack(texts: Sequence[Text], by_name: dict[str, Tensor]) -> Tensor:
    return torch.stack([by_name[_name(text)] for text in texts])


def _name(text: Text) -> str:
    return fingerprint([text.token_ids, text.start])[:32]


GROUPS = ("harmful", "reference", "divergence")


TABLE = pa.schema(
    [
        ("checkpoint", pa.int32()),
        ("name", pa.string()),
        ("step", pa.int64()),
        ("layer", pa.int32()),
        ("head", pa.int32()),
        *(
            (f"{group}{end}", pa.float64())
            for group in GROUPS
            for end in ("", "_low", "_high")
        ),
        ("reason", pa.string()),
    ]
)


def checkpoint_record(
    step: Step, identity: Mapping[str, Any], found: SinkFigures, texts: Texts
) -> dict[str, Any]:
    """Return what the report says of one checkpoint.

    `identity`: What tells it from others.
    """
    return {
        "name": step.name,
        "step": step.step,
        "weights_sha256": identity["weights_sha256"],
        "positive": figure_of(found.positive),
        "by_chance": figure_of(found.by_chance),
        "above": found.n_above,
        "below": found.n_below,
        "measured": found.n_measured,
        "mean_divergence": figure_of(found.mean_divergence),
        "penalty": figure_of(found.penalty),
        "harmful": figure_of(found.mean_harmful),
        "reference": figure_of(found.mean_reference),
        "uniform": round(_uniform([*texts.harmful, *texts.reference]), 6),
    }


def head_records(found: SinkFigures, n_heads: int) -> list[dict[str, Any]]:
    """Return the figures of every head, layer by layer."""
    rows = zip(found.harmful, found.reference, found.divergence, strict=True)
    return [
        {"layer": place // n_heads, "head": place % n_heads}
        | {
            group: figure_of(each)
            for group, each in zip(GROUPS, estimates, strict=True)
        }
        for place, estimates in enumerate(rows)
    ]


def head_table(heads: Sequence[tuple[Step, Sequence[Mapping[str, Any]]]]) -> pa.Table:
    """Return one row per checkpoint and head.

    `heads`: Each checkpoint with what `head_records` returned.
    """
    rows = [
        {
            "checkpoint": place,
            "name": step.name,
            "step": step.step,
            "layer": each["layer"],
            "head": each["head"],
            "reason": each["divergence"].get("reason"),
        }
        | {
            f"{group}{end}": each[group][key]
            for group in GROUPS
            for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))
        }
        for place, (step, records) in enumerate(heads)
        for each in records
    ]
    return pa.Table.from_pylist(rows, schema=TABLE)


def lengths_of(texts: Texts) -> dict[str, float]:
    """Return the mean length of the whole texts of each group, in tokens."""
    groups = {"harmful": texts.harmful, "reference": texts.reference}
    return {
        name: round(sum(text.length for text in group) / len(group), 1)
        for name, group in groups.items()
    }


def notes_on(block: Mapping[str, Any], left_out: Mapping[str, int]) -> list[str]:
    """Say what a reader has to know of the texts.

    `block`: The block `sinks` of the report.
    """
    said, lengths = [], block["tokens"]
    if block["pairing"] == "none":
        said.append(
            "Texts were not paired. They have "
            f"{lengths['harmful']:.0f} (harmful) and {lengths['reference']:.0f} "
            "(reference) tokens on average and stand on different prompts, and both "
            "move the sink mass by themselves."
        )
    else:
        unpaired = [
            f"{source['rows'] - source['paired']} {name}"
            for name, source in block["sources"].items()
            if source["rows"] > source["paired"]
        ]
        if unpaired:
            said.append(
                f"Rows without a partner, or beyond --limit, were left out: "
                f"{' and '.join(unpaired)}."
            )
    said += [f"{n} left out: {reason}." for reason, n in left_out.items()]
    return said


def _uniform(texts: Sequence[Text]) -> float:
    """Return the sink mass of a head that looks at all it sees alike."""
    means = []
    for text in texts:
        queries = range(text.start, len(text.token_ids))
        means.append(sum(1 / (place + 1) for place in queries) / len(queries))
    return sum(means) / len(means)
