"""Answers drawn behind cuts, and what the judge says of each."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import pyarrow as pa

from holdfast.cliff.commitment.cuts import Cut, closed_at, end_template, open_at
from holdfast.cliff.commitment.opened import Opened
from holdfast.engines.port import Around, Ask
from holdfast.engines.proof import in_order
from holdfast.judges.rows import judge_rows
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Completion, Sampling
from holdfast.report.progress import Tick
from holdfast.rollout.engine import all_drawn, prove_engine
from holdfast.rollout.prompts import row_seed
from holdfast.rollout.rows import UNJUDGED, Rollout
from holdfast.rollout.sampling import sampling_of, tell_pace
from holdfast.study.batches import ROW_ID, Batches, Meter
from holdfast.study.directory import Stage
from holdfast.study.rows import Int32, table_of

AT_ONCE = 8
"""Times as many draws as decode side by side are taken together, as rows are."""
Outcomes = dict[tuple[str, str], Counter[str]]
"""From row and cut, by their names, to how often each outcome was drawn."""


class CutRow(NamedTuple):
    """An answer of the study, and where its thinking is cut in this round."""

    row: Rollout
    cuts: tuple[Cut, ...]
    draws: range  # Numbers of the draws at each of these cuts.


@dataclass(frozen=True)
class DrawRow:
    """One answer drawn behind a cut; the judge has yet to see it."""

    row_id: str  # The answer of the study whose thinking was cut.
    cut: str
    at: float
    draw: Int32
    kind: str  # `closed` behind the cut, or `redrawn` where the thinking went on.
    # All of it, where it went on from the cut; else empty, and no judge reads it.
    thinking: str
    answer: str
    finish: str
    closed: bool
    n_tokens: Int32  # Tokens that were drawn.


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn behind cuts."""

    opened: Opened
    stage: Stage
    sampling: Sampling  # Of answers; of a thinking that goes on, with its limit.
    kind: str = "closed"  # Or `redrawn`, where the thinking goes on from the cut.

    def draw(self, items: Sequence[CutRow], number: int) -> pa.Table:
        """Draw from every cut of every answer, batch by batch.

        `number`: Which round it is; a round that was broken off goes on.
        """
        session = self.opened.session
        most = max(len(each.cuts) * len(each.draws) for each in items)
        size = max(1, AT_ONCE * session.batch_size // most)
        meter = Meter()
        written: list[int] = []

        def work(batch: list[CutRow]) -> pa.Table:
            rows = [
                self._row(item, cut, draw, made)
                for (item, cut, draw), made in self._drawn(batch, meter)
            ]
            written.extend(row.n_tokens for row in rows)
            return table_of(rows, DrawRow)

        return Batches(
            self.stage, size, meter, f"{self.stage.name}_{self.kind}_{number}"
        ).run(
            items,
            work,
            name=lambda item: item.row.row_id,
            length=lambda item: item.row.final + 1,
            label="Answering behind cuts" + " once more" * (number > 0),
            paced=lambda pace: tell_pace(session, pace, written),
        )

    def _drawn(
        self, batch: Sequence[CutRow], meter: Meter
    ) -> Iterator[tuple[tuple[CutRow, Cut, int], Completion]]:
        """Yield what was drawn, and from where; draw after draw of each cut."""
        template = end_template(self.opened.session.adapter)
        places, asks, trunks = [], [], []
        for item in batch:
            for cut in item.cuts:
                redrawn = self.kind == "redrawn" and not cut.is_whole
                tokens = (
                    open_at(item.row, cut)
                    if redrawn
                    else closed_at(item.row, cut, template)
                )
                name = f"{item.row.row_id}@{cut.name}/{self.kind}"
                for draw in item.draws:
                    seed = row_seed(self.opened.seed, name, draw)
                    places.append((item, cut, draw))
                    asks.append(Ask(tokens, seed))
                    trunks.append(item.row.token_ids[: item.row.final + 1])

        def told(tick: Tick) -> None:
            # What ends are draws, and what is counted are answers of the study.
            meter.tick(tick._replace(finished=0))

        yield from zip(places, self._answered(asks, trunks, told), strict=True)

    def _answered(
        self,
        asks: Sequence[Ask],
        trunks: Sequence[tuple[int, ...]],
        told: Callable[[Tick], None],
    ) -> list[Completion]:
        """Return the answers in order, whoever draws them."""
        session, done = self.opened.session, self.kind == "closed"
        if session.engine_settings.engine == "hf":
            parts = generate(
                session.adapter,
                [(each.token_ids, each.seed) for each in asks],
                self.sampling,
                batch_size=session.batch_size,
                thinking_done=done,
                trunks=trunks,
                told=told,
            )
            return in_order(parts)
        around = Around(session.batch_size, thinking_done=done, told=told)
        # Without one of its draws a cut would have a share of fewer, and not say so.
        return all_drawn(session.engine, asks, self.sampling, around)

    def _row(self, item: CutRow, cut: Cut, draw: int, made: Completion) -> DrawRow:
        return DrawRow(
            row_id=item.row.row_id,
            cut=cut.name,
            at=cut.share,
            draw=draw,
            kind=self.kind,
            thinking=self._thinking(item.row, made),
            answer=made.answer,
            finish=made.finish,
            closed=made.closed,
            n_tokens=len(made.token_ids) - made.spans.prompt[1],
        )

    def _thinking(self, row: Rollout, made: Completion) -> str:
        if self.kind == "closed":
            return ""
        tokens = made.token_ids[row.spans.thinking[0] : made.spans.thinking[1]]
        tokenizer = self.opened.session.adapter.tokenizer
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    def judged(self, drawn: pa.Table, number: int) -> pa.Table:
        """Return what was drawn with a column `outcome`; equal answers are asked once.

        Answers that no judge could read are `unparsed`, and count as none.
        """
        opened, records = self.opened, drawn.to_pylist()
        asked: dict[str, dict[str, Any]] = {}
        names = []
        for each in records:
            # A thinking that stopped without an end stands for the answer.
            inside = "" if each["closed"] else each["thinking"]
            said = f"{each['answer']}\0{each['finish']}\0{each['closed']}\0{inside}"
            name = f"{each[ROW_ID]}#{sha256(said.encode()).hexdigest()[:16]}"
            names.append(name)
            if name not in asked:
                shown = ("thinking", "answer", "finish", "closed")
                asked[name] = dict(opened.shown[each[ROW_ID]]) | {
                    ROW_ID: name,
                    **{key: each[key] for key in shown},
                }
        judge = opened.session.open_judge(opened.judge)
        stage = f"{self.stage.name}_judge_{self.kind}_{number}"
        verdicts = judge_rows(
            opened.study, stage, list(asked.values()), judge, opened.session.progress
        )
        said_of = {row[ROW_ID]: row["verdict"] for row in verdicts.to_pylist()}
        outcomes = [said_of[name] or UNJUDGED for name in names]
        return drawn.append_column("outcome", pa.array(outcomes, pa.string()))


def outcomes_of(drawn: pa.Table) -> Outcomes:
    """Count the outcomes of each cut, without answers that nobody could judge."""
    found: Outcomes = {}
    for each in drawn.select([ROW_ID, "cut", "outcome"]).to_pylist():
        counter = found.setdefault((each[ROW_ID], each["cut"]), Counter())
        if each["outcome"] != UNJUDGED:
            counter[each["outcome"]] += 1
    return found


def prove(opened: Opened) -> Mapping[str, Any] | None:
    """Prove another engine than the model itself, and return its record."""
    if opened.session.engine_settings.engine == "hf":
        return None
    own = sampling_of(opened.study, opened.session.adapter)
    system_prompt = opened.study.manifest["settings"]["rollout"]["system_prompt"]
    return prove_engine(opened.session, own, [], system_prompt)
