"""Ask suites under attacks, keep every answer, and have a judge read each.

Two phases. `generate` needs the model and no judge; `judge` needs the judge and no
model. Each is resumed where it was interrupted, and another judge redoes the second
alone.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa

from holdfast.errors import EnvironmentProblem, HoldfastError, SettingsError
from holdfast.evaluate.items import AskedItems, gather_items
from holdfast.evaluate.rows import (
    GENERATED,
    NOTES,
    evaluation_figures,
    generated,
    joined,
    table,
)
from holdfast.evaluate.settings import EvaluateSettings
from holdfast.judges.base import Judge
from holdfast.judges.calibration import brief, find_calibration, identity_record
from holdfast.judges.cascade import cascade_record
from holdfast.judges.choose import open_judge
from holdfast.judges.rows import judge_rows
from holdfast.judges.settings import JudgeSettings
from holdfast.models.interventions import HeadEdit, scale_heads
from holdfast.models.model import Adapter
from holdfast.report.progress import Progress
from holdfast.rollout.edits import baked, read_edit
from holdfast.rollout.engine import (
    UNANSWERED,
    engine_identity,
    engine_notes,
    reopen_unanswered,
)
from holdfast.rollout.questions import (
    Answered,
    answer_notes,
    first_words,
    fit_context,
    outgrown,
    questions_of,
    template_notes,
)
from holdfast.rollout.sampling import Drawing, draw_answers, sampling_for
from holdfast.rollout.session import Session
from holdfast.study import Study, file_sha256, fingerprint
from holdfast.study.batches import ROW_ID

GENERATE, JUDGE, HARNESS = "generate", "judge", "lm_eval"
GENERATIONS = "generations.parquet"
EVALUATION = "evaluation.parquet"
SUMMARY = "evaluation.json"
TASKS = "lm_eval.json"
Row = Mapping[str, Any]


def run(
    study: Study, settings: EvaluateSettings, flags: JudgeSettings, session: Session
) -> dict[str, Any]:
    """Draw an answer to every prompt, and judge it; writes `evaluation.parquet`.

    Args:
        study: Where everything goes.
        settings: Suites, attacks, sampling, edit.
        flags: The judge.
        session: The model, and where progress is told.

    Returns:
        The block `evaluation` of the report.

    Raises:
        HoldfastError: If suites, model, judge or disk will not do. What was drawn or
            judged until then is kept.
    """
    if settings.lm_eval:
        require_harness()
    session.check_judge(flags)
    asked = gather_items(settings)
    draw(study, settings, session, asked)
    if settings.lm_eval:
        _harness(study, settings, session)
    return judge(study, flags, session.progress, session.open_judge(flags))


def draw(
    study: Study, settings: EvaluateSettings, session: Session, asked: AskedItems
) -> None:
    """Run the first phase; writes `generations.parquet`."""
    drawing = settings.drawing()
    session.claim(study)
    edit = settings.edit
    edited = None if edit is None else read_edit(edit, session.adapter)
    questions = {
        question.row_id: (item, question)
        for item in asked.items
        for question in questions_of(
            session.speaker, item.name.rpartition("/")[0], item.prompt, drawing
        )
    }
    sampling = sampling_for(session, drawing)
    every = [question for _, question in questions.values()]
    to_ask, unfit = fit_context(session.speaker, every, sampling)
    notes = [*template_notes(session.speaker), *unfit]
    for note in notes:
        session.progress.warn(note)
    key = {
        "model": study.manifest["model"],
        "sampling": asdict(sampling),
        "samples": settings.samples,
        "seed": settings.seed,
        "system_prompt": settings.system_prompt,
        "edits": {
            "applied": edited and edited.record,
            "baked": baked(session.name),
        },
    } | engine_identity(session)
    reopen_unanswered(study, GENERATE, GENERATIONS)
    with study.stage(
        GENERATE,
        key,
        {"prompts": asked.sha256},
        progress=session.progress,
        done=f"{GENERATIONS} is there and up to date.",
    ) as stage:
        if stage.is_done:
            return
        for source in asked.sources:
            session.progress.say(f"{source['suite']}: {source['asked']} requests")
            for note in source["notes"]:
                session.progress.say(f"  {note}")

        first: dict[str, str] = {}

        def rows(made: Answered) -> pa.Table:
            for asked, each in made:
                words = first_words(
                    session.speaker, each.token_ids, each.spans, each.closed
                )
                first[asked.row_id] = words
            found = [
                generated(
                    questions[asked.row_id][0], asked, each, settings.system_prompt
                )
                for asked, each in made
            ]
            return table(found, GENERATED)

        how = Drawing(sampling, rows, edited and edited.edit, settings.system_prompt)
        made = draw_answers(stage, session, how, to_ask)
        # Of answers that an interrupted run has drawn, the text is left.
        openings = [
            first.get(row["row_id"], row["answer"])
            for row in made.select(["row_id", "answer"]).to_pylist()
        ]
        there = [*made.column(ROW_ID).to_pylist(), *stage.facts.get(UNANSWERED, {})]
        said = outgrown(to_ask, there)
        said += answer_notes(session.speaker, openings)
        for note in said:
            session.progress.warn(note)
        stage.write_table(GENERATIONS, made)
        notes += [*said, *engine_notes(stage)]
        stage.facts |= {"sources": list(asked.sources), "notes": notes}


def judge(
    study: Study, flags: JudgeSettings, progress: Progress, opened: Judge | None = None
) -> dict[str, Any]:
    """Run the second phase on what is there; no model is needed.

    `opened`: A judge that is open already; by default what the flags name.
    """
    inputs = {GENERATIONS: study.input_hash(GENERATIONS)}
    tasks = study.record(HARNESS).get("outputs", [])
    inputs |= {name: study.input_hash(name) for name in tasks}
    opened = opened or open_judge(flags)
    identity = opened.identity
    known = find_calibration(identity, [flags.calibrations])
    calibration = None if known is None else brief(known)
    key = {
        "judge": identity_record(identity),
        "calibration": calibration,
        "thinking": flags.judge_thinking,
    }
    state, _ = study.begin(JUDGE, key, inputs)
    if state == "done":
        progress.say(f"{EVALUATION} is there and up to date.")
        return dict(study.read_json(SUMMARY))
    rows = study.read_table(GENERATIONS)
    verdicts = judge_rows(
        study,
        JUDGE,
        rows.to_pylist(),
        opened,
        progress,
        with_thinking=flags.judge_thinking,
    )
    whole = joined(rows, verdicts)
    study.write_table(EVALUATION, whole)
    record = study.record(GENERATE)
    seed = record["settings"]["seed"]
    generation = dict(record["settings"])
    model = generation.pop("model")
    hashes = {name: model[name] for name in ("template_sha256", "weights_sha256")}
    block = {
        **key,
        "generation": generation | hashes,
        "sources": record["sources"],
        **evaluation_figures(whole.to_pylist(), identity, seed),
        **_cascade(opened, rows, verdicts),
        "lm_eval": study.read_json(TASKS) if tasks else {},
        "notes": [
            *record.get("notes", ()),
            *judge_notes(identity.measures, calibration),
        ],
    }
    study.write_json(SUMMARY, block)
    study.finish(JUDGE, [EVALUATION, SUMMARY])
    return block


def _cascade(judge: Judge, rows: pa.Table, verdicts: pa.Table) -> dict[str, Any]:
    found = cascade_record(judge, rows.to_pylist(), verdicts.to_pylist())
    return {} if found is None else {"cascade": found}


def _harness(study: Study, settings: EvaluateSettings, session: Session) -> None:
    """Run the tasks of lm-eval, on the model as it is edited."""
    key = {
        "model": study.manifest["model"],
        "tasks": sorted(settings.lm_eval),
        "limit": settings.limit,
        "edit": study.record(GENERATE)["settings"]["edits"]["applied"],
    }
    # A task may be a file of one's own, and then its text is part of what is asked.
    files = [Path(task) for task in key["tasks"] if Path(task).is_file()]
    inputs = {str(path): file_sha256(path) for path in files}
    with study.stage(
        HARNESS,
        key,
        inputs,
        progress=session.progress,
        done=f"{TASKS} is there and up to date.",
    ) as stage:
        if stage.is_done:
            return
        edit = settings.edit and read_edit(settings.edit, session.adapter).edit
        found = run_harness(
            session.adapter,
            sorted(settings.lm_eval),
            edit=edit or None,
            limit=settings.limit,
            batch_size=session.batch_size,
        )
        stage.write_json(TASKS, found)
        stage.facts["digest"] = fingerprint(found)


PACKAGE = "lm_eval"


def require_harness() -> None:
    """Refuse to go on without lm-eval."""
    if find_spec(PACKAGE) is None:
        raise EnvironmentProblem(
            "the package lm-eval, for --lm-eval",
            "no such package here",
            "Install it with `pip install lm-eval`, or measure utility with "
            "`--suite gsm8k`, which needs none.",
        )


def run_harness(
    adapter: Adapter,
    tasks: Sequence[str],
    *,
    edit: HeadEdit | None = None,
    limit: int | None = None,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Run tasks of lm-eval on a model in memory, edited or not.

    `tasks`: Names of tasks, as lm-eval knows them, or YAML files of tasks.
    Returns: Version, and for each task its version and its numbers as lm-eval gives
    them, with their standard errors.
    """
    require_harness()
    harness = importlib.import_module(PACKAGE)
    wrapper = importlib.import_module(f"{PACKAGE}.models.huggingface")
    try:
        # What it says on its way must not mix with results on stdout.
        with scale_heads(adapter, edit), redirect_stdout(sys.stderr):
            model = wrapper.HFLM(
                pretrained=adapter.model,
                tokenizer=adapter.tokenizer,
                batch_size=batch_size,
            )
            found = harness.simple_evaluate(
                model=model, tasks=list(tasks), limit=limit, log_samples=False
            )
    except HoldfastError:
        raise
    except Exception as error:
        # Its tasks fail in as many ways as there are tasks, most of them offline.
        raise SettingsError(
            f"tasks of lm-eval that run here: {', '.join(tasks)}",
            f"{type(error).__name__}: {error}",
            "See `lm-eval --tasks list`; most tasks need the Hub, or its cache.",
        ) from error
    return {
        "version": version("lm-eval"),
        "tasks": {
            task: {
                "version": found.get("versions", {}).get(task),
                **{
                    key: value
                    for key, value in numbers.items()
                    if isinstance(value, int | float) and not isinstance(value, bool)
                },
            }
            for task, numbers in found["results"].items()
        },
    }


def judge_notes(measures: str, calibration: dict[str, Any] | None) -> list[str]:
    """Return what a reader has to know of a judge."""
    notes = [NOTES[measures]]
    if calibration is None:
        notes.append(
            "This judge was never compared with people here: run `holdfast judge "
            "calibrate` before its rates are believed."
        )
    return notes
