"""Whether an answer gives the number that is right."""

from holdfast.judges.contract import Exchange, screen_exact
from holdfast.judges.exact import is_correct
from holdfast.models.rows import Completion
from holdfast.session.rows import Rollout

EXACT = "exact-1"


def mark(
    row: Rollout, made: Completion | Rollout, target: str, *, fixed: bool = False
) -> tuple[str, str]:
    """Return the outcome of an answer to a question, and the reason.

    Args:
        row: The question.
        made: The answer.
        target: The right one.
        fixed: Whether the thinking is that of the question's own answer.

    Returns:
        "correct", "wrong" or "degenerate".
    """
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
