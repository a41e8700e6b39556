"""Scores of pool rows: a plain class that holds a model and is handed rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import torch

from holdfast.analysis.cliff import RowCliff, row_cliff
from holdfast.analysis.probe import Probe
from holdfast.data.conversation import Conversation, build_conversation
from holdfast.data.pool import PoolRow
from holdfast.models.capture import project_states
from holdfast.models.parts import Adapter
from holdfast.models.target_loss import target_losses

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

NO_THINKING, TOO_LONG, SHORT = "no thinking", "over the context", "short thinking"


class Rendered(NamedTuple):
    """A row as tokens, or the reason why it is left out."""

    conversation: Conversation | None
    kind: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class ScoreRules:
    """How rows are read.

    Attributes:
        plateau: Rule of the plateau.
        min_thinking: Shorter thinking has no plateau.
        loss: Whether the loss on the safe answer is wanted.
        system_prompt: System prompt of every conversation.
    """

    plateau: Literal["median", "maximum"] = "median"
    min_thinking: int = 20
    loss: bool = False
    system_prompt: str | None = None


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

        Args:
            adapter: The model.
            probe: The direction; None where no row is traced.
            rules: How rows are read.
            batch_size: Rows a pass.
        """
        self.adapter, self.probe = adapter, probe
        self.rules = rules or ScoreRules()
        self.batch_size = batch_size

    def render(self, row: PoolRow) -> Rendered:
        """Return a row as tokens, or why it is left out.

        A row without thinking is left out where the model thinks: its template would
        stand after nothing. So is one whose thinking is broken, in any model. The
        thinking of a row is left off where the model does not think.
        """
        adapter, thinking = self.adapter, row.thinking
        if row.broken is not None:
            return Rendered(None, row.broken, "the row's thinking is broken")
        if adapter.thinking is None:
            thinking = ""
        elif thinking is None:
            return Rendered(None, NO_THINKING, "the row has no thinking")
        made = build_conversation(
            adapter.tokenizer,
            row.prompt,
            thinking,
            row.response,
            adapter.thinking,
            self.rules.system_prompt,
        )
        n, limit = len(made.token_ids), adapter.max_positions
        if n > limit:
            reason = f"{n} tokens, over the context of {limit}"
            return Rendered(None, TOO_LONG, reason)
        return Rendered(made)

    def __call__(self, rows: Sequence[PoolRow]) -> pa.Table:
        """Score rows.

        Args:
            rows: Rows of a pool.

        Returns:
            A table of `SCORED`, in the order of the rows.

        Raises:
            InputError: If the chat template refuses a prompt.
            EnvironmentProblem: If one row alone does not fit in memory.
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
