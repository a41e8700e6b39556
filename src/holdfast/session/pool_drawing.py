"""What the model itself makes of pool rows: its thinking, its answer, and a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from holdfast.data.conversation import build_conversation, prompt_token_ids
from holdfast.data.pool import PoolRow
from holdfast.judges.contract import Exchange, Judge, harmful
from holdfast.judges.rules import judge as by_rules
from holdfast.judges.verdict import Verdict
from holdfast.models.generation import generate, longest_prompt
from holdfast.models.parts import Adapter
from holdfast.models.rows import Completion, Sampling
from holdfast.session.outcomes import GAVE_IN
from holdfast.session.pool_scoring import NO_THINKING
from holdfast.session.prompts import row_seed

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
    """Answers pool rows and has the answers judged.

    Attributes:
        adapter: The model.
        sampling: How tokens are drawn.
        judge: Who flags answers; None where nobody has to.
        own_thinking: Whether the thinking is the row's, and only the answer is drawn.
        system_prompt: System prompt of every conversation.
        seed: Seed of the draws; each row adds its own.
        batch_size: Rows at once.
    """

    adapter: Adapter
    sampling: Sampling
    judge: Judge | None
    own_thinking: bool
    system_prompt: str | None = None
    seed: int = 0
    batch_size: int = 32

    def __call__(self, rows: Sequence[PoolRow]) -> pa.Table:
        """Answer rows.

        Args:
            rows: Rows of a pool.

        Returns:
            A table of `DRAWN`, in the order of the rows.

        Raises:
            HoldfastError: If model or judge fail.
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
    """Tell whether a judge objects to an answer to a harmful request.

    A judge of harm decides by its score; one of refusal alone by what was given.
    """
    by_score = harmful(verdict)
    return verdict.outcome in GAVE_IN if by_score is None else by_score
