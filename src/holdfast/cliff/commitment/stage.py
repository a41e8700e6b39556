"""When was it decided? The parts of `holdfast decide`, run on the answers of a study.

A further part is a module with a function `run(opened) -> block`, which opens a stage
of its own (`opened.stage(...)`, so that it resumes and is not run twice), and a line in
`PARTS`: its key, whether the settings ask for it, and the function. Its block is kept
in the file `decide_KEY.json` that its stage writes, stands in the report as
`decide[KEY]`, and is shown by the function of the same key in `panel.PARTS`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from holdfast.cliff.commitment import curve, first_token
from holdfast.cliff.commitment.causes import swap_stage, use_stage
from holdfast.cliff.commitment.opened import Opened, open_study
from holdfast.cliff.commitment.settings import DecideSettings
from holdfast.judges.settings import BY_RULES, JudgeSettings
from holdfast.rollout.session import Session
from holdfast.study import Study


class Part(NamedTuple):
    """One question that `decide` asks."""

    key: str  # Its name in the block `decide` of the report.
    is_asked: Callable[[DecideSettings], bool]
    run: Callable[[Opened], dict[str, Any]]
    # Refuses what the study cannot answer, before any part has drawn anything.
    require: Callable[[Opened], None] = lambda _: None


PARTS = (
    Part(curve.KEY, lambda _: True, curve.run, curve.require),
    Part(first_token.KEY, lambda _: True, first_token.run),
    Part(
        swap_stage.KEY,
        lambda settings: bool(settings.swap),
        swap_stage.run,
        swap_stage.require,
    ),
    Part(
        use_stage.KEY, lambda settings: settings.use, use_stage.run, use_stage.require
    ),
)


def run(
    study: Study,
    settings: DecideSettings,
    session: Session,
    judge: JudgeSettings = BY_RULES,
) -> dict[str, Any]:
    """Ask when the outcomes of a study were decided; writes `decide_*.json`.

    Args:
        study: A study with judged rollouts.
        settings: Which answers are cut, and how many are drawn.
        session: The model, and where progress is told.
        judge: The judge of what is drawn; the study's own is the one to give.

    Returns:
        The block `decide` of the report: one block for each part that was asked for.

    Raises:
        InputError: If the study has no rollouts, or belongs to another model.
        TooFewExamplesError: If no harmful request was complied with, the thinking is
            too short to cut, too few answers are drawn for the interval, or the study
            lacks what a part needs.
        ThinkingFormatError: If the model does not think.
    """
    opened = open_study(study, settings, session, judge)
    asked = [part for part in PARTS if part.is_asked(settings)]
    for part in asked:
        part.require(opened)
    return {part.key: part.run(opened) for part in asked}
