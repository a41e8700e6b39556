"""Answers behind a thinking that is fixed, under edits: drawn, kept as rows, judged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyarrow as pa

from holdfast.cliff.commitment.opened import Opened
from holdfast.cliff.commitment.settings import stage_of
from holdfast.engines.port import Around, Ask
from holdfast.judges.rows import judge_rows
from holdfast.models.decoding.edits import Edit
from holdfast.models.decoding.generate import TAKEN, generate
from holdfast.models.decoding.jobs import longest_prompt
from holdfast.models.decoding.row_state import Completion, Sampling
from holdfast.models.interventions import Range
from holdfast.report.progress import Tick
from holdfast.rollout.engine import all_drawn
from holdfast.rollout.prompts import row_seed
from holdfast.rollout.rows import Judged, Rollout
from holdfast.rollout.sampling import announce, sampling_of, tell_pace
from holdfast.study.batches import ROW_ID, Batches, Meter
from holdfast.study.directory import Stage
from holdfast.study.rows import Int32, table_of


class Item(NamedTuple):
    """One answer that is to be drawn behind a fixed thinking."""

    condition: str
    row: Rollout  # Whose request it is.
    draw: int
    token_ids: tuple[int, ...]  # All that stands before the answer.
    template: Range  # Positions of the end template in them.
    prompt: str  # What was asked, as the judge is told.
    thinking: str

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{self.condition}#{self.draw}#{self.row.row_id}"

    @property
    def seed(self) -> int:
        """Seed of the draw, the same under every condition."""
        return row_seed(self.row.seed, self.row.row_id, self.draw)


@dataclass(frozen=True)
class EditedRow:
    """An answer under a condition, before a judge has seen it."""

    row_id: str
    condition: str
    draw: Int32
    asked: str  # Row of the rollouts whose request it is.
    request_id: str
    role: str
    label: str
    prompt: str
    request: str  # The request without its wrapper, where that is known.
    thinking: str
    answer: str
    finish: str
    closed: bool
    n_tokens: Int32
    margin: float | None  # Log-odds of refusing at the first answer token, if read.


def own_item(condition: str, row: Rollout, draw: int) -> Item:
    """Return the item of a row behind its own thinking."""
    start, end = row.spans.end_template
    before = row.token_ids[: row.spans.answer[0]]
    return Item(condition, row, draw, before, (start, end), row.prompt, row.thinking)


def edited_sampling(opened: Opened) -> Sampling:
    """Return how answers are drawn: as in the study, and as briefly as was asked."""
    known = sampling_of(opened.study, opened.session.adapter)
    most = min(known.max_answer, opened.settings.edited_tokens)
    return replace(known, max_answer=most)


def n_draws(opened: Opened, sampling: Sampling) -> int:
    """Return how many answers are drawn in each condition."""
    return 1 if sampling.temperature == 0 else opened.settings.edited_draws


def fits(opened: Opened, sampling: Sampling, item: Item) -> bool:
    """Return whether an answer fits behind an item in the model's context."""
    most = longest_prompt(opened.session.adapter, sampling, thinking_done=True)
    return len(item.token_ids) <= most


Plan = Callable[[str, Sequence[Item]], Edit | None]
"""From a condition and the items of a batch to what is done to the model."""
Margins = Callable[[Sequence[Item], Edit | None], Sequence[float | None]]


def draw_items(
    opened: Opened,
    stage: Stage,
    items: Sequence[Item],
    plan: Plan,
    requests: Mapping[str, str],
    *,
    label: str,
    by_engine: Callable[[str], bool] = lambda _: False,
    margins: Margins | None = None,
) -> pa.Table:
    """Draw every item under its condition, batch by batch; no judge has seen them.

    `requests`: Requests as they were asked plainly, by their names.
    `by_engine`: Whether the engine of the session draws a condition; none of edits.
    `margins`: Reads the log-odds of refusing of items under an edit.
    """
    session, sampling, meter = opened.session, edited_sampling(opened), Meter()
    announce(
        session,
        rows=len(items),
        prompt=max((len(item.token_ids) for item in items), default=1),
        sampling=sampling,
        drafted=True,
    )

    def work(batch: list[Item]) -> pa.Table:
        made: list[EditedRow] = []
        for condition in dict.fromkeys(item.condition for item in batch):
            chosen = [item for item in batch if item.condition == condition]
            edit = plan(condition, chosen)
            done = (
                _by_engine(opened, chosen, sampling, meter.tick)
                if by_engine(condition)
                else _here(opened, chosen, sampling, edit, meter.tick)
            )
            read = margins(chosen, edit) if margins else [None] * len(chosen)
            made += [
                _row(item, each, margin, requests)
                for item, each, margin in zip(chosen, done, read, strict=True)
            ]
        return table_of(made, EditedRow)

    if not items:
        return table_of([], EditedRow)
    places = {
        name: n for n, name in enumerate(dict.fromkeys(i.condition for i in items))
    }
    longest = max(len(item.token_ids) for item in items) + 1
    return Batches(stage, TAKEN * session.batch_size, meter).run(
        items,
        work,
        name=lambda item: item.name,
        # What runs under one edit lies together.
        length=lambda item: (
            (len(places) - places[item.condition]) * longest + len(item.token_ids)
        ),
        label=label,
        paced=lambda pace: tell_pace(
            session, pace, pace.table.column("n_tokens").to_pylist()
        ),
    )


def _here(
    opened: Opened,
    items: Sequence[Item],
    sampling: Sampling,
    edit: Edit | None,
    told: Callable[[Tick], None],
) -> list[Completion]:
    parts = generate(
        opened.session.adapter,
        [(item.token_ids, item.seed) for item in items],
        sampling,
        batch_size=opened.session.batch_size,
        edit=edit,
        thinking_done=True,
        drafts=[_draft(item, sampling) for item in items],
        told=told,
    )
    found = {each.index: each for part in parts for each in part}
    return [found[place] for place in range(len(items))]


def _by_engine(
    opened: Opened,
    items: Sequence[Item],
    sampling: Sampling,
    told: Callable[[Tick], None],
) -> list[Completion]:
    around = Around(opened.session.batch_size, thinking_done=True, told=told)
    asks = [Ask(item.token_ids, item.seed) for item in items]
    return all_drawn(opened.session.engine, asks, sampling, around)


def _draft(item: Item, sampling: Sampling) -> tuple[int, ...]:
    """Return what an item will probably say: without temperature, what its row said."""
    row, length = item.row, len(item.token_ids)
    same = sampling.temperature == 0 and row.token_ids[:length] == item.token_ids
    return row.token_ids[length:] if same else ()


def _row(
    item: Item, made: Completion, margin: float | None, requests: Mapping[str, str]
) -> EditedRow:
    row = item.row
    return EditedRow(
        row_id=item.name,
        condition=item.condition,
        draw=item.draw,
        asked=row.row_id,
        request_id=row.request_id,
        role=row.role,
        label=row.label,
        prompt=item.prompt,
        request=requests.get(row.request_id, item.prompt),
        thinking=item.thinking,
        answer=made.answer,
        finish=made.finish,
        closed=True,
        n_tokens=len(made.token_ids) - len(item.token_ids),
        margin=margin,
    )


class Said(NamedTuple):
    """A judged answer, and what it was an answer to."""

    row: Mapping[str, Any]  # As `EditedRow` has it.
    judged: Judged


def judge_items(opened: Opened, key: str, table: pa.Table) -> list[Said]:
    """Judge what was drawn, in its order; what a broken run has judged stays."""
    rows = table.to_pylist()
    judge = opened.session.open_judge(opened.judge)
    verdicts = judge_rows(
        opened.study, stage_of(key), rows, judge, opened.session.progress
    ).to_pylist()
    said = {each[ROW_ID]: each for each in verdicts}
    return [
        Said(row, Judged(row["request_id"], one["verdict"], one["flaw"], one["score"]))
        for row in rows
        for one in [said[row[ROW_ID]]]
    ]
