"""From an answer to its row: regions and finish; the verdict follows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from holdfast.data.chat.conversation import Spans, build_conversation
from holdfast.data.prompts import Prompt
from holdfast.judges.rows import NOT_YET
from holdfast.models.decoding.row_state import Completion
from holdfast.models.model import LanguageModel
from holdfast.rollout.imported import Imported, Understood
from holdfast.rollout.questions import Question
from holdfast.rollout.rows import UNJUDGED, Rollout, Turn


@dataclass(frozen=True)
class Answer:
    """What a model wrote after one prompt, whoever had it decoded."""

    token_ids: tuple[int, ...]
    spans: Spans
    thinking: str
    answer: str
    finish: str
    closed: bool
    forced_close: bool = False
    min_top2_gap: float | None = None
    earlier: tuple[Turn, ...] = ()


def drawn(question: Question, made: Completion, system_prompt: str | None) -> Rollout:
    """Return the row of a completion that was drawn here."""
    answer = Answer(
        tuple(made.token_ids),
        made.spans,
        made.thinking,
        made.answer,
        made.finish,
        made.closed,
        made.forced_close,
        made.min_top2_gap,
        question.turns,
    )
    return _row(
        question.role,
        question.prompt,
        question.sample,
        question.seed,
        system_prompt,
        answer,
    )


def imported(
    each: Imported, said: Understood, adapter: LanguageModel, system_prompt: str | None
) -> Rollout:
    """Return the row of a completion that was made elsewhere.

    Its tokens are those of its text, region by region, which need not be the very
    tokens that were drawn.
    """
    conversation = build_conversation(
        adapter.tokenizer,
        each.prompt.text,
        said.thinking,
        said.answer,
        adapter.thinking,
        system_prompt,
        [(turn.prompt, turn.answer) for turn in each.earlier],
    )
    token_ids, spans = conversation.token_ids, conversation.spans
    if not said.closed:
        # The end template was never written.
        token_ids = token_ids[: spans.thinking[1]]
        end = len(token_ids)
        spans = Spans(spans.prompt, spans.thinking, (end, end), (end, end))
    answer = Answer(
        token_ids,
        spans,
        said.thinking,
        said.answer,
        said.finish,
        said.closed,
        earlier=each.earlier,
    )
    return _row(each.role, each.prompt, each.sample, 0, system_prompt, answer)


def _row(
    role: str,
    prompt: Prompt,
    sample: int,
    seed: int,
    system_prompt: str | None,
    answer: Answer,
) -> Rollout:
    return Rollout(
        row_id=f"{role}/{prompt.prompt_id}/{sample}",
        role=role,
        request_id=prompt.request_id,
        prompt_id=prompt.prompt_id,
        source=prompt.source,
        split="",
        label=prompt.label,
        wrapper=prompt.wrapper,
        topic=prompt.topic,
        system_prompt=system_prompt,
        prompt=prompt.text,
        sample=sample,
        seed=seed,
        thinking=answer.thinking,
        answer=answer.answer,
        token_ids=answer.token_ids,
        spans=answer.spans,
        finish=answer.finish,
        closed=answer.closed,
        forced_close=answer.forced_close,
        min_top2_gap=answer.min_top2_gap,
        verdict=UNJUDGED,
        reason=NOT_YET,
        judge="",
        earlier=answer.earlier,
    )


def as_asked(rows: Sequence[Rollout]) -> list[dict[str, Any]]:
    """Return rows as a judge is asked about them.

    `request` is the request behind a wrapper, if it was asked plainly as well, after
    what the user said in the turns before.
    """
    plain = {row.request_id: row.prompt for row in rows if row.wrapper is None}
    columns = ("row_id", "prompt", "thinking", "answer", "closed", "finish", "label")
    return [
        {name: getattr(row, name) for name in columns}
        | {
            "request": "\n\n".join(
                (
                    *(turn.prompt for turn in row.earlier),
                    plain.get(row.request_id, row.prompt),
                )
            )
        }
        for row in rows
    ]


def with_verdict(row: Rollout, verdict: Mapping[str, Any] | None, why: str) -> Rollout:
    """Return a row with what a judge has said of it, or with why it has said nothing.

    `verdict`: A row of `judges.rows.JUDGED`.
    """
    said = verdict or {"verdict": UNJUDGED, "reason": why, "judge": ""}
    names = ("verdict", "reason", "judge", "flaw", "score")
    thoughts = ("thinking_verdict", "thinking_score")
    fields: dict[str, Any] = {name: said.get(name) for name in (*names, *thoughts)}
    return replace(row, **fields)
