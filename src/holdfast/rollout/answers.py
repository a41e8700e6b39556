"""From an answer to its row: regions and finish; the verdict follows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from holdfast.data.chat.conversation import build_conversation
from holdfast.engines.serving.replies import Understood, completion_of_text
from holdfast.judges.rows import NOT_YET
from holdfast.models.decoding.row_state import Completion
from holdfast.models.model import LanguageModel
from holdfast.rollout.imported import Imported
from holdfast.rollout.questions import Question
from holdfast.rollout.rows import UNJUDGED, Rollout


def rollout_from_completion(
    question: Question, completion: Completion, system_prompt: str | None
) -> Rollout:
    """Return the row of a completion that was drawn here."""
    prompt = question.prompt
    return Rollout(
        row_id=question.row_id,
        role=question.role,
        request_id=prompt.request_id,
        prompt_id=prompt.prompt_id,
        source=prompt.source,
        split="",
        label=prompt.label,
        wrapper=prompt.wrapper,
        topic=prompt.topic,
        system_prompt=system_prompt,
        prompt=prompt.text,
        sample=question.sample,
        seed=question.seed,
        thinking=completion.thinking,
        answer=completion.answer,
        token_ids=tuple(completion.token_ids),
        spans=completion.spans,
        finish=completion.finish,
        closed=completion.closed,
        forced_close=completion.forced_close,
        min_top2_gap=completion.told_gap,
        verdict=UNJUDGED,
        reason=NOT_YET,
        judge="",
        earlier=question.turns,
        tokens=completion.tokens,
    )


def rollout_from_file(
    row: Imported, text: Understood, adapter: LanguageModel, system_prompt: str | None
) -> Rollout:
    """Return the row of a completion that was made elsewhere.

    Its tokens are those of its text, region by region, which need not be the very
    tokens that were drawn.
    """
    conversation = build_conversation(
        adapter.tokenizer,
        row.prompt.text,
        text.thinking,
        text.answer,
        adapter.thinking,
        system_prompt,
        [(turn.prompt, turn.answer) for turn in row.earlier],
    )
    made = completion_of_text(adapter.tokenizer, adapter.thinking, conversation, text)
    question = Question(row.role, row.prompt, row.sample, 0, (), row.earlier)
    return rollout_from_completion(question, made, system_prompt)


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
