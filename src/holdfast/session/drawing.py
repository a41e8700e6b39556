"""Draw the answers to questions: what it costs is said, and a broken run goes on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from holdfast.errors import InputError
from holdfast.models.decoding import Tick
from holdfast.models.edits import HeadEdit
from holdfast.models.generation import generate
from holdfast.models.masked import MaskedModel
from holdfast.models.remasking import Denoising
from holdfast.models.rows import Completion, Sampling
from holdfast.session.asking import Question, resolve_sampling, room_for_prompt
from holdfast.session.batches import Pace, in_batches
from holdfast.session.context import Session
from holdfast.session.conversing import Answered, converse, most_tokens
from holdfast.session.denoised import answers, require_no_flags, sampler_for
from holdfast.session.estimate import estimate, pace_sentence, step_work
from holdfast.session.meter import Meter
from holdfast.session.progress import Progress
from holdfast.session.settings import RolloutSettings
from holdfast.study import Study

Made = Sequence[tuple[Question, Completion]]


class Drawing(NamedTuple):
    """How answers are drawn, and what becomes of a batch of them.

    Attributes:
        sampling: Temperature, nucleus and budgets; of a masked-diffusion model how
            a step decides.
        table: Turns questions and their completions into rows.
        edit: Heads that are scaled meanwhile.
        system_prompt: System prompt of later turns; the first ones are rendered.
    """

    sampling: Sampling | Denoising
    table: Callable[[Made], pa.Table]
    edit: HeadEdit | None = None
    system_prompt: str | None = None


def sampling_for(session: Session, settings: RolloutSettings) -> Sampling | Denoising:
    """Return the sampling that is asked for.

    Raises:
        SettingsError: If flags do not fit together, or not the kind of model.
    """
    speaker = session.speaker
    if isinstance(speaker, MaskedModel):
        return sampler_for(speaker, settings)
    require_no_flags(settings)
    return resolve_sampling(session.adapter, settings)


def is_done(
    study: Study,
    stage: str,
    key: Mapping[str, Any],
    inputs: Mapping[str, str],
    *,
    output: str,
    progress: Progress,
) -> bool:
    """Begin a stage, or go on with it; tell whether nothing is left to do.

    Args:
        study: The study.
        stage: Name of the stage.
        key: What its output depends on, beside its inputs.
        inputs: Hashes of what it reads.
        output: The file it writes.
        progress: Told that the file is there, or that a broken run goes on.
    """
    state, _ = study.stage(stage, dict(key), dict(inputs))
    if state == "done":
        progress.say(f"{output} is there and up to date.")
    if state == "continue":
        progress.say("Going on where the last run was interrupted.")
    return state == "done"


def draw_answers(
    study: Study,
    stage: str,
    session: Session,
    drawing: Drawing,
    to_ask: Sequence[Question],
) -> pa.Table:
    """Draw an answer to every question, batch by batch.

    Bounds are said first, and after one batch how long the rest will take.

    Args:
        study: Where the parts lie until the stage has finished.
        stage: The stage, already begun; its record gains the smallest batch.
        session: The model, and where progress is told.
        drawing: How answers are drawn and kept.
        to_ask: The questions.

    Returns:
        The rows, in the order of the questions; conversations that outgrew the
        context have none.

    Raises:
        InputError: If all of them did.
        HoldfastError: If model or disk will not do; what was drawn is kept.
    """
    batch_size = session.batch_size
    room = room_for_prompt(session.speaker, drawing.sampling)
    _announce(session, drawing.sampling, to_ask, room)
    fits = [batch_size]
    written: list[int] = []
    meter = Meter()

    def told(tick: Tick) -> None:
        # What a turn ends of a conversation may go on.
        meter.tick(tick._replace(finished=tick.finished if alone else 0))

    alone = not any(each.prompt.earlier for each in to_ask)

    def drawn(batch: list[Question]) -> Answered:
        prompts = [(question.token_ids, question.seed) for question in batch]
        parts = list(_answers(session, drawing, prompts, fits[-1], told))
        if len(parts) > 1:
            # Memory ran out on the way, so later batches start at what fitted.
            fits.append(len(parts[0]))
        made = [(batch[each.index], each) for part in parts for each in part]
        written.extend(len(each.token_ids) - asked.n_tokens for asked, each in made)
        return made

    def work(batch: list[Question]) -> pa.Table:
        made = converse(
            session.speaker,
            batch,
            drawn,
            system_prompt=drawing.system_prompt,
            room=room,
        )
        return drawing.table(made)

    table = in_batches(
        study,
        stage,
        to_ask,
        name=lambda question: question.row_id,
        length=lambda question: question.n_tokens,
        batch_size=batch_size,
        work=work,
        progress=session.progress,
        label="Drawing answers",
        paced=lambda pace: tell_pace(session, pace, written),
        meter=meter,
        cost=lambda batch, first: _cost(session, drawing, meter, batch, first),
    )
    study.manifest["stages"][stage]["batch_size"] = min(fits)
    if table.num_rows:
        return table
    raise InputError(
        "a conversation that fits in the model's context",
        f"none of {len(to_ask)}",
        "Lower --max-answer, or ask the first turns alone with --turns first.",
    )


def _answers(
    session: Session,
    drawing: Drawing,
    prompts: Sequence[tuple[Sequence[int], int]],
    batch_size: int,
    told: Callable[[Tick], None],
) -> Iterator[list[Completion]]:
    speaker, how = session.speaker, drawing.sampling
    if isinstance(speaker, MaskedModel) and isinstance(how, Denoising):
        return answers(speaker, prompts, how, batch_size)
    assert isinstance(how, Sampling)
    return generate(
        session.adapter,
        prompts,
        how,
        batch_size=batch_size,
        edit=drawing.edit,
        told=told,
    )


def _cost(
    session: Session,
    drawing: Drawing,
    meter: Meter,
    batch: Sequence[Question],
    first: Sequence[Question],
) -> float:
    """Return what a batch costs beside the first, which the meter has measured."""
    lengths, measured = ([each.n_tokens for each in b] for b in (batch, first))
    if isinstance(drawing.sampling, Denoising):
        # Every pass reads all of a row.
        return float(len(batch) * (max(lengths) + drawing.sampling.gen_length))
    return meter.cost(lengths, measured, step_work(session.adapter))


def _announce(
    session: Session, how: Sampling | Denoising, to_ask: Sequence[Question], room: int
) -> None:
    if isinstance(how, Denoising):
        passes = "as many" if how.steps is None else str(how.steps)
        session.progress.say(
            f"{len(to_ask)} answers of {how.gen_length} tokens to draw, in {passes} "
            "forward passes each; how long all of them take is said after the first "
            "batch."
        )
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

    Args:
        session: The model, and where progress is told.
        rows: Answers to draw.
        prompt: Tokens of the longest prompt.
        sampling: How they are drawn.
        drafted: Whether drafts of them are read together with the prompts.
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
    """Say how long the rest will take, now that one batch is drawn.

    Args:
        session: Where progress is told.
        pace: How the batch went.
        written: Tokens of each of its answers, thinking included.
    """
    sentence = pace_sentence(pace, sum(written) / max(1, len(written)))
    if sentence is not None:
        session.progress.say(sentence)
