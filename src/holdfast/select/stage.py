"""Score every row of a pool and choose the few that are worth training on."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from holdfast.cliff.probe_files import read_direction
from holdfast.data.pool import OWN, Pool
from holdfast.engines.port import Engine
from holdfast.engines.reading.cluster import require_ray
from holdfast.errors import SettingsError
from holdfast.judges.calibration import identity_record
from holdfast.judges.choose import open_judge
from holdfast.judges.settings import JudgeSettings
from holdfast.rollout.engine import engine_identity, prove_engine
from holdfast.rollout.questions import resolve_sampling
from holdfast.rollout.session import Session
from holdfast.rollout.settings import RolloutSettings
from holdfast.select.choice import Scores, Selection, choose_rows
from holdfast.select.scores import DrawnRow, PoolDrawer, model_key
from holdfast.select.settings import NEEDS_PROBE, SelectSettings
from holdfast.select.shards import ShardFolder
from holdfast.select.workers import Scoring, by_server, by_workers, readers, rules_of
from holdfast.study import (
    atomic_file,
    atomic_write_json,
    file_sha256,
    fingerprint,
    require_place,
)
from holdfast.study.rows import table_schema

FORMAT = "holdfast-selection/1"


def run(
    settings: SelectSettings, flags: JudgeSettings, session: Session, output: Path
) -> dict[str, Any]:
    """Score a pool, choose its best rows, and write them with every row's score.

    Writes `output` (the chosen rows as they were, with a field `holdfast`), beside it
    `.selection.parquet` (every row) and `.selection.json` (what was done).

    Args:
        settings: Pool, selector, budget.
        flags: The judge, for selectors that ask one.
        session: The model, and where progress is told.
        output: A JSONL file for the chosen rows.

    Returns:
        The selection record; with `--shard` alone, how many shards are done.

    Raises:
        SettingsError: If the budget is larger than the pool, a probe is missing, or
            the output has another ending or is the pool.
        InputError: If pool or probe cannot be read, or the probe is of another model.
        TooFewExamplesError: If too few rows may be chosen; their scores are kept.
    """
    pool = Pool(settings.pool, settings.columns())
    _check(settings, output, pool)
    budget = settings.rows_of(pool.survey.n_rows)
    model = session.model_record()
    scores = _score(settings, flags, session, pool, output)
    n_done, n_shards = len(scores.scored.done()), scores.scored.n_shards
    if settings.shard is not None:
        session.progress.say(f"{n_done} of {n_shards} shards are scored.")
        return {"shards": n_shards, "done": n_done, "chosen": None}
    selection = choose_rows(scores, pool, budget)
    written = _write(scores, selection, pool, output)
    record = _record(settings, model, pool, scores, selection) | written
    atomic_write_json(output.with_suffix(".selection.json"), record)
    return record


def _check(settings: SelectSettings, output: Path, pool: Pool) -> None:
    """Refuse, before anything is scored, what cannot be chosen or written."""
    if output.suffix.lower() != ".jsonl":
        # The record and the table are named after it, and `finetune` reads it.
        raise SettingsError(
            "-o with the name of a .jsonl file",
            f"`{output.name}`",
            f"Write -o {output.stem}.jsonl.",
        )
    if settings.workers:
        require_ray(settings.ray)
    require_place(output, folder=False)
    if output.resolve() in [path.resolve() for path in pool.files]:
        raise SettingsError(
            "-o beside the pool", "a file of the pool itself", "Choose another name."
        )
    n_rows = pool.survey.n_rows
    if settings.rows_of(n_rows) > n_rows:
        raise SettingsError(
            f"a --budget of at most {n_rows} rows, which is the whole pool",
            settings.budget,
            "Choose fewer.",
        )
    if settings.by in NEEDS_PROBE and settings.direction is None:
        raise SettingsError(
            f"a probe to select by {settings.by}",
            "no --direction",
            "Name a study of this model that has one: `holdfast audit MODEL -o STUDY`, "
            "then --direction STUDY.",
        )


def _score(
    settings: SelectSettings,
    flags: JudgeSettings,
    session: Session,
    pool: Pool,
    output: Path,
) -> Scores:
    """Run the passes that the selector needs; finished shards are not run again.

    No model is held here: it goes once workers read in its place.
    """
    direction = None
    if settings.direction is not None:
        direction = read_direction(settings.direction, session.adapter.identity)
    n_rows, sha256 = pool.survey
    base = {
        "pool": sha256,
        "columns": settings.columns(),
        "system_prompt": settings.system_prompt,
        "thinking": settings.thinking_of,
        **model_key(session.adapter),
    }
    root = output.with_suffix(".scores")
    if settings.scores is not None:
        root = Path(settings.scores).expanduser()

    def folder(name: str, key: dict[str, Any]) -> ShardFolder:
        # Others may work in it, from elsewhere.
        place = root.absolute()
        return ShardFolder(place, name, base | key, n_rows, settings.shard_rows)

    drawn = _drawn(settings, flags, session, pool, folder)
    thinking = drawn if settings.thinking_of == "model" else None
    key = {
        "rules": asdict(rules_of(settings)),
        "probe": direction and direction.sha256,
        "drawn": thinking and thinking.fingerprint,
    }
    if settings.states is not None:
        # Other arithmetic, so other last digits.
        key["states"] = "vllm"
    scored = folder("scores", key)
    scoring = Scoring(settings, scored, direction and direction.probe, thinking)
    if settings.workers:
        passing = by_workers(scoring, session, pool)
    elif settings.states is not None:
        passing = by_server(scoring, session, pool)
    else:
        work = scoring.work(session.adapter, session.batch_size)
        passing = partial(scored.walk, pool, work)
    scored.fill(passing, settings.part(), session.progress, "Scoring shards")
    return Scores(settings, scored, drawn)


def _drawn(
    settings: SelectSettings,
    flags: JudgeSettings,
    session: Session,
    pool: Pool,
    folder: Callable[[str, dict[str, Any]], ShardFolder],
) -> ShardFolder | None:
    """Have every row answered, by shards, where the selector needs answers."""
    if not settings.needs_answer:
        if session.engine_settings.engine != "hf":
            raise SettingsError(
                "--engine where answers are drawn",
                "a selection that draws none",
                "Leave --engine out; rows are read by the model itself.",
            )
        return None
    drawer, key = _drawer(settings, flags, session)
    drawn = folder("drawn", key)
    passing = partial(drawn.walk, pool, lambda _, rows: drawer(rows))
    label = "Drawing answers, by shards"
    drawn.fill(passing, settings.part(), session.progress, label)
    return drawn


def _drawer(
    settings: SelectSettings, flags: JudgeSettings, session: Session
) -> tuple[PoolDrawer, dict[str, Any]]:
    """Return what answers rows and has them judged, and what its answers depend on."""
    judge = open_judge(flags)
    own = settings.thinking_of == "own"
    sampling = resolve_sampling(
        session.adapter,
        RolloutSettings(
            temperature=settings.temperature,
            max_thinking=0 if own else settings.max_thinking,
            max_answer=settings.max_answer,
        ),
    )
    key = {
        "sampling": asdict(sampling),
        # Greedy answers are the same under every seed, and need not be drawn again.
        "seed": settings.seed if sampling.temperature > 0 else None,
        "judge": identity_record(judge.identity),
        "columns": table_schema(DrawnRow).names,
    } | engine_identity(session)

    @cache
    def engine() -> Engine:
        if session.engine_settings.engine != "hf":
            prove_engine(session, sampling, (), settings.system_prompt)
        return session.engine

    drawer = PoolDrawer(
        session.adapter,
        sampling,
        judge,
        own,
        settings.system_prompt,
        settings.seed,
        session.batch_size,
        engine,
    )
    return drawer, key


def _write(
    scores: Scores, selection: Selection, pool: Pool, output: Path
) -> dict[str, Any]:
    """Write the chosen rows and, shard by shard, the scores of all."""
    rank = {each.row: place for place, each in enumerate(selection.chosen)}
    thoughts: dict[int, str] = {}
    table_path = output.with_suffix(".selection.parquet")
    with atomic_file(table_path) as handle:
        writer = None
        for table in scores.tables():
            rows = table.column("row").to_pylist()
            # Typed, since a shard may have no chosen row.
            ranks = pa.array([rank.get(row) for row in rows], pa.int64())
            table = table.append_column("rank", ranks)
            if scores.settings.thinking_of == "model":
                drawn = zip(rows, table.column("thinking").to_pylist(), strict=True)
                thoughts |= {row: thought for row, thought in drawn if row in rank}
            writer = writer or pq.ParquetWriter(handle, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
    with atomic_file(output) as handle:
        # The chosen rows as they were, in the order of the pool.
        for row in pool.rows(rank.__contains__):
            place = rank[row.row]
            own: dict[str, Any] = {"row": row.row, "by": scores.settings.by}
            own |= {"rank": place, "score": selection.chosen[place].score}
            if row.row in thoughts:
                own["thinking"] = thoughts[row.row]
            cells = dict(row.cells) | {OWN: own}
            text = json.dumps(cells, ensure_ascii=False, default=str)
            handle.write(text.encode() + b"\n")
    return {
        "output": str(output),
        "output_sha256": file_sha256(output),
        "table": str(table_path),
    }


def _record(
    settings: SelectSettings,
    model: dict[str, Any],
    pool: Pool,
    scores: Scores,
    selection: Selection,
) -> dict[str, Any]:
    counted = selection.counted
    record = {
        "format": FORMAT,
        "model": model,
        "pool": {"source": Path(settings.pool).name, **pool.survey._asdict()},
        "settings": asdict(settings),
        "scores": scores.scored.fingerprint,
        "drawn": scores.drawn and scores.drawn.fingerprint,
        "readers": readers(scores.scored),
        "eligible": sum(counted.eligible.values()),
        "left_out": {
            why: {"rows": n, "first": counted.places[why]}
            for why, n in counted.left_out.most_common()
        },
        "forced_close": scores.forced(),
        "chosen": len(selection.chosen),
        "threshold": selection.chosen[-1].score,
        "tied_and_left_out": selection.n_tied,
        "near_copies_passed_over": selection.n_similar,
    }
    if settings.quota != "none":
        record["by_category"] = {
            name: sum(each.category == name for each in selection.chosen)
            for name in counted.eligible
        }
    return record | {"fingerprint": fingerprint(record)}
