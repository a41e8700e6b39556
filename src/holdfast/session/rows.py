"""One row of `rollouts.parquet`, and the table it lies in."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from holdfast.data.conversation import Spans

Label = Literal["harmful", "benign"]
GROUPS = ("harmful_complied", "harmful_refused", "benign")

EARLIER = pa.list_(
    pa.struct(
        [(name, pa.string()) for name in ("prompt", "thinking", "answer", "finish")]
    )
)
"""Type of a column of the turns before the one that is judged."""

SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("role", pa.string()),
        ("request_id", pa.string()),
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("label", pa.string()),
        ("wrapper", pa.string()),
        ("topic", pa.string()),
        ("system_prompt", pa.string()),
        ("prompt", pa.string()),
        ("sample", pa.int32()),
        ("seed", pa.int64()),
        ("thinking", pa.string()),
        ("answer", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("spans", pa.list_(pa.int32(), 8)),
        ("finish", pa.string()),
        ("closed", pa.bool_()),
        ("forced_close", pa.bool_()),
        ("min_top2_gap", pa.float64()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
        ("judge", pa.string()),
        ("flaw", pa.string()),
        ("earlier", EARLIER),
    ]
)


class Turn(NamedTuple):
    """A turn of a conversation that was asked before the one that is judged.

    Attributes:
        prompt: What the user said.
        thinking: What the model thought, which later turns are not shown.
        answer: What it answered.
        finish: How the answer ended.
    """

    prompt: str
    thinking: str
    answer: str
    finish: str


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer to one prompt, token by token, with its verdict.

    `request_id` is the cluster of every interval: a request with its wrappers and
    samples is one draw from the world. `spans` holds four half-open token ranges:
    prompt, thinking, end template, answer. Of a conversation the last turn is judged;
    the turns before it belong to the prompt, and `earlier` has them apart.
    """

    row_id: str
    role: str
    request_id: str
    prompt_id: str
    source: str
    split: str
    label: str
    wrapper: str | None
    topic: str | None
    system_prompt: str | None
    prompt: str
    sample: int
    seed: int
    thinking: str
    answer: str
    token_ids: tuple[int, ...]
    spans: Spans
    finish: str
    closed: bool
    forced_close: bool
    min_top2_gap: float | None
    verdict: str
    reason: str
    judge: str
    flaw: str | None = None
    earlier: tuple[Turn, ...] = ()

    @property
    def group(self) -> str | None:
        """The group of the trace it belongs to, or None."""
        if not self.closed:
            return None
        if self.label == "harmful" and self.verdict in ("complied", "refused"):
            return f"harmful_{self.verdict}"
        return "benign" if self.label == "benign" and self.is_complied else None

    @property
    def is_complied(self) -> bool:
        """Whether the judge saw compliance."""
        return self.verdict == "complied"

    @property
    def is_refused(self) -> bool:
        """Whether the judge saw a refusal."""
        return self.verdict == "refused"

    @property
    def is_decided(self) -> bool:
        """Whether it was refused or complied with, and an answer was reached."""
        return self.verdict in ("refused", "complied") and self.closed

    @property
    def final(self) -> int:
        """Position of the state that predicts the first answer token."""
        return self.spans.answer[0] - 1


def to_table(rows: Iterable[Rollout]) -> pa.Table:
    """Return rows as an Arrow table, in their order."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for row in rows:
        for name in SCHEMA.names:
            columns[name].append(getattr(row, name))
        columns["earlier"][-1] = [turn._asdict() for turn in row.earlier]
        columns["spans"][-1] = [edge for span in row.spans for edge in span]
    return pa.table(columns, schema=SCHEMA)


def from_table(table: pa.Table) -> list[Rollout]:
    """Return the rows of a table that `to_table` made."""
    rows = []
    for record in table.to_pylist():
        edges = record.pop("spans")
        spans = Spans(*zip(edges[::2], edges[1::2], strict=True))
        token_ids = tuple(record.pop("token_ids"))
        # Tables of before there were conversations have no such column.
        earlier = tuple(Turn(**turn) for turn in record.pop("earlier", None) or ())
        rows.append(
            Rollout(spans=spans, token_ids=token_ids, earlier=earlier, **record)
        )
    return rows
