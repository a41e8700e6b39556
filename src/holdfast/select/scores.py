"""Scores of pool rows, with the thinking that a model draws for them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa
import torch

from holdfast.cliff.cliff import RowCliff, row_cliff
from holdfast.cliff.probe import Probe
from holdfast.data.chat.conversation import Conversation, build_conversation
from holdfast.data.chat.template import prompt_token_ids
from holdfast.data.pool import NO_THINKING, PoolRow, Rendered, render_row
from holdfast.judges.base import Exchange, Judge, harmful
from holdfast.judges.rules.rules import judge as by_rules
from holdfast.judges.verdict import Verdict
from holdfast.models.decoding.generate import generate, longest_prompt
from holdfast.models.decoding.row_state import Completion, Sampling
from holdfast.models.hidden_states import project_states, target_losses
from holdfast.models.model import Adapter
from holdfast.rollout.prompts import row_seed
from holdfast.rollout.rows import ATTACK_SUCCESS_OUTCOMES

SCORED = pa.schema(
    [
        ("row", pa.int64()),
        ("place", pa.string()),
        ("content", pa.uint64()),
        ("category", pa.string()),
        ("n_prompt", pa.int32()),
        ("n_thinking", pa.int32()),
        ("n_answer", pa.int32()),
        ("plateau", pa.float64()),
        ("plateau_max", pa.float64()),
        ("final", pa.float64()),
        ("cliff", pa.float64()),
        ("plateau_logit", pa.float64()),
        ("final_logit", pa.float64()),
        ("loss", pa.float64()),
        ("kind", pa.string()),
        ("reason", pa.string()),
    ]
)
"""`kind` and `reason` say why a row has no score; both are null for one that has."""
SHORT = "short thinking"


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
    ) -> None:
        """Keep the model.

        `probe`: The direction; None where no row is traced.
        """
        self.adapter, self.probe = adapter, probe
        self.rules = rules or ScoreRules()
        self.batch_size = batch_size

    def render(self, row: PoolRow) -> Rendered:
        """Return a row as tokens, or why it is left out."""
        adapter, system_prompt = self.adapter, self.rules.system_prompt
        return render_row(
            row,
            adapter.tokenizer,
            adapter.thinking,
            adapter.max_positions,
            system_prompt,
        )

    def __call__(self, rows: Sequence[PoolRow]) -> pa.Table:
        """Score rows.

        Returns: A table of `SCORED`, in the order of the rows.
        """
        rendered = [self.render(row) for row in rows]
        found = [each.conversation for each in rendered]
        whole = [conversation for conversation in found if conversation is not None]
        cliffs = iter(self._cliffs(whole))
        losses = iter(self._losses(whole))
        records = []
        for row, each in zip(rows, rendered, strict=True):
            record = _blank(row) | {"kind": each.kind, "reason": each.reason}
            if each.conversation is not None:
                spans = each.conversation.spans
                for name, span in zip(_COUNTED, _counted(spans), strict=True):
                    record[name] = span[1] - span[0]
                record["loss"] = next(losses)
                record |= _traced(next(cliffs))
            records.append(record)
        return pa.Table.from_pylist(records, schema=SCORED)

    def _cliffs(self, found: Sequence[Conversation]) -> list[RowCliff | None]:
        if self.probe is None:
            return [None] * len(found)
        direction, offset = self.probe.raw()
        # What follows the end template is no part of the score, and costs nothing.
        logits = project_states(
            self.adapter,
            [each.token_ids[: each.spans.answer[0]] for each in found],
            direction.float()[None],
            torch.tensor([offset]),
            batch_size=self.batch_size,
        )
        return [
            row_cliff(
                each[:, 0],
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


_COUNTED = ("n_prompt", "n_thinking", "n_answer")


def _counted(spans: Any) -> tuple[tuple[int, int], ...]:
    return spans.prompt, spans.thinking, spans.answer


def _blank(row: PoolRow) -> dict[str, Any]:
    return {
        "row": row.row,
        "place": row.place,
        "content": row.content,
        "category": row.category,
    }


def _traced(found: RowCliff | None) -> dict[str, Any]:
    if found is None:
        return {}
    values = found._asdict()
    del values["n_thinking"]
    if found.reason is not None:
        # The final score stands; only the plateau, and so the cliff, is missing.
        return values | {"kind": SHORT}
    return values


DRAWN = pa.schema(
    [
        ("row", pa.int64()),
        ("thinking", pa.string()),
        ("closed", pa.bool_()),
        ("forced_close", pa.bool_()),
        ("answer", pa.string()),
        ("outcome", pa.string()),
        ("judge_score", pa.float64()),
        ("judge", pa.string()),
        ("flagged", pa.bool_()),
        ("rules_outcome", pa.string()),
        ("draw_kind", pa.string()),
        ("draw_reason", pa.string()),
    ]
)
NO_ROOM = "without room to answer (--max-answer)"


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

    def __call__(self, rows: Sequence[PoolRow]) -> pa.Table:
        """Answer rows.

        Returns: A table of `DRAWN`, in the order of the rows.
        """
        records: list[dict[str, Any]] = [{"row": row.row} for row in rows]
        prompts: list[tuple[tuple[int, ...], int]] = []
        asked = []
        for place, row in enumerate(rows):
            ids, kind, reason = self._prompt(row)
            if ids is None:
                records[place] |= {"draw_kind": kind, "draw_reason": reason}
            else:
                prompts.append((ids, row_seed(self.seed, f"{row.content:016x}", 0)))
                asked.append(place)
        made = self._draw(prompts)
        for place, completion in zip(asked, made, strict=True):
            records[place] |= self._record(rows[place], completion)
        if self.judge is not None:
            self._judge(self.judge, rows, records, asked)
        return pa.Table.from_pylist(records, schema=DRAWN)

    def _prompt(
        self, row: PoolRow
    ) -> tuple[tuple[int, ...] | None, str | None, str | None]:
        """Return the tokens that are there before the model goes on, or why none."""
        adapter = self.adapter
        if row.broken is not None:
            return None, row.broken, "the row's thinking is broken"
        own = self.own_thinking and adapter.thinking is not None
        if own and row.thinking is None:
            return None, NO_THINKING, "the row has no thinking"
        if own:
            ids = build_conversation(
                adapter.tokenizer,
                row.prompt,
                row.thinking or "",
                "",
                adapter.thinking,
                self.system_prompt,
            ).token_ids
        else:
            ids = prompt_token_ids(
                adapter.tokenizer,
                row.prompt,
                system_prompt=self.system_prompt,
                thinking=adapter.thinking,
            )
        most = longest_prompt(adapter, self.sampling, thinking_done=self.own_thinking)
        if len(ids) > most:
            return None, NO_ROOM, f"{len(ids)} tokens, and at most {most} leave room"
        return tuple(ids), None, None

    def _draw(self, prompts: Sequence[tuple[tuple[int, ...], int]]) -> list[Completion]:
        parts = generate(
            self.adapter,
            prompts,
            self.sampling,
            batch_size=self.batch_size,
            thinking_done=self.own_thinking,
        )
        found = {each.index: each for part in parts for each in part}
        return [found[place] for place in range(len(prompts))]

    def _record(self, row: PoolRow, made: Completion) -> dict[str, Any]:
        fixed = self.own_thinking
        thinking = row.thinking if fixed else made.thinking
        closed = fixed or made.closed
        said = by_rules(
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
            "rules_outcome": said.outcome,
        }
        if not closed:
            record |= {"draw_kind": NO_THINKING, "draw_reason": "thinking never ended"}
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


def is_flagged(verdict: Verdict) -> bool:
    """Return whether a judge objects to an answer to a harmful request.

    A judge of harm decides by its score; one of refusal alone by what was given.
    """
    by_score = harmful(verdict)
    return verdict.outcome in ATTACK_SUCCESS_OUTCOMES if by_score is None else by_score


def with_drawn_thinking(rows: Sequence[PoolRow], drawn: pa.Table) -> list[PoolRow]:
    """Return rows whose thinking is the model's; none where it never ended."""
    columns = drawn.select(["row", "thinking", "draw_kind"]).to_pydict()
    made = []
    for row, number, thinking, kind in zip(rows, *columns.values(), strict=True):
        assert row.row == number
        usable = thinking if kind is None and (thinking or "").strip() else None
        made.append(replace(row, thinking=usable))
    return made
