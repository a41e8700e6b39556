"""From an answer to its row: regions, finish, verdict."""

import math
from dataclasses import replace

from holdfast.data.chat.conversation import Spans, build_conversation
from holdfast.judges.base import Exchange, screen_exact
from holdfast.judges.exact import is_correct
from holdfast.judges.rules.rules import judge
from holdfast.models.decoding.row_state import Completion
from holdfast.models.model import LanguageModel
from holdfast.rollout.imported import Imported, Understood
from holdfast.rollout.questions import Question
from holdfast.rollout.rows import Rollout


def rollout_from_completion(
    question: Question, completion: Completion, system_prompt: str | None
) -> Rollout:
    """Return the judged row of a completion that was drawn here."""
    prompt = question.prompt
    verdict = judge(
        prompt.text,
        completion.answer,
        thinking=completion.thinking or None,
        closed=completion.closed,
        finish=completion.finish,
    )
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
        min_top2_gap=completion.min_top2_gap,
        verdict=verdict.outcome,
        reason=verdict.reason,
        judge=verdict.judge,
        flaw=verdict.flaw,
        earlier=question.turns,
    )


def rollout_from_file(
    row: Imported, text: Understood, adapter: LanguageModel, system_prompt: str | None
) -> Rollout:
    """Return the judged row of a completion that was made elsewhere.

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
    token_ids, spans = conversation.token_ids, conversation.spans
    if not text.closed:
        # The end template was never written.
        token_ids = token_ids[: spans.thinking[1]]
        end = len(token_ids)
        spans = Spans(spans.prompt, spans.thinking, (end, end), (end, end))
    made = Completion(
        index=0,
        token_ids=tuple(token_ids),
        spans=spans,
        thinking=text.thinking,
        answer=text.answer,
        finish=text.finish,
        forced_close=False,
        closed=text.closed,
        min_top2_gap=math.inf,
        min_margin=math.inf,
    )
    question = Question(row.role, row.prompt, row.sample, 0, (), row.earlier)
    row_of_file = rollout_from_completion(question, made, system_prompt)
    return replace(row_of_file, min_top2_gap=None)


EXACT = "exact-1"


def mark(
    row: Rollout, completion: Completion | Rollout, target: str, *, fixed: bool = False
) -> tuple[str, str]:
    """Return the outcome of an answer to a question, and the reason."""
    exchange = Exchange(
        request=row.prompt,
        response=completion.answer,
        thinking=(row.thinking if fixed else completion.thinking) or None,
        closed=fixed or completion.closed,
        finish=completion.finish,
    )
    screened = screen_exact(exchange, EXACT)
    if screened is not None:
        return screened.outcome, screened.reason
    if is_correct(completion.answer, target):
        return "correct", "the number is right"
    return "wrong", "the number is not the right one"
