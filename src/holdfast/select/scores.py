"""Scores of pool rows, with the thinking that a model draws for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor

from holdfast.cliff.cliff import RowCliff, row_cliff
from holdfast.cliff.probe import Probe
from holdfast.data.chat.conversation import Conversation, build_conversation
from holdfast.data.chat.rendering import rendering_record
from holdfast.data.chat.template import prompt_token_ids
from holdfast.data.pool import NO_THINKING, PoolRow, render_row
from holdfast.engines.port import Around, Ask, Engine, HfEngine
from holdfast.judges.base import Exchange, Judge, harmful
from holdfast.judges.rules.rules import judge as by_rules
from holdfast.judges.verdict import Verdict
from holdfast.models.decoding.jobs import longest_prompt
from holdfast.models.decoding.row_state import Completion, Sampling
from holdfast.models.hidden_states import project_states, target_losses
from holdfast.models.model import Adapter
from holdfast.rollout.prompts import row_seed
from holdfast.rollout.rows import ATTACK_SUCCESS_OUTCOMES
from holdfast.study.rows import Int32, UInt64, table_of, table_schema

Project = Callable[[Sequence[Sequence[int]], Tensor, float], Sequence[Tensor]]
"""From token ids, direction and offset to the logit of every position of every text."""
SHORT = "short thinking"
UNANSWERED = "that nobody answered"
NO_ROOM = "without room to answer (--max-answer)"


@dataclass(frozen=True)
class ScoredRow:
    """The scores of a pool row; `kind` and `reason` say why it has none."""

    row: int
    place: str
    content: UInt64
    category: str | None
    n_prompt: Int32 | None = None
    n_thinking: Int32 | None = None
    n_answer: Int32 | None = None
    plateau: float | None = None
    plateau_max: float | None = None
    final: float | None = None
    cliff: float | None = None
    plateau_logit: float | None = None
    final_logit: float | None = None
    loss: float | None = None
    kind: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class DrawnRow:
    """What the model answered to a pool row, and what was made of it."""

    row: int
    thinking: str | None
    closed: bool | None
    forced_close: bool | None
    answer: str | None
    outcome: str | None
    judge_score: float | None
    judge: str | None
    flagged: bool | None
    rules_outcome: str | None
    # Why the row may not be chosen, if so.
    draw_kind: str | None
    draw_reason: str | None


@dataclass(frozen=True)
class ScoreRules:
    """How rows are read."""

    plateau: Literal["median", "maximum"] = "median"  # Rule of the plateau.
    min_thinking: int = 20  # Shorter thinking has no plateau.
    loss: bool = False  # Whether the loss on the safe answer is wanted.
    system_prompt: str | None = None  # System prompt of every conversation.


class PoolScorer:
    """Scores rows with one prefill each; it holds the model and nothing else.

    It knows no file and no study: an actor of a distributed engine can hold one and
    hand it batches.
    """

    def __init__(
        self,
        adapter: Adapter,
        probe: Probe | None,
        rules: ScoreRules | None = None,
        batch_size: int = 32,
        project: Project | None = None,
    ) -> None:
        """Keep the model.

        `probe`: The direction; None where no row is traced.
        `project`: Who reads states; the model itself where it is None.
        """
        self.adapter, self.probe, self.project = adapter, probe, project
        self.rules = rules or ScoreRules()
        self.batch_size = batch_size

    def __call__(self, rows: Sequence[PoolRow]) -> pa.Table:
        """Score rows.

        Returns: A table of `ScoredRow`, in the order of the rows.
        """
        adapter, system_prompt = self.adapter, self.rules.system_prompt
        limit, form = adapter.max_positions, adapter.thinking
        rendered = [
            render_row(row, adapter.tokenizer, form, limit, system_prompt)
            for row in rows
        ]
        whole = [each.conversation for each in rendered if each.conversation]
        measured = zip(whole, self._cliffs(whole), self._losses(whole), strict=True)
        scored = []
        for row, (conversation, kind, reason) in zip(rows, rendered, strict=True):
            values: dict[str, Any] = {"kind": kind, "reason": reason}
            if conversation is not None:
                values |= _scores(*next(measured))
            own = row.row, row.place, row.content, row.category
            scored.append(ScoredRow(*own, **values))
        return table_of(scored, ScoredRow)

    def _cliffs(self, found: Sequence[Conversation]) -> list[RowCliff | None]:
        if self.probe is None:
            return [None] * len(found)
        direction, offset = self.probe.raw()
        # What follows the end template is no part of the score, and costs nothing.
        ids = [each.token_ids[: each.spans.answer[0]] for each in found]
        if self.project is not None:
            logits = self.project(ids, direction.float(), offset)
        else:
            rows, shift = direction.float()[None], torch.tensor([offset])
            size = self.batch_size
            read = project_states(self.adapter, ids, rows, shift, batch_size=size)
            logits = [each[:, 0] for each in read]
        return [
            row_cliff(
                each,
                slice(*conversation.spans.thinking),
                conversation.spans.answer[0] - 1,
                self.rules.plateau,
                self.rules.min_thinking,
            )
            for conversation, each in zip(found, logits, strict=True)
        ]

    def _losses(self, found: Sequence[Conversation]) -> list[float | None]:
        if not self.rules.loss:
            return [None] * len(found)
        losses = target_losses(
            self.adapter,
            [each.token_ids for each in found],
            [each.spans.answer for each in found],
            batch_size=self.batch_size,
        )
        return losses.tolist()


def _scores(
    conversation: Conversation, cliff: RowCliff | None, loss: float | None
) -> dict[str, Any]:
    """Return what a whole row is given, by the fields of `ScoredRow`."""
    spans = conversation.spans
    values: dict[str, Any] = {
        f"n_{name}": end - start
        for name, (start, end) in spans._asdict().items()
        if name != "end_template"
    }
    values["loss"] = loss
    if cliff is not None:
        values = cliff._asdict() | values
        # The final score stands; only the plateau, and so the cliff, is missing.
        values["kind"] = None if cliff.reason is None else SHORT
    return values


@dataclass(frozen=True)
class PoolDrawer:
    """Answers pool rows and has the answers judged."""

    adapter: Adapter  # The model.
    sampling: Sampling  # How tokens are drawn.
    judge: Judge | None  # Who flags answers; None where nobody has to.
    # Whether the thinking is the row's, and only the answer is drawn.
    own_thinking: bool
    system_prompt: str | None = None  # System prompt of every conversation.
    seed: int = 0  # Seed of the draws; each row adds its own.
    batch_size: int = 32  # Rows at once.
    # Returns who draws, proved; by default the model itself.
    engine: Callable[[], Engine] | None = None

    def __call__(self, rows: Sequence[PoolRow]) -> pa.Table:
        """Answer rows.

        Returns: A table of `DrawnRow`, in the order of the rows.
        """
        records: list[dict[str, Any]] = [{"row": row.row} for row in rows]
        asks: dict[int, Ask] = {}
        for index, row in enumerate(rows):
            prompt = self._prompt(row)
            if isinstance(prompt, dict):
                records[index] |= prompt
            else:
                seed = row_seed(self.seed, f"{row.content:016x}", 0)
                asks[index] = Ask(prompt, seed, self._messages(row))
        asked = list(asks)

        def failed(place: int, why: str) -> None:
            records[asked[place]] |= _left_out(UNANSWERED, why)

        own = self.own_thinking
        around = Around(self.batch_size, thinking_done=own, failed=failed)
        engine = HfEngine(self.adapter) if self.engine is None else self.engine()
        parts = engine.draw(list(asks.values()), self.sampling, around)
        for completion in (each for part in parts for each in part):
            index = asked[completion.index]
            records[index] |= self._record(rows[index], completion)
        if self.judge is not None:
            answered = [index for index in asked if "answer" in records[index]]
            self._judge(self.judge, rows, records, answered)
        return pa.Table.from_pylist(records, schema=table_schema(DrawnRow))

    def _messages(self, row: PoolRow) -> tuple[dict[str, str], ...]:
        said = {"role": "user", "content": row.prompt}
        if self.system_prompt is None:
            return (said,)
        return {"role": "system", "content": self.system_prompt}, said

    def _prompt(self, row: PoolRow) -> tuple[int, ...] | dict[str, str]:
        """Return the tokens that are there before the model goes on, or why none."""
        adapter, tokenizer = self.adapter, self.adapter.tokenizer
        if row.broken is not None:
            return _left_out(row.broken, "the row's thinking is broken")
        if not self.own_thinking or adapter.thinking is None:
            ids = prompt_token_ids(
                tokenizer,
                row.prompt,
                system_prompt=self.system_prompt,
                thinking=adapter.thinking,
            )
        elif row.thinking is None:
            return _left_out(NO_THINKING, "the row has no thinking")
        else:
            form, system_prompt = adapter.thinking, self.system_prompt
            ids = build_conversation(
                tokenizer, row.prompt, row.thinking, "", form, system_prompt
            ).token_ids
        most = longest_prompt(adapter, self.sampling, thinking_done=self.own_thinking)
        if len(ids) > most:
            reason = f"{len(ids)} tokens, and at most {most} leave room"
            return _left_out(NO_ROOM, reason)
        return tuple(ids)

    def _record(self, row: PoolRow, made: Completion) -> dict[str, Any]:
        fixed = self.own_thinking
        thinking = row.thinking if fixed else made.thinking
        closed = fixed or made.closed
        verdict = by_rules(
            row.prompt,
            made.answer,
            thinking=thinking or None,
            closed=closed,
            finish=made.finish,
        )
        record = {
            "thinking": thinking,
            "closed": closed,
            "forced_close": made.forced_close,
            "answer": made.answer,
            "rules_outcome": verdict.outcome,
        }
        if not closed:
            record |= _left_out(NO_THINKING, "thinking never ended")
        return record

    def _judge(
        self,
        judge: Judge,
        rows: Sequence[PoolRow],
        records: list[dict[str, Any]],
        asked: Sequence[int],
    ) -> None:
        exchanges = [
            Exchange(
                request=rows[place].prompt,
                response=records[place]["answer"],
                thinking=records[place]["thinking"],
                closed=records[place]["closed"],
            )
            for place in asked
        ]
        for place, verdict in zip(asked, judge.judge(exchanges), strict=True):
            records[place] |= {
                "outcome": verdict.outcome,
                "judge_score": verdict.score,
                "judge": judge.identity.label,
                "flagged": is_flagged(verdict),
            }


def _left_out(kind: str, reason: str) -> dict[str, str]:
    return {"draw_kind": kind, "draw_reason": reason}


def is_flagged(verdict: Verdict) -> bool:
    """Return whether a judge objects to an answer to a harmful request.

    A judge of harm decides by its score; one of refusal alone by what was given.
    """
    by_score = harmful(verdict)
    return verdict.outcome in ATTACK_SUCCESS_OUTCOMES if by_score is None else by_score


def with_drawn_thinking(rows: Sequence[PoolRow], drawn: pa.Table) -> list[PoolRow]:
    """Return rows whose thinking is the model's; none where it never ended."""
    columns = drawn.select(["row", "thinking", "draw_kind"]).to_pydict().values()
    known = {row: (thought, kind) for row, thought, kind in zip(*columns, strict=True)}
    made = []
    for row in rows:
        thought, kind = known[row.row]
        whole = not kind and (thought or "").strip()
        made.append(replace(row, thinking=thought if whole else None))
    return made


def model_key(adapter: Adapter) -> dict[str, Any]:
    """Return what scores depend on of a model and of how its prompts are rendered."""
    identity = adapter.identity
    return {
        "weights_sha256": identity.weights_sha256,
        "template_sha256": identity.template_sha256,
        "dtype": identity.dtype,
        "tokenizer_sha256": identity.tokenizer_sha256,
        "rendering": rendering_record(adapter.tokenizer),
        "format": adapter.thinking and adapter.thinking.record(),
    }
