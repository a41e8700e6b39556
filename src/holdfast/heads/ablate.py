"""Ablate heads beside every control, and count what the model does then."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import pyarrow as pa

from holdfast.cliff.held_out import Prompts, choose_prompts
from holdfast.cliff.probe_files import check_current, names, read_own_probe
from holdfast.data.chat.template import prompt_token_ids
from holdfast.data.requests import read_questions
from holdfast.data.suites import SuiteFile
from holdfast.engines.port import Around
from holdfast.errors import InputError
from holdfast.heads.ablation_effects import (
    JUDGE_STAGE,
    OUTPUT,
    STAGE,
    ablation_sentences,
    comes_back,
    judge_ablation,
    score_along_answers,
    second_round,
)
from holdfast.heads.bake import hold_conditions
from holdfast.heads.conditions import (
    ROLE,
    Condition,
    Item,
    answer,
    batch_key,
    by_condition,
    is_as_drawn,
    main_condition,
    plan,
)
from holdfast.heads.rank import ranking_of
from holdfast.heads.ranking import Head, parse_heads
from holdfast.heads.readings import select
from holdfast.heads.settings import AblateSettings
from holdfast.judges.rules.exact import exact_number
from holdfast.judges.settings import BY_RULES, JudgeSettings
from holdfast.models.decoding.generate import TAKEN
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.interventions import check_heads
from holdfast.models.model import Adapter
from holdfast.report.text import closed_by_force
from holdfast.rollout.answers import rollout_from_completion
from holdfast.rollout.engine import ENGINE, ask_of, engine_identity, prove_engine
from holdfast.rollout.prompts import row_seed, some_of
from holdfast.rollout.questions import Question, fit_context
from holdfast.rollout.rows import Rollout, from_table, to_table
from holdfast.rollout.sampling import announce, sampling_of, tell_pace
from holdfast.rollout.session import Session
from holdfast.study import Study
from holdfast.study.batches import ROW_ID, Batches, Meter
from holdfast.study.directory import Stage
from holdfast.study.figures import study_seed

ROLLOUTS = "rollouts.parquet"
HEADS = "heads.parquet"


class _Work(NamedTuple):
    adapter: Adapter
    prompts: Prompts
    conditions: tuple[Condition, ...]
    notes: tuple[str, ...]
    repair: dict[str, Any] | None
    utility: list[Rollout]
    # Conditions that the engine holds as adapters, by their keys, and its record.
    held: frozenset[str] = frozenset()
    engine: dict[str, Any] | None = None


def run(
    study: Study,
    settings: AblateSettings,
    session: Session,
    judge: JudgeSettings = BY_RULES,
) -> dict[str, Any]:
    """Answer held-out prompts under every condition; writes `ablation.parquet`.

    Another judge judges the same answers anew; none is drawn again.

    Args:
        study: A study with ranked heads.
        settings: Which heads, where, how many prompts.
        session: The model, and where progress is told.
        judge: The judge; the rules by default.

    Returns:
        The block `ablation` of the report.

    Raises:
        InputError: If the earlier stages are missing, or belong to another model.
        SettingsError: If a fraction selects no head, or a head does not exist.
        TooFewExamplesError: If no attack succeeds, so that nothing can be restored.
    """
    session.check_judge(judge)
    check_current(study)
    _answer(study, settings, session)
    return judge_ablation(study, session, judge)


def _answer(study: Study, settings: AblateSettings, session: Session) -> None:
    """Draw the answers under every condition, unless they are there."""
    asked = settings.utility and read_utility(
        settings.utility, settings.ablation_prompts
    )
    # The file is none of the study's, so its hash is a setting and no input.
    file = {"utility_sha256": asked.record["sha256"]} if asked else {}
    earlier = study.record(STAGE)
    if earlier.get("state") == "done" and "block" not in earlier:
        session.progress.say("The ablation is of an older version, and is drawn anew.")
        del study.manifest["stages"][STAGE]
    with study.stage(
        STAGE,
        asdict(settings) | file | engine_identity(session),
        [ROLLOUTS, HEADS, *names("published")],
        progress=session.progress,
        done="The ablation is there and up to date.",
        parts=[PARTS],
    ) as stage:
        if stage.is_done:
            return
        session.adapter.require("heads")
        rows = from_table(study.read_table(ROLLOUTS))
        prompts = choose_prompts(rows, settings.ablation_prompts)
        train = _followed(rows, settings)
        session.check_same(study)
        work = _prepare(study, settings, session, train, prompts)
        targets: dict[str, str] = {}
        if asked:
            sampling = sampling_of(study, work.adapter)
            answered, notes = draw_utility(stage, session, asked, sampling)
            work = work._replace(utility=answered, notes=(*work.notes, *notes))
            targets = {item.prompt.prompt_id: item.target or "" for item in asked.items}
        if session.engine_settings.engine != "hf":
            work = _held(study, settings, session, work)
        table = _draw(stage, settings, session, work, targets)
        study.manifest["stages"].pop(JUDGE_STAGE, None)
        stage.write_table(OUTPUT, table)
        block = _described(study, settings, session, work, table.to_pylist())
        if asked:
            known = {key: asked.record[key] for key in ("source", "sha256")}
            block["prompts"]["utility"] = known | {"rows": len(work.utility)}
        total = work.adapter.total_heads
        stage.facts |= {"block": block, "n_total": total}


def _followed(rows: Sequence[Rollout], settings: AblateSettings) -> tuple[Rollout, ...]:
    """Return the training answers on which the second round follows the repair."""
    if settings.factor != 0:
        return ()
    return select(rows, settings.ablation_prompts, "--ablation-prompts").ranking.rows


def _prepare(
    study: Study,
    settings: AblateSettings,
    session: Session,
    train: Sequence[Rollout],
    prompts: Prompts,
) -> _Work:
    """Choose the conditions; the second round looks at training answers alone."""
    adapter, seed = session.adapter, study_seed(study)
    ranking = ranking_of(study, adapter)
    chosen = parse_heads(settings.ablated_heads or "")
    check_heads(adapter, chosen)
    first = plan(ranking, adapter.n_heads, settings, seed, chosen=chosen)
    repair: dict[str, Any] | None = None
    second: tuple[Head, ...] = ()
    if settings.factor == 0:
        probe, _ = read_own_probe(study, "published")
        second, repair = second_round(
            adapter, list(train), probe, main_condition(first.conditions).heads, seed,
            session.batch_size,
        )  # fmt: skip
    whole = plan(ranking, adapter.n_heads, settings, seed, chosen=chosen, second=second)
    return _Work(adapter, prompts, whole.conditions, whole.notes, repair, [])


def _draw(
    stage: Stage,
    settings: AblateSettings,
    session: Session,
    work: _Work,
    targets: Mapping[str, str],
) -> pa.Table:
    prompts = work.prompts
    rows = [*prompts.harmful, *prompts.benign, *prompts.lookalikes, *work.utility]
    items = [
        Item(condition, row, targets.get(row.prompt_id) if row.role == ROLE else None)
        for condition in work.conditions
        for row in rows
    ]
    study, batch_size = stage.study, session.batch_size
    sampling = sampling_of(study, work.adapter)
    _tell(session, work, rows, sampling, len(items))
    how, held = settings.renormalise, work.held
    kinds = [batch_key(each, how, held) for each in work.conditions]
    place = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    longest = max(len(row.token_ids) for row in rows) + 1

    def key(item: Item) -> int:
        # What runs in one call lies together.
        first = len(place) - place[batch_key(item.condition, how, held)]
        return first * longest + len(item.row.token_ids)

    drawn_here, meter = _are_these(study, session, work, sampling), Meter()

    def cost(batch: list[Item], _: list[Item]) -> float:
        # What is taken over costs nothing.
        taken = [drawn_here and is_as_drawn(each.condition, sampling) for each in batch]
        sizes = [len(each.row.token_ids) for each in batch]
        drawn = zip(sizes, taken, strict=True)
        return float(sum(size for size, is_taken in drawn if not is_taken))

    return Batches(stage, TAKEN * batch_size, meter).run(
        items,
        lambda batch: answer(
            work.adapter,
            batch,
            sampling,
            settings,
            batch_size,
            drawn_here=drawn_here,
            told=meter.tick,
            engine=session.engine if held else None,
            held=held,
        ),
        name=lambda item: item.name,
        length=key,
        label="Switching heads off",
        paced=lambda pace: tell_pace(session, pace, _written(pace.table, items)),
        cost=cost,
    )


def _held(
    study: Study, settings: AblateSettings, session: Session, work: _Work
) -> _Work:
    rows = [row for part in zip(*work.prompts[:2], strict=False) for row in part]
    held = hold_conditions(study, session, settings, work.conditions, rows)
    notes = (*work.notes, *held.notes)
    return work._replace(notes=notes, held=held.keys, engine=held.record)


def _are_these(study: Study, session: Session, work: _Work, sampling: Sampling) -> bool:
    """Return whether the rollouts are what would be drawn here without an edit.

    Engines draw other tokens from the same seeds.
    """
    known = study.record("rollout")["settings"]
    # Where the engine holds no condition, the model itself draws them all.
    here = engine_identity(session) if work.held else {}
    same = known.get(ENGINE) == here.get(ENGINE)
    return "sampling" in known and (same or sampling.temperature == 0)


def _tell(
    session: Session,
    work: _Work,
    rows: Sequence[Rollout],
    sampling: Sampling,
    n_items: int,
) -> None:
    """Say what will be done, and what it can cost at most."""
    for note in work.notes:
        session.progress.say(note)
    sizes = sorted({len(each.heads) for each in work.conditions if each.heads})
    session.progress.say(
        f"{len(work.conditions)} conditions ({', '.join(map(str, sizes))} of "
        f"{work.adapter.total_heads} heads) on {len(rows)} prompts."
    )
    announce(
        session,
        rows=n_items,
        prompt=max(row.spans.prompt[1] for row in rows),
        sampling=sampling,
        drafted=True,
    )


def _written(table: pa.Table, items: Sequence[Item]) -> list[int]:
    """Return how many tokens were drawn for each row, thinking included if it was."""
    drawn_from = {
        item.name: item.row.spans.prompt[1]
        if item.condition.scope == "everywhere"
        else item.row.spans.answer[0]
        for item in items
    }
    return [
        len(row["token_ids"]) - drawn_from[row[ROW_ID]]
        for row in table.select([ROW_ID, "token_ids"]).to_pylist()
    ]


def _described(
    study: Study,
    settings: AblateSettings,
    session: Session,
    work: _Work,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return what the report says of the answers that no judge has to say."""
    block: dict[str, Any] = {
        "prompts": {
            "harmful": len(work.prompts.harmful),
            "benign": len(work.prompts.benign),
            "lookalikes": len(work.prompts.lookalikes),
            "wrappers": [name or "none" for name in work.prompts.wrappers],
        },
        "factor": settings.factor,
        "renormalise": settings.renormalise,
        "notes": list(work.notes),
    }
    if work.engine is not None:
        block["engine"] = work.engine
    forced = sum(row["forced_close"] for row in rows)
    if forced:
        block["notes"].append(closed_by_force(forced, len(rows)))
    if work.repair is not None and "everywhere" in settings.scopes:
        seed = study_seed(study)
        block["self_repair"] = _self_repair(study, session, work, rows, seed)
    return block


def _self_repair(
    study: Study,
    session: Session,
    work: _Work,
    rows: list[dict[str, Any]],
    seed: int,
) -> dict[str, Any]:
    """Follow the score along the answers of harmful prompts, without and with edit."""
    probe, _ = read_own_probe(study, "published")
    top = main_condition(work.conditions)
    groups = by_condition(
        [row for row in rows if row["label"] == "harmful" and row["closed"]],
        lambda row: (row["scope"], row["condition"], row["n_heads"]),
    )
    plain = groups.get((top.scope, "none", 0), [])
    edited = groups.get((top.scope, "top", len(top.heads)), [])
    both = {row["asked"] for row in plain} & {row["asked"] for row in edited}
    pairs = [[row for row in side if row["asked"] in both] for side in (plain, edited)]
    scores = [
        score_along_answers(work.adapter, side, probe, heads, session.batch_size)
        for side, heads in zip(pairs, ((), top.heads), strict=True)
    ]
    clusters = [row["request_id"] for row in pairs[0]]
    block = {"n_heads": len(top.heads)} | (work.repair or {})
    block |= comes_back(scores[0], scores[1], clusters, seed)
    return block | {"evidence": ablation_sentences(block)}


PARTS = "ablate_utility"
"""Folder of the batches of the answers without an edit."""


def read_utility(source: str, limit: int) -> SuiteFile:
    """Read questions, at most so many, the first by content hash."""
    file = read_questions(source)
    wrong = [item for item in file.items if exact_number(item.target or "") is None]
    if wrong:
        raise InputError(
            f"a number in every answer of `{source}`",
            f"{len(wrong)} without one, such as {(wrong[0].target or '')[:40]!r}",
            "Utility is judged by the number that an answer ends on.",
        )
    items = sorted(file.items, key=lambda item: item.prompt.prompt_id)[:limit]
    return SuiteFile(tuple(items), file.record)


def draw_utility(
    stage: Stage, session: Session, asked: SuiteFile, sampling: Sampling
) -> tuple[list[Rollout], list[str]]:
    """Draw the answers without an edit, as the rollouts were drawn.

    Questions that do not fit in the model's context are left out and named, and so
    are those whose thinking does not end, as prompts are, since in two of the scopes
    it is kept.
    """
    adapter, seed = session.adapter, study_seed(stage.study)
    system_prompt = stage.study.manifest["settings"]["rollout"]["system_prompt"]
    questions = [
        Question(
            ROLE,
            item.prompt,
            0,
            row_seed(seed, item.prompt.prompt_id, 0),
            prompt_token_ids(
                adapter.tokenizer,
                item.prompt.text,
                system_prompt=system_prompt,
                thinking=adapter.thinking,
            ),
        )
        for item in asked.items
    ]
    fitting = fit_context(adapter, questions, sampling)
    for note in fitting.notes:
        session.progress.warn(note)

    meter, lost = Meter(), {}
    proved = session.engine_settings.engine == "hf"

    def work(batch: list[Question]) -> pa.Table:
        nonlocal proved
        if not proved:
            # Not before: a server may be gone that has answered everything.
            prove_engine(session, sampling, fitting.questions, system_prompt)
            proved = True

        def failed(place: int, why: str) -> None:
            lost[batch[place].row_id] = why

        asks = [ask_of(question, system_prompt) for question in batch]
        around = Around(session.batch_size, told=meter.tick, failed=failed)
        parts = session.engine.draw(asks, sampling, around)
        return to_table(
            rollout_from_completion(batch[each.index], each, system_prompt)
            for part in parts
            for each in part
        )

    table = Batches(stage, session.batch_size, meter, PARTS).run(
        fitting.questions,
        work,
        name=lambda question: question.row_id,
        length=lambda question: question.n_tokens,
        label="Answering questions",
    )
    answered = [row for row in from_table(table) if row.closed]
    if not lost:
        return answered, fitting.notes
    shown = some_of([f"{name} ({why})" for name, why in lost.items()])
    note = f"{len(lost)} questions were answered by nobody and are left out: {shown}."
    session.progress.warn(note)
    return answered, [*fitting.notes, note]
