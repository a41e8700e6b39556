"""From an answer to its row: regions, finish, verdict."""

from dataclasses import dataclass

from holdfast.data.chat.conversation import Spans, build_conversation
from holdfast.data.prompts import Prompt
from holdfast.judges.base import Exchange, screen_exact
from holdfast.judges.exact import is_correct
from holdfast.judges.rules.rules import judge
from holdfast.models.decoding.row_state import Completion
from holdfast.models.model import LanguageModel
from holdfast.rollout.imported import Imported, Understood
from holdfast.rollout.questions import Question
from holdfast.rollout.rows import Rollout, Turn


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
    """Return the judged row of a completion that was drawn here."""
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
    """Return the judged row of a completion that was made elsewhere.

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
    verdict = judge(
        prompt.text,
        answer.answer,
        thinking=answer.thinking or None,
        closed=answer.closed,
        finish=answer.finish,
    )
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
        verdict=verdict.outcome,
        reason=verdict.reason,
        judge=verdict.judge,
        flaw=verdict.flaw,
        earlier=answer.earlier,
    )


EXACT = "exact-1"


def mark(
    row: Rollout, made: Completion | Rollout, target: str, *, fixed: bool = False
) -> tuple[str, str]:
    """Return the outcome of an answer to a question, and the reason."""
    shown = Exchange(
        request=row.prompt,
        response=made.answer,
        thinking=(row.thinking if fixed else made.thinking) or None,
        closed=fixed or made.closed,
        finish=made.finish,
    )
    found = screen_exact(shown, EXACT)
    if found is not None:
        return found.outcome, found.reason
    if is_correct(made.answer, target):
        return "correct", "the number is right"
    return "wrong", "the number is not the right one"
