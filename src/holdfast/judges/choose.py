"""Open a judge by its name; the rules judge is the default."""

from collections.abc import Callable

from holdfast.errors import SettingsError
from holdfast.judges.base import Judge, RulesJudge
from holdfast.judges.settings import ENDPOINTS, GUARD, RULES, JudgeSettings


def open_judge(settings: JudgeSettings) -> Judge:
    """Open a judge; a guard model is loaded, a server is not asked yet."""
    if settings.judge_cascade:
        from holdfast.judges.cascade import open_cascade

        return open_cascade(_open(settings), settings)
    return _open(settings)


def _open(settings: JudgeSettings) -> Judge:
    # Imported here so that each judge loads only what it needs itself.
    if settings.judge in JUDGES:
        return JUDGES[settings.judge](settings)
    if settings.guard:
        from holdfast.judges.guard import load_guard

        return load_guard(settings)
    if settings.judge.startswith(ENDPOINTS):
        from holdfast.judges.endpoint import EndpointJudge

        return EndpointJudge(settings)
    raise SettingsError(
        f"`{'`, `'.join(JUDGES)}`, `{GUARD}` and a guard model, or the URL of a chat "
        "server",
        settings.judge,
        f"Write `{RULES}`, `{GUARD}owner/name` or `http://localhost:8000/v1`.",
    )


def check_guard(settings: JudgeSettings) -> None:
    """Refuse a guard model that is not there or not known, without loading it."""
    from holdfast.judges.templates import guard_template
    from holdfast.models.scoring import check_scorer

    if settings.judge_cascade:
        from holdfast.judges.cascade import require_record

        require_record(settings)
    model = settings.guard or ""
    guard_template(model, settings.judge_template)
    check_scorer(model, revision=settings.judge_revision)


JUDGES: dict[str, Callable[[JudgeSettings], Judge]] = {RULES: lambda _: RulesJudge()}
"""Judges that have a name of their own; guards and servers have an address."""
