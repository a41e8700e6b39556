"""Thinking or state: the four cells of every edit, drawn, judged and counted."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch

from holdfast.cliff.commitment.causes.cells import (
    HEADS,
    Kind,
    Lost,
    asked_of,
    condition_of,
    items_of,
    kinds_of,
    require_kinds,
)
from holdfast.cliff.commitment.causes.directions import (
    PROBE_FILES,
)
from holdfast.cliff.commitment.causes.edited import (
    Item,
    Said,
    draw_items,
    edited_sampling,
    judge_items,
    n_draws,
)
from holdfast.cliff.commitment.causes.swap import CELLS, effects, rates
from holdfast.cliff.commitment.draws import prove
from holdfast.cliff.commitment.opened import ROLLOUTS, Opened
from holdfast.cliff.commitment.settings import file_of, stage_of
from holdfast.cliff.held_out import Prompts, choose_prompts
from holdfast.judges.calibration import identity_record
from holdfast.models.decoding.edits import Edit
from holdfast.models.decoding.generate import TAKEN, generate
from holdfast.rollout.engine import engine_identity
from holdfast.rollout.rows import UNJUDGED, Rollout, counted, from_table
from holdfast.rollout.sampling import sampling_of
from holdfast.study.batches import ROW_ID, Batches, Meter
from holdfast.study.figures import draws_of, figure_of
from holdfast.study.files import fingerprint
from holdfast.study.rows import Int32, table_of

KEY = "swap"
THINKING, ANSWERS = "swap_thinking", "swap_answers"
MEASURES = {"harmful": "attack_success", "benign": "over_refusal"}
NOT_JUDGED = "a cell that was not judged"


@dataclass(frozen=True)
class ThinkingRow:
    """A thinking that was drawn under an edit, with what stands around it."""

    row_id: str
    closed: bool
    thinking: str
    token_ids: tuple[Int32, ...]  # Up to the answer.
    template_start: Int32


def run(opened: Opened) -> dict[str, Any]:
    """Answer held-out prompts in four cells per edit; writes `decide_swap.json`."""
    rows = from_table(opened.study.read_table(ROLLOUTS))
    prompts = choose_prompts(rows, opened.settings.swap_prompts)
    opened.session.check_same(opened.study)
    kinds, left_out = kinds_of(opened, rows)
    inputs = [ROLLOUTS, *(_files(opened, kinds))]
    thinking = _thinking(opened, prompts, kinds, inputs)
    items, lost = items_of(opened, rows, prompts, kinds, thinking)
    answers = _answers(opened, kinds, items, rows, inputs)
    judge = opened.session.open_judge(opened.judge)
    key = {
        "judge": identity_record(judge.identity),
        "answers": opened.study.record(stage_of(ANSWERS))["fingerprint"],
        "left_out": left_out,
    }
    with opened.stage(KEY, key) as stage:
        if stage.is_done:
            return stage.read_json(file_of(KEY))
        said = judge_items(opened, KEY, answers)
        block = {
            "draws": n_draws(opened, edited_sampling(opened)),
            "judge": key["judge"],
            "left_out": left_out,
            "kinds": [_block(opened, kind, said, lost) for kind in kinds],
        }
        return stage.write_json(file_of(KEY), block)


def require(opened: Opened) -> None:
    """Refuse a study in which no edit that was asked for can be made.

    Raises:
        HoldfastError: If it is one.
    """
    choose_prompts(opened.every, opened.settings.swap_prompts)
    require_kinds(opened, opened.every)


def _files(opened: Opened, kinds: Sequence[Kind]) -> list[str]:
    names = {kind.name for kind in kinds}
    heads = [HEADS] if "heads" in names and opened.settings.edit is None else []
    probe = "direction" in names and opened.settings.direction == "probe"
    return [*heads, *(PROBE_FILES if probe else ())]


def _abouts(kinds: Sequence[Kind]) -> dict[str, Any]:
    return {kind.name: kind.about for kind in kinds}


def _thinking(
    opened: Opened, prompts: Prompts, kinds: Sequence[Kind], inputs: list[str]
) -> dict[str, dict[str, Any]]:
    """Draw the thinking of every prompt under each edit; by condition and row."""
    asked = asked_of(prompts)
    edited = [kind for kind in kinds if kind.thinking is not None]
    settings = {"edits": _abouts(edited), "asked": _digest(asked)}
    output = f"decide_{THINKING}.parquet"
    with opened.stage(THINKING, settings, inputs) as stage:
        if not stage.is_done:
            items = [(kind, row) for kind in edited for row in asked]
            stage.write_table(output, _draw_thinking(opened, stage, items))
        table = opened.study.read_table(output)
    return {each[ROW_ID]: each for each in table.to_pylist()}


def _digest(rows: Sequence[Rollout]) -> str:
    return fingerprint([row.row_id for row in rows])


def _draw_thinking(
    opened: Opened, stage: Any, items: Sequence[tuple[Kind, Rollout]]
) -> pa.Table:
    adapter, meter = opened.session.adapter, Meter()
    # The answer behind it is not looked at.
    sampling = replace(sampling_of(opened.study, adapter), max_answer=1)

    def work(batch: list[tuple[Kind, Rollout]]) -> pa.Table:
        made: list[ThinkingRow] = []
        for kind in {kind.name: kind for kind, _ in batch}.values():
            rows = [row for each, row in batch if each.name == kind.name]
            starts = [row.spans.prompt[1] for row in rows]
            parts = generate(
                adapter,
                [
                    (row.token_ids[:start], row.seed)
                    for row, start in zip(rows, starts, strict=True)
                ],
                sampling,
                batch_size=opened.session.batch_size,
                edit=kind.thinking,
                drafts=[row.token_ids[row.spans.prompt[1] :] for row in rows],
                told=meter.tick,
            )
            found = {each.index: each for part in parts for each in part}
            made += [
                ThinkingRow(
                    row_id=f"{kind.name}#{row.row_id}",
                    closed=found[place].closed and not found[place].forced_close,
                    thinking=found[place].thinking,
                    token_ids=found[place].token_ids[: found[place].spans.answer[0]],
                    template_start=found[place].spans.end_template[0],
                )
                for place, row in enumerate(rows)
            ]
        return table_of(made, ThinkingRow)

    if not items:
        return table_of([], ThinkingRow)
    return Batches(stage, TAKEN * opened.session.batch_size, meter).run(
        items,
        work,
        name=lambda item: f"{item[0].name}#{item[1].row_id}",
        length=lambda item: len(item[1].token_ids),
        label="Thinking under edits",
    )


def _answers(
    opened: Opened,
    kinds: Sequence[Kind],
    items: Sequence[Item],
    rows: Sequence[Rollout],
    inputs: list[str],
) -> pa.Table:
    by_name = {kind.name: kind for kind in kinds}
    edited = {condition_of(kind, n) for kind in by_name for n in (1, 3)}

    def plan(condition: str, chosen: Sequence[Item]) -> Edit | None:
        edit = by_name[condition.split("/")[0]].edit  # type: ignore[index]
        if edit is None or condition not in edited:
            return None
        return edit([item.template for item in chosen])

    settings = {
        "edits": _abouts(kinds),
        "items": fingerprint([[item.name, list(item.token_ids)] for item in items]),
        "tokens": opened.settings.edited_tokens,
    }
    if "wrapper" in by_name:
        settings |= engine_identity(opened.session)
    output = f"decide_{ANSWERS}.parquet"
    with opened.stage(ANSWERS, settings, inputs) as stage:
        if not stage.is_done:
            requests = {r.request_id: r.prompt for r in rows if r.wrapper is None}
            engine = None
            if "wrapper" in by_name:
                engine = prove(opened)
            if engine is not None:
                stage.facts["engine"] = engine
            table = draw_items(
                opened, stage, items, plan, requests, label="Thinking or state",
                # Engines hold no edit, and all four cells are drawn by one.
                by_engine=lambda name: engine is not None
                and name.startswith("wrapper/"),
            )  # fmt: skip
            stage.write_table(output, table)
        return opened.study.read_table(output)


def _block(
    opened: Opened, kind: Kind, said: Sequence[Said], lost: Lost
) -> dict[str, Any]:
    """Return what the report says of one kind of edit."""
    block: dict[str, Any] = {"kind": kind.name, "about": kind.about}
    own = [each for each in said if each.row["condition"].startswith(f"{kind.name}/")]
    for label, measure in MEASURES.items():
        group = [each for each in own if each.row["label"] == label]
        counter = lost.get((kind.name, label), Counter())
        block[label] = _measured(opened.seed, kind.name, label, measure, group, counter)
    return block


def _measured(
    seed: int,
    kind: str,
    label: str,
    measure: str,
    group: Sequence[Said],
    counter: Counter[str],
) -> dict[str, Any]:
    by_unit: dict[tuple[str, int], dict[str, Said]] = {}
    for each in group:
        unit_of = (each.row["asked"], each.row["draw"])
        by_unit.setdefault(unit_of, {})[each.row["condition"]] = each
    names = [condition_of(kind, place) for place in range(len(CELLS))]
    whole = [[cells[name] for name in names] for cells in by_unit.values()]
    judged = [
        unit_of
        for unit_of in whole
        if all(each.judged.outcome not in (None, UNJUDGED) for each in unit_of)
    ]
    # Prompts, as the other reasons count; one is lost with the last of its draws.
    asked, kept = ({unit_of[0].row["asked"] for unit_of in p} for p in (whole, judged))
    losses = counter + Counter({NOT_JUDGED: len(asked - kept)})
    clusters = [unit_of[0].judged.request_id for unit_of in judged]
    draws = draws_of(seed, f"swap/{kind}/{label}")

    def column(measure: str) -> torch.Tensor:
        columns = [counted([each.judged for each in one], measure) for one in judged]
        return torch.stack(columns) if columns else torch.zeros((0, 4)).bool()

    outcomes = column(measure)
    broken = rates(column("degenerate"), clusters, draws_of(seed, f"{kind}/d"))
    cells, found = rates(outcomes, clusters, draws), effects(outcomes, clusters, draws)
    return {
        "measure": measure,
        "rows": len(kept),
        "requests": len(set(clusters)),
        "lost": dict(losses),
        "cells": {name: figure_of(each) for name, each in cells.items()},
        "effects": {name: figure_of(each) for name, each in found.items()},
        "degenerate": {name: figure_of(each) for name, each in broken.items()},
    }
