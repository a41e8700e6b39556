"""Conversations: every turn is asked after the model's own answers to those before."""

from collections.abc import Callable, Sequence

from holdfast.data.control_tokens import prompt_token_ids
from holdfast.models.rows import Completion
from holdfast.models.speaking import Speaker
from holdfast.session.asking import NAMED, Question
from holdfast.session.prompts import row_seed
from holdfast.session.rows import Turn

Answered = list[tuple[Question, Completion]]
BEHIND_A_TURN = 64
"""Tokens that a template may write around a turn and its answer, for bounds alone."""


def converse(
    speaker: Speaker,
    questions: Sequence[Question],
    draw: Callable[[list[Question]], Answered],
    *,
    system_prompt: str | None,
    room: int,
) -> Answered:
    """Ask questions, conversations turn by turn, and return the last answers.

    A conversation depends on its own turns and seed alone, whoever is asked beside it.
    It ends early where the model's thinking never came to an answer, and its row is
    the unfinished one then.

    Args:
        speaker: The model.
        questions: First turns, or prompts of one turn.
        draw: Draws an answer to each question, in any order.
        system_prompt: System prompt of every conversation.
        room: Tokens that a prompt may have, for an answer to fit behind it.

    Returns:
        Each question as it stood at its last turn, with the answer to that.
        Conversations that outgrew the room are left out.

    Raises:
        HoldfastError: If drawing fails.
    """
    waiting, done = list(questions), []
    while waiting:
        following = []
        for question, made in draw(waiting):
            if question.is_last or not made.closed:
                done.append((question, made))
                continue
            after = _after(speaker, question, made, system_prompt)
            if after.n_tokens <= room:
                following.append(after)
        waiting = following
    return done


def _after(
    speaker: Speaker, question: Question, made: Completion, system_prompt: str | None
) -> Question:
    """Return the next turn of a conversation, behind the answer to this one."""
    turn = Turn(question.asked, made.thinking, made.answer, made.finish)
    after = question._replace(turns=(*question.turns, turn))
    # The answers are text, even where they spell a control token.
    ids = prompt_token_ids(
        speaker.tokenizer,
        after.asked,
        system_prompt=system_prompt,
        thinking=speaker.thinking,
        earlier=[(turn.prompt, turn.answer) for turn in after.turns],
    )
    seed = row_seed(question.seed, question.prompt.prompt_id, len(after.turns))
    return after._replace(token_ids=ids, seed=seed)


def most_tokens(question: Question, max_answer: int, room: int) -> int:
    """Return a bound on the tokens of the longest prompt of a question."""
    texts = (*question.prompt.earlier, question.prompt.text)[1:]
    # A token has at least one byte.
    more = sum(len(t.encode()) + max_answer + BEHIND_A_TURN for t in texts)
    return min(max(room, question.n_tokens), question.n_tokens + more)


def outgrown(questions: Sequence[Question], answered: Sequence[str]) -> list[str]:
    """Name the conversations that outgrew the model's context.

    Args:
        questions: What was asked.
        answered: Names of the rows that there are.
    """
    known = set(answered)
    missing = [each.row_id for each in questions if each.row_id not in known]
    if not missing:
        return []
    more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    return [
        f"{len(missing)} conversations were left out, since they outgrew the model's "
        f"context before their last turn: {', '.join(missing[:NAMED])}{more}."
    ]
