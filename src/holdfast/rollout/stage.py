"""Ask every prompt, keep every answer token by token, and judge it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from holdfast.data.chat.template import control_literals
from holdfast.data.chat.thinking import require_known_format
from holdfast.engines.serving.batch_files import batch_lines
from holdfast.errors import HoldfastError, SettingsError
from holdfast.judges.calibration import brief, find_calibration, identity_record
from holdfast.judges.cascade import cascade_record
from holdfast.judges.rows import NOT_YET, judge_rows, judged_so_far
from holdfast.judges.settings import BY_RULES, JudgeSettings
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.diffusion.unmasking import UnmaskingSchedule
from holdfast.rollout.answers import (
    as_asked,
    rollout_from_completion,
    rollout_from_file,
    with_verdict,
)
from holdfast.rollout.engine import (
    UNANSWERED,
    ask_of,
    engine_identity,
    engine_notes,
    reopen_unanswered,
)
from holdfast.rollout.imported import (
    ImportedFile,
    is_own_batch,
    read_batch,
    read_completions,
    understand,
)
from holdfast.rollout.prompts import GatheredPrompts, gather, some_of
from holdfast.rollout.questions import (
    Answered,
    Question,
    answer_notes,
    first_words,
    fit_context,
    outgrown,
    prompt_notes,
    questions,
)
from holdfast.rollout.rows import (
    JUDGE_STAGE,
    LOST,
    Rollout,
    assign,
    from_table,
    to_table,
)
from holdfast.rollout.sampling import (
    STEPS,
    Drawing,
    draw_answers,
    sampling_for,
    take_steps,
    with_steps,
)
from holdfast.rollout.session import Session
from holdfast.rollout.settings import RolloutSettings
from holdfast.study import Study, require_place
from holdfast.study.batches import ROW_ID
from holdfast.study.directory import Stage
from holdfast.study.files import atomic_write_text

STAGE = "rollout"
OUTPUT = "rollouts.parquet"
WARNING = "warning: "
"""How a note on a source begins that the user must not miss."""


def run(
    study: Study,
    settings: RolloutSettings,
    session: Session,
    judge: JudgeSettings = BY_RULES,
) -> dict[str, Any]:
    """Draw and judge an answer to every prompt; writes `rollouts.parquet`.

    Another judge judges the same answers anew; none is drawn again.

    Args:
        study: Where the rollouts go.
        settings: Prompts and sampling.
        session: The model, and where progress is told.
        judge: The judge; the rules by default.

    Returns:
        Number of rows, counts by role and verdict, and answers whose thinking was
        closed by force.

    Raises:
        HoldfastError: If prompts, model, judge or disk will not do. What was drawn or
            judged until then is kept; a row without a verdict says why.
    """
    session.check_judge(judge)
    if settings.write_batch is not None:
        return _write_batch(settings, session, settings.write_batch)
    if settings.imported is not None:
        _import(study, settings, session, _read(settings, session, settings.imported))
    else:
        _ask(study, settings, session, gather(settings, session.given))
    _judge(study, settings, session, judge)
    return _summary(study)


def _write_batch(
    settings: RolloutSettings, session: Session, place: str
) -> dict[str, Any]:
    """Write the questions as a batch, and draw nothing."""
    sampling, to_ask, notes = _questions(
        settings, session, gather(settings, session.given)
    )
    if not isinstance(sampling, Sampling) or any(e.prompt.earlier for e in to_ask):
        raise SettingsError(
            "--write-batch with a model that writes from left to right, and prompts of "
            "one turn",
            "later turns, which need the answers to those before, or another model",
            "Give --turns first, or leave --write-batch out.",
        )
    for note in notes:
        session.progress.warn(note)
    tokenizer = session.adapter.tokenizer
    spelled = [e for e in to_ask if control_literals(tokenizer, [e.asked])[0]]
    if spelled:
        session.progress.warn(
            f"{len(spelled)} of {len(to_ask)} questions are not in the batch, since "
            "whoever renders chats would take the control tokens that they spell for "
            f"such: {some_of([each.row_id for each in spelled])}."
        )
    to_ask = [each for each in to_ask if each not in spelled]
    asks = [(each.row_id, ask_of(each, settings.system_prompt)) for each in to_ask]
    model = session.engine_settings.endpoint_model or session.name
    lines = batch_lines(asks, model, session.adapter, sampling)
    require_place(Path(place), folder=False, flag="--write-batch")
    atomic_write_text(Path(place), lines)
    session.progress.say(
        f"{len(asks)} requests for the model `{model}` are in {place}. Run them, then "
        "the same command with --import and the file of the results in place of "
        "--write-batch."
    )
    return {"rows": 0, "verdicts": {}, "cut": 0, "forced_close": 0, "batch": place}


def _read(settings: RolloutSettings, session: Session, place: str) -> ImportedFile:
    """Read completions: answers to a batch of this run, or rows with their prompts."""
    if is_own_batch(place, settings.import_requests):
        asked = gather(settings, session.given)
        return read_batch(place, _questions(settings, session, asked)[1])
    return read_completions(
        place,
        settings.import_requests,
        accept=settings.yes,
        system_prompt=settings.system_prompt,
    )


def _questions(
    settings: RolloutSettings, session: Session, asked: GatheredPrompts
) -> tuple[Sampling | UnmaskingSchedule, list[Question], list[str]]:
    """Return how questions are asked, which fit, and what to say of the others."""
    sampling = sampling_for(session, settings)
    every = questions(session.speaker, asked, settings)
    to_ask, unfit = fit_context(session.speaker, every, sampling)
    return sampling, to_ask, [*prompt_notes(session.speaker, asked), *unfit]


def _ask(
    study: Study, settings: RolloutSettings, session: Session, asked: GatheredPrompts
) -> None:
    """Draw the answers, unless they are there."""
    _tell(asked.sources, asked.overlap, session)
    session.claim(study)
    sampling, to_ask, notes = _questions(settings, session, asked)
    for note in notes:
        session.progress.warn(note)
    key = (
        _key(settings, study)
        | {"sampling": asdict(sampling)}
        | engine_identity(session)
    )
    reopen_unanswered(study, STAGE, OUTPUT)
    with _stage(study, key, {"prompts": asked.sha256}, session) as stage:
        if stage.is_done:
            return

        def rows(made: Answered) -> pa.Table:
            found = [
                rollout_from_completion(*each, settings.system_prompt) for each in made
            ]
            completions = {question.row_id: each for question, each in made}
            table = to_table(sorted(found, key=lambda row: row.row_id))
            return with_steps(table, completions)

        drawing = Drawing(sampling, rows, system_prompt=settings.system_prompt)
        table = draw_answers(stage, session, drawing, to_ask)
        missing = stage.facts.get(UNANSWERED, {})
        there = [*table.column(ROW_ID).to_pylist(), *missing]
        for note in outgrown(to_ask, there):
            session.progress.warn(note)
            notes.append(note)
        notes += engine_notes(stage)
        answers, steps = take_steps(table)
        made = from_table(answers)
        if lost := sum(row.tokens == LOST for row in made):
            notes.append(lost_tokens(lost, len(made)))
            session.progress.warn(notes[-1])
        facts = {
            "sources": list(asked.sources),
            "overlap": asked.overlap,
            "prompt_notes": [*notes, *_openings(made, session)],
        }
        _finish(stage, settings, made, facts, steps)


def _stage(
    study: Study, key: Mapping[str, Any], inputs: Mapping[str, str], session: Session
) -> AbstractContextManager[Stage]:
    done = f"{OUTPUT} is there and up to date."
    return study.stage(STAGE, key, inputs, progress=session.progress, done=done)


def lost_tokens(n: int, rows: int) -> str:
    """Return what to say of rows whose tokens are not known."""
    return (
        f"{n} of {rows} answers came as text whose tokens, tokenised again, give "
        "another text: they count in rates, and no state is read of them."
    )


def _openings(rows: Sequence[Rollout], session: Session) -> list[str]:
    """Warn of answers that begin with a thinking in tags that are not the model's.

    Where most of them do, they are refused.
    """
    speaker = session.speaker
    openings = [
        first_words(speaker, row.token_ids, row.spans, row.closed) for row in rows
    ]
    said = [row.prompt for row in rows]
    require_known_format(speaker.thinking, list(zip(said, openings, strict=True)))
    notes = answer_notes(speaker, openings)
    for note in notes:
        session.progress.warn(note)
    return notes


def _tell(
    sources: Iterable[Mapping[str, Any]],
    overlap: Mapping[str, Mapping[str, int]],
    session: Session,
) -> None:
    """Say what was read, and every note on it, the doubtful ones so that they show."""
    for source in sources:
        session.progress.say(
            f"{source['role']}: {_count(source)} rows from {source['source']}"
        )
        for note in source["notes"]:
            doubt = note.removeprefix(WARNING)
            if doubt == note:
                session.progress.say(f"  {note}")
            else:
                session.progress.warn(f"{source['role']}: {doubt}")
    for pair, counts in overlap.items():
        if counts["exact"] or counts["similar"]:
            session.progress.say(
                f"{pair} share {counts['exact']} prompts and {counts['similar']} "
                "similar pairs."
            )


def _count(source: Mapping[str, Any]) -> str:
    """Return how many rows were read, and how many are asked where that is fewer."""
    rows, asked = source["rows"], source.get("asked", source["rows"])
    return str(rows) if asked == rows else f"{asked} of {rows}"


def _key(settings: RolloutSettings, study: Study) -> dict[str, Any]:
    """Return what the rollouts depend on, beside prompts and sampling."""
    return {
        "model": study.manifest["model"],
        "samples": settings.samples,
        "seed": settings.seed,
        "system_prompt": settings.system_prompt,
        "test_fraction": settings.test_fraction,
    }


def _import(
    study: Study, settings: RolloutSettings, session: Session, file: ImportedFile
) -> None:
    """Take completions from a file in place of drawing them."""
    speaker = session.speaker
    session.claim(study)
    key = _key(settings, study) | {"bare": settings.import_bare}
    with _stage(study, key, {"completions": file.sha256}, session) as stage:
        if stage.is_done:
            return
        said, notes = understand(file, speaker.thinking, settings.import_bare)
        rows = [
            rollout_from_file(each, parts, speaker, settings.system_prompt)
            for each, parts in zip(file.rows, said, strict=True)
        ]
        # What is said of the file stands once, beside the first of its roles.
        every = ["Completions were imported, not drawn here."]
        if lost := sum(row.tokens == LOST for row in rows):
            notes.append(lost_tokens(lost, len(rows)))
        sources = [
            {
                "role": role,
                "source": file.source,
                "column": file.column,
                "rows": count,
                "duplicates": 0,
                "sha256": file.sha256,
                "notes": every if place else [*every, *file.notes, *notes],
            }
            for place, (role, count) in enumerate(Counter(r.role for r in rows).items())
        ]
        _tell(sources, {}, session)
        strange = _openings(rows, session)
        facts = {"sources": sources, "overlap": {}, "prompt_notes": strange}
        _finish(stage, settings, rows, facts)


def _finish(
    stage: Stage,
    settings: RolloutSettings,
    rows: list[Rollout],
    facts: Mapping[str, Any],
    steps: pa.Table | None = None,
) -> None:
    """Keep the answers, which no judge has seen yet."""
    stage.study.manifest["stages"].pop(JUDGE_STAGE, None)
    stage.write_table(OUTPUT, to_table(rows))
    stage.study.manifest["settings"] = {STAGE: asdict(settings)}
    if steps is not None:
        stage.write_table(STEPS, steps)
    else:
        stage.study.path(STEPS).unlink(missing_ok=True)
    stage.facts |= facts


def _judge(
    study: Study, settings: RolloutSettings, session: Session, chosen: JudgeSettings
) -> None:
    """Judge every answer, and assign the splits, which depend on the verdicts."""
    judge = session.open_judge(chosen)
    calibration = find_calibration(judge.identity, [chosen.calibrations])
    known: dict[str, Any] = {"calibration": calibration and brief(calibration)}
    key = {
        "judge": identity_record(judge.identity),
        "thinking": chosen.judge_thinking,
        "answers": study.record(STAGE)["fingerprint"],
    }
    state, _ = study.state(JUDGE_STAGE, key, {})
    if state == "done":
        study.manifest["stages"][JUDGE_STAGE].update(known)
        study.save()
        return
    rows = from_table(study.read_table(OUTPUT))
    if state == "redo":
        # Before the manifest names this judge: a run that is killed here leaves no
        # verdict of another judge under its name, and none as if it were done.
        study.reopen(JUDGE_STAGE)
        _write_verdicts(study, settings, rows, {}, NOT_YET)
    study.begin(JUDGE_STAGE, key, {})
    record = study.manifest["stages"][JUDGE_STAGE]
    asked = as_asked(rows)
    try:
        table = judge_rows(
            study,
            JUDGE_STAGE,
            asked,
            judge,
            session.progress,
            with_thinking=chosen.judge_thinking,
        )
    except HoldfastError as error:
        verdicts = judged_so_far(study, JUDGE_STAGE, asked, judge.identity)
        why = f"not judged: {error.found}"
        facts = _write_verdicts(study, settings, rows, verdicts, why)
        record.update(reason=str(error), **facts, **known)
        study.save()
        raise
    verdicts = {each[ROW_ID]: each for each in table.to_pylist()}
    if (cascade := cascade_record(judge, asked, verdicts.values())) is not None:
        known["cascade"] = cascade
    facts = _write_verdicts(study, settings, rows, verdicts, NOT_YET)
    record.pop("reason", None)
    study.finish(JUDGE_STAGE, [OUTPUT], **facts, **known)


def _write_verdicts(
    study: Study,
    settings: RolloutSettings,
    rows: Sequence[Rollout],
    verdicts: Mapping[str, Mapping[str, Any]],
    why: str,
) -> dict[str, Any]:
    """Write rows with what the judge has said of them, and their splits.

    `why`: Why there is no verdict on the other rows.
    """
    judged = [with_verdict(row, verdicts.get(row.row_id), why) for row in rows]
    assigned = assign(judged, settings.test_fraction)
    study.write_table(OUTPUT, to_table(assigned.rows))
    return {"fractions": assigned.fractions, "split_notes": assigned.notes}


def _summary(study: Study) -> dict[str, Any]:
    """Count verdicts by role, answers that were cut, and thinking closed by force."""
    table = study.read_table(OUTPUT)
    roles, verdicts = (table.column(name).to_pylist() for name in ("role", "verdict"))
    counts: dict[str, dict[str, int]] = {}
    for (role, verdict), count in sorted(
        Counter(zip(roles, verdicts, strict=True)).items()
    ):
        counts.setdefault(role, {})[verdict] = count
    return {
        "rows": table.num_rows,
        "verdicts": counts,
        "cut": table.column("finish").to_pylist().count("length"),
        "forced_close": sum(table.column("forced_close").to_pylist()),
    }
