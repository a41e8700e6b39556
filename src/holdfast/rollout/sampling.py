"""Draw the answers to questions, left to right or by diffusion."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import pyarrow as pa

from holdfast.data.chat.thinking import require_known_format
from holdfast.engines.port import Around
from holdfast.errors import EndpointError, InputError, SettingsError
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Completion, Drafting, Sampling
from holdfast.models.diffusion.denoise import denoise
from holdfast.models.diffusion.unmasking import UnmaskingSchedule
from holdfast.models.interventions import HeadEdit
from holdfast.models.model import Adapter, LanguageModel, MaskedModel
from holdfast.report.progress import Tick
from holdfast.rollout.cost import estimate, pace_sentence, step_work
from holdfast.rollout.engine import UNANSWERED, OtherEngine, ask_of
from holdfast.rollout.questions import (
    Answered,
    Question,
    converse,
    first_words,
    most_tokens,
    resolve_sampling,
    room_for_prompt,
)
from holdfast.rollout.session import Session
from holdfast.rollout.settings import DIFFUSION, RolloutSettings
from holdfast.study import Study
from holdfast.study.batches import ROW_ID, Batches, Meter, Pace
from holdfast.study.directory import Stage
from holdfast.study.rows import Int32, rows_of, table_of, table_schema


class Drawing(NamedTuple):
    """How answers are drawn, and what becomes of a batch of them."""

    # Temperature, nucleus and budgets; of a masked-diffusion model how a step decides.
    sampling: Sampling | UnmaskingSchedule
    # Turns questions and their completions into rows.
    table: Callable[[Answered], pa.Table]
    edit: HeadEdit | None = None  # Heads that are scaled meanwhile.
    # System prompt of later turns; the first ones are rendered.
    system_prompt: str | None = None


def sampling_of(study: Study, adapter: Adapter) -> Sampling:
    """Return how the rollouts were drawn; imported ones, how the model would draw."""
    known = study.record("rollout")["settings"].get("sampling")
    if known is not None:
        return Sampling(**known)
    asked = dict(study.manifest["settings"]["rollout"])
    known = {"column": tuple(asked["column"]), "diffusion": DIFFUSION}
    settings = RolloutSettings(**{**asked, **known})
    return Sampling(**asdict(resolve_sampling(adapter, settings)))


def sampling_for(
    session: Session, settings: RolloutSettings
) -> Sampling | UnmaskingSchedule:
    """Return the sampling that is asked for."""
    speaker = session.speaker
    if isinstance(speaker, MaskedModel):
        return sampler_for(speaker, settings)
    if given := settings.diffusion.given():
        raise SettingsError(
            "a masked-diffusion model with " + ", ".join(given),
            "a model that writes from left to right",
            "Leave them out, or use a masked-diffusion model.",
        )
    return resolve_sampling(session.adapter, settings)


def draw_answers(
    stage: Stage, session: Session, drawing: Drawing, to_ask: Sequence[Question]
) -> pa.Table:
    """Draw an answer to every question, batch by batch.

    Bounds are said first, and after one batch how long the rest will take.
    """
    other = _other_engine(stage, session, drawing, to_ask)
    at_once = session.batch_size if other is None else other.rows_at_once
    batches = Batches(stage, at_once, meter := Meter())
    room = room_for_prompt(session.speaker, drawing.sampling)
    _announce(session, drawing.sampling, to_ask, room)
    fits = [batches.batch_size]
    written: list[int] = []
    alone = not any(question.prompt.earlier for question in to_ask)

    def told(tick: Tick) -> None:
        # What a turn ends of a conversation may go on.
        meter.tick(tick._replace(finished=tick.finished if alone else 0))

    def drawn(batch: list[Question]) -> Answered:
        around = Around(batch_size=fits[-1], told=told)
        around = around if other is None else other.around(batch, around)
        parts = list(_answers(session, drawing, batch, around))
        if len(parts) > 1 and other is None:
            # Memory ran out on the way, so later batches start at what fitted.
            fits.append(len(parts[0]))
        made = [(batch[each.index], each) for part in parts for each in part]
        if not written:
            _require_answers(session.speaker, made)
        written.extend(len(each.token_ids) - asked.n_tokens for asked, each in made)
        return made

    def work(batch: list[Question]) -> pa.Table:
        system_prompt, speaker = drawing.system_prompt, session.speaker
        if other is not None:
            other.begin(batch)
        return drawing.table(
            converse(speaker, batch, drawn, system_prompt=system_prompt, room=room)
        )

    table = batches.run(
        to_ask,
        work,
        name=lambda question: question.row_id,
        length=lambda question: question.n_tokens,
        label="Drawing answers",
        paced=lambda pace: tell_pace(session, pace, written),
        cost=lambda batch, first: _cost(session, drawing, meter, batch, first),
    )
    stage.facts["batch_size"] = min(fits)
    if table.num_rows:
        return table
    if failed := stage.facts.get(UNANSWERED):
        raise EndpointError(
            f"an answer to one of {len(to_ask)} questions",
            f"none, such as for {next(iter(failed.items()))}",
            "Read the server's words and its log, then run the same command again.",
        )
    raise InputError(
        "a conversation that fits in the model's context",
        f"none of {len(to_ask)}",
        "Lower --max-answer, or ask the first turns alone with --turns first.",
    )


def _other_engine(
    stage: Stage, session: Session, drawing: Drawing, to_ask: Sequence[Question]
) -> OtherEngine | None:
    """Return the engine that draws in place of the model itself; None for the model.

    Raises:
        SettingsError: If none can: heads are scaled, or the model is denoised, here.
    """
    name, sampling = session.engine_settings.engine, drawing.sampling
    if name == "hf":
        return None
    if not isinstance(sampling, Sampling) or drawing.edit is not None:
        raise SettingsError(
            "--engine hf for a masked-diffusion model, and where heads are scaled",
            f"--engine {name}",
            "Leave --engine out.",
        )
    return OtherEngine(stage, session, sampling, to_ask, drawing.system_prompt)


def _require_answers(speaker: LanguageModel, made: Answered) -> None:
    """Stop before the rest is drawn where the first answers are thinking."""
    said = [
        (
            asked.prompt.said,
            first_words(speaker, each.token_ids, each.spans, each.closed),
        )
        for asked, each in made
    ]
    require_known_format(speaker.thinking, said)


def _answers(
    session: Session,
    drawing: Drawing,
    batch: Sequence[Question],
    around: Around,
) -> Iterator[list[Completion]]:
    speaker, how, size = session.speaker, drawing.sampling, around.batch_size
    prompts = [(question.token_ids, question.seed) for question in batch]
    if isinstance(speaker, MaskedModel) and isinstance(how, UnmaskingSchedule):
        batches = denoise(speaker, prompts, how, batch_size=size)
        return ([_with_steps(each) for each in batch] for batch in batches)
    assert isinstance(how, Sampling)
    if drawing.edit is not None:
        told, edit = around.told, drawing.edit
        adapter = session.adapter
        return generate(adapter, prompts, how, batch_size=size, edit=edit, told=told)
    asks = [ask_of(each, drawing.system_prompt) for each in batch]
    return session.engine.draw(asks, how, around)


def _cost(
    session: Session,
    drawing: Drawing,
    meter: Meter,
    batch: Sequence[Question],
    first: Sequence[Question],
) -> float:
    """Return what a batch costs beside the first, which the meter has measured."""
    lengths, measured = ([each.n_tokens for each in b] for b in (batch, first))
    if isinstance(drawing.sampling, UnmaskingSchedule):
        # Every pass reads all of a row.
        return float(len(batch) * (max(lengths) + drawing.sampling.gen_length))
    if session.engine_settings.engine != "hf":
        return float(len(batch))
    return meter.cost(lengths, measured, step_work(session.adapter))


def _announce(
    session: Session,
    how: Sampling | UnmaskingSchedule,
    to_ask: Sequence[Question],
    room: int,
) -> None:
    if isinstance(how, UnmaskingSchedule):
        passes = "as many" if how.steps is None else str(how.steps)
        session.progress.say(
            f"{len(to_ask)} answers of {how.gen_length} tokens to draw, in {passes} "
            "forward passes each; how long all of them take is said after the first "
            "batch."
        )
        return
    if session.engine_settings.engine != "hf":
        session.progress.say(f"{len(to_ask)} answers to draw.")
        return
    announce(
        session,
        rows=sum(1 + len(each.prompt.earlier) for each in to_ask),
        prompt=max(most_tokens(each, how.max_answer, room) for each in to_ask),
        sampling=how,
    )


def announce(
    session: Session,
    *,
    rows: int,
    prompt: int,
    sampling: Sampling,
    drafted: bool = False,
) -> None:
    """Say what drawing answers can cost at most, before it begins.

    `session`: The model, and where progress is told.
    """
    cost = estimate(
        session.adapter,
        sampling,
        rows=rows,
        prompt=prompt,
        batch_size=session.batch_size,
        drafted=drafted,
    )
    session.progress.say(cost.sentence(rows))


def tell_pace(session: Session, pace: Pace, written: Sequence[int]) -> None:
    """Say how long the rest will take, now that one batch is drawn."""
    sentence = pace_sentence(pace, sum(written) / max(1, len(written)))
    if sentence is not None:
        session.progress.say(sentence)


STEPS = "steps.parquet"


@dataclass(frozen=True)
class StepsRow:
    """How a masked-diffusion model came to one answer (see `Drafting`)."""

    row_id: str
    response: tuple[Int32, ...]
    committed_at: tuple[Int32, ...]
    drafts: tuple[Int32, ...]  # Of all steps, one behind the other.


GEN_LENGTH, DENOISING_STEPS = 128, 32


def sampler_for(masked: MaskedModel, settings: RolloutSettings) -> UnmaskingSchedule:
    """Return how a masked-diffusion model decodes, its defaults resolved."""
    if settings.top_p not in (None, 1, 1.0):
        raise SettingsError(
            "no --top-p with a masked-diffusion model, which takes the likeliest "
            "token or adds noise to all of them",
            str(settings.top_p),
            "Leave it out, or choose a --temperature.",
        )
    asked = settings.diffusion
    own = getattr(masked.model.config, "response_length", None)
    length = asked.gen_length or own or GEN_LENGTH
    n_blocks = length // (asked.block_length or length)
    usual = max(min(DENOISING_STEPS, length), n_blocks)
    adaptive = asked.threshold is not None
    return UnmaskingSchedule(
        gen_length=length,
        block_length=asked.block_length,
        steps=asked.denoising_steps or (None if adaptive else usual),
        remasking=asked.remasking,
        temperature=settings.temperature or 0.0,
        cfg_scale=asked.cfg_scale,
        threshold=asked.threshold,
    )


def _with_steps(completion: Completion) -> Completion:
    """Keep of a trace what is written down: the rest of it is large."""
    trace = completion.trace
    assert trace is not None
    assert trace.predictions is not None
    drafting = Drafting(
        tuple(trace.token_ids.tolist()),
        tuple(trace.committed_at.tolist()),
        tuple(tuple(draft) for draft in trace.predictions.tolist()),
    )
    return replace(completion, drafting=drafting, trace=None)


def with_steps(rows: pa.Table, made: Mapping[str, Completion]) -> pa.Table:
    """Put the steps of answers beside their rows; left as they are without any.

    `rows`: A table with a column `row_id`.
    """
    paths = []
    for name in rows.column(ROW_ID).to_pylist():
        drafting = made[name].drafting
        if drafting is None:
            return rows
        flat = tuple(token for draft in drafting.drafts for token in draft)
        paths.append(StepsRow(name, drafting.response, drafting.committed_at, flat))
    steps = table_of(paths, StepsRow)
    for field in list(steps.schema)[1:]:
        rows = rows.append_column(field, steps.column(field.name))
    return rows


def take_steps(rows: pa.Table) -> tuple[pa.Table, pa.Table | None]:
    """Return rows without their steps, and the steps as a table of their own."""
    names = table_schema(StepsRow).names
    if not set(names) <= set(rows.column_names):
        return rows, None
    return rows.drop_columns(names[1:]), rows.select(names)


def read_steps(study: Study) -> dict[str, Drafting]:
    """Return the steps of every answer of a study, by row."""
    if not study.path(STEPS).exists():
        raise InputError(
            f"{STEPS} in {study.directory}",
            "no such file",
            "Run `holdfast rollout` with a masked-diffusion model; answers that were "
            "imported have no steps.",
        )
    drafting = {}
    for row in rows_of(study.read_table(STEPS), StepsRow):
        length = len(row.response)
        starts = range(0, len(row.drafts), length)
        drafts = tuple(row.drafts[start : start + length] for start in starts)
        drafting[row.row_id] = Drafting(row.response, row.committed_at, drafts)
    return drafting
