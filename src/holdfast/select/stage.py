"""Score every row of a pool and choose the few that are worth training on."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from holdfast.cliff.probe import Probe
from holdfast.cliff.probe_files import read_direction
from holdfast.data.chat.rendering import rendering_record
from holdfast.data.pool import OWN, Pool
from holdfast.judges.base import Judge
from holdfast.judges.calibration import identity_record
from holdfast.judges.choose import open_judge
from holdfast.judges.settings import JudgeSettings
from holdfast.models.decoding.row_state import Sampling
from holdfast.rollout.questions import resolve_sampling
from holdfast.rollout.session import Session
from holdfast.rollout.settings import RolloutSettings
from holdfast.select.checks import (
    budget_in_rows,
    check_direction,
    check_output,
    scores_root,
)
from holdfast.select.choice import Scores, Selection, choose_rows
from holdfast.select.scores import (
    DRAWN,
    PoolDrawer,
    PoolScorer,
    ScoreRules,
    with_drawn_thinking,
)
from holdfast.select.settings import SelectSettings
from holdfast.select.shards import ShardFolder, Share
from holdfast.study import atomic_file, atomic_write_json, file_sha256, fingerprint

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
    check_output(output, pool)
    n_rows = pool.survey.n_rows
    budget = budget_in_rows(settings, n_rows)
    check_direction(settings)
    scores = _score(settings, flags, session, pool, scores_root(settings, output))
    n_done, n_shards = len(scores.scored.done()), scores.scored.n_shards
    if settings.shard is not None:
        session.progress.say(f"{n_done} of {n_shards} shards are scored.")
        return {"shards": n_shards, "done": n_done, "chosen": None}
    selection = choose_rows(scores, pool, budget)
    written = _write(scores, selection, pool, output)
    record = _record(settings, session, pool, scores, selection) | written
    atomic_write_json(output.with_suffix(".selection.json"), record)
    return record


def _score(
    settings: SelectSettings,
    flags: JudgeSettings,
    session: Session,
    pool: Pool,
    root: Path,
) -> Scores:
    """Run the passes that the selector needs; finished shards are not run again."""
    adapter = session.adapter
    identity = adapter.identity
    found = None
    if settings.direction is not None:
        found = read_direction(settings.direction, identity)
    n_rows, sha256 = pool.survey
    base = {
        "pool": sha256,
        "columns": settings.columns(),
        "weights_sha256": identity.weights_sha256,
        "template_sha256": identity.template_sha256,
        "dtype": identity.dtype,
        "system_prompt": settings.system_prompt,
        "thinking": settings.thinking_of,
        "tokenizer_sha256": identity.tokenizer_sha256,
        "rendering": rendering_record(adapter.tokenizer),
        "format": adapter.thinking and asdict(adapter.thinking),
    }
    share = Share(*(settings.part() or (0, 1)))
    drawn = None
    if settings.needs_answer:
        drawn = _draw(settings, flags, session, (root, base, n_rows), pool, share)
    rules = ScoreRules(
        settings.plateau,
        settings.min_thinking,
        settings.by == "loss",
        settings.system_prompt,
    )
    by_model = settings.thinking_of == "model"
    key = base | {
        "rules": asdict(rules),
        "probe": found and found.sha256,
        "drawn": drawn.fingerprint if drawn and by_model else None,
    }
    scored = ShardFolder(root, "scores", key, n_rows, settings.shard_rows)
    probe: Probe | None = found and found.probe
    scorer = PoolScorer(adapter, probe, rules, session.batch_size)

    def work(index: int, rows: list[Any]) -> Any:
        if drawn is not None and by_model:
            rows = with_drawn_thinking(rows, drawn.read(index))
        return scorer(rows)

    scored.fill(pool, work, share, session.progress, "Scoring shards")
    return Scores(settings, scored, drawn)


def _draw(
    settings: SelectSettings,
    flags: JudgeSettings,
    session: Session,
    where: tuple[Path, dict[str, Any], int],
    pool: Pool,
    share: Share,
) -> ShardFolder:
    """Have the model answer every row, and a judge look at the answers."""
    root, base, n_rows = where
    judge: Judge = open_judge(flags)
    own = settings.thinking_of == "own"
    sampling: Sampling = resolve_sampling(
        session.adapter,
        RolloutSettings(
            temperature=settings.temperature,
            max_thinking=0 if own else settings.max_thinking,
            max_answer=settings.max_answer,
        ),
    )
    key = base | {
        "sampling": asdict(sampling),
        # Greedy answers are the same under every seed, and need not be drawn again.
        "seed": settings.seed if sampling.temperature > 0 else None,
        "judge": identity_record(judge.identity),
        "columns": DRAWN.names,
    }
    folder = ShardFolder(root, "drawn", key, n_rows, settings.shard_rows)
    drawer = PoolDrawer(
        session.adapter,
        sampling,
        judge,
        own,
        settings.system_prompt,
        settings.seed,
        session.batch_size,
    )
    folder.fill(
        pool,
        lambda index, rows: drawer(rows),
        share,
        session.progress,
        "Drawing answers, by shards",
    )
    return folder


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
            ranks = [rank.get(row) for row in rows]
            table = table.append_column("rank", [ranks])
            if scores.settings.thinking_of == "model":
                drawn = table.column("thinking").to_pylist()
                thoughts |= {
                    row: thought
                    for row, thought in zip(rows, drawn, strict=True)
                    if row in rank
                }
            # One schema for all shards: a shard may have no chosen row.
            table = table.cast(_schema(table))
            writer = writer or pq.ParquetWriter(handle, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
    with atomic_file(output) as handle:
        for line in _lines(pool, selection, rank, thoughts, scores.settings.by):
            handle.write(line)
    return {
        "output": str(output),
        "output_sha256": file_sha256(output),
        "table": str(table_path),
    }


def _schema(table: Any) -> Any:
    import pyarrow as pa

    place = table.schema.get_field_index("rank")
    return table.schema.set(place, pa.field("rank", pa.int64()))


def _lines(
    pool: Pool,
    selection: Selection,
    rank: dict[int, int],
    thoughts: dict[int, str],
    by: str,
) -> Iterable[bytes]:
    """Yield the chosen rows as they were, in the order of the pool."""
    for row in pool.rows(rank.__contains__):
        place = rank[row.row]
        own = {"row": row.row, "by": by, "rank": place}
        own |= {"score": selection.chosen[place].score}
        if row.row in thoughts:
            own["thinking"] = thoughts[row.row]
        text = json.dumps(dict(row.cells) | {OWN: own}, ensure_ascii=False, default=str)
        yield text.encode() + b"\n"


def _record(
    settings: SelectSettings,
    session: Session,
    pool: Pool,
    scores: Scores,
    selection: Selection,
) -> dict[str, Any]:
    counted = selection.counted
    last = selection.chosen[-1].score
    made = {
        "format": FORMAT,
        "model": session.model_record(),
        "pool": {"source": Path(settings.pool).name, **pool.survey._asdict()},
        "settings": asdict(settings),
        "scores": scores.scored.fingerprint,
        "drawn": scores.drawn and scores.drawn.fingerprint,
        "eligible": sum(counted.eligible.values()),
        "left_out": {
            why: {"rows": n, "first": counted.places[why]}
            for why, n in counted.left_out.most_common()
        },
        "forced_close": scores.forced(),
        "chosen": len(selection.chosen),
        "threshold": last,
        "tied_and_left_out": selection.n_tied,
        "near_copies_passed_over": selection.n_similar,
    }
    if settings.quota != "none":
        made["by_category"] = {
            name: sum(each.category == name for each in selection.chosen)
            for name in counted.eligible
        }
    return made | {"fingerprint": fingerprint(made)}
