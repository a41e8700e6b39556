"""The verbs of evaluation: evaluate, export and judge."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App

from holdfast.cli.options import (
    DEFAULT_MODEL,
    ENGINE,
    JUDGE,
    MODEL,
    Drawn,
    Json,
    Judging,
    Loading,
    ModelName,
    Output,
    StudyPath,
    Switch,
    about,
    default_study,
    in_study,
    show,
    written,
)
from holdfast.errors import SettingsError
from holdfast.evaluate.settings import EvaluateSettings
from holdfast.flags import Texts, flat

Suites = Annotated[EvaluateSettings, flat("Prompts")]
SUITES = EvaluateSettings()
Labels = Annotated[
    Texts,
    about("A file of answers that people have judged; may be repeated.", "Prompts"),
]
Worst = Annotated[int, about("How many of the worst mistakes are listed.", "Judge")]
Seed = Annotated[int, about("Seed of the intervals.", "Judge")]
Listed = Annotated[
    bool,
    Switch,
    about("List suites and attacks, and do nothing else.", "Output", name="--list"),
]
Format = Annotated[
    Literal["inspect"], about("inspect, for a log that `inspect view` opens.", "Output")
]
Folder = Annotated[
    Path | None,
    written("Folder to write to. Default: the folder `inspect` of the study."),
]
Judge = Annotated[
    str,
    about("rules, guard: and a guard model, or the URL of a chat server."),
]
judge = App(
    name="judge", help="Judges: compare them with people, or judge answers anew."
)


def evaluate(
    model: ModelName = DEFAULT_MODEL,
    /,
    *,
    asking: Suites = SUITES,
    judging: Judging = JUDGE,
    engine: Drawn = ENGINE,
    loading: Loading = MODEL,
    output: Output = None,
    list_: Listed = False,
    json: Json = False,
) -> None:
    """Measure attack success, over-refusal and utility on suites, side by side.

    Answers are drawn first and judged then. Run it again to continue; another judge
    judges the same answers anew. For example, `holdfast evaluate organism:cliff
    --suite authored --attack all --limit 50 -o studies/suites`.
    """
    if list_:
        from holdfast.evaluate.panel import known

        return show(json, known(), "evaluate.panel:suites_and_attacks")
    place = output or default_study(model)
    given: dict[str, Any] = {"engine": engine, "settings": asking, "flags": judging}
    block = in_study(place, model, loading, "evaluate.stage:run", **given)
    return _reported(place, block, json)


@judge.command
def calibrate(
    judge: Judge = "rules",
    /,
    *,
    labels: Labels,
    judging: Judging = JUDGE,
    worst: Worst = 10,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Compare a judge with people: agreement, confusion, and its worst mistakes.

    The record goes to the folder of --calibrations, where evaluations find it. For
    example, `holdfast judge calibrate rules --labels labelled.jsonl`.
    """
    from holdfast.evaluate import calibrate as stage
    from holdfast.report.terminal import Shown

    named = judge if judging.judge == JUDGE.judge else judging.judge
    if named != judge and judge != JUDGE.judge:
        raise SettingsError("one judge", f"{judge} and {named}", "Name it once.")
    settings = stage.CalibrateSettings(
        labels,
        replace(judging, judge=named),
        worst=worst,
        seed=seed,
        output=judging.calibrations,
    )
    record = stage.run(settings, Shown())
    show(json, record, "evaluate.panel:calibration")


@judge.command
def rerun(study: StudyPath, /, *, judging: Judging = JUDGE, json: Json = False) -> None:
    """Judge the answers of an evaluation anew, with another judge; needs no model.

    The answers of an audit are judged anew by the same `holdfast audit`, or
    `holdfast rollout`, with another --judge. For example, `holdfast judge rerun
    studies/suites --judge http://localhost:8000/v1 --judge-model NAME`.
    """
    from holdfast.evaluate.stage import judge as judged
    from holdfast.report.terminal import Shown
    from holdfast.study import Study

    opened = Study.open(study)
    with opened.lock():
        block = judged(opened, judging, Shown())
    _reported(study, block, json)


def export(
    study: StudyPath,
    /,
    *,
    to: Format = "inspect",
    output: Folder = None,
    json: Json = False,
) -> None:
    """Write an evaluation in the format of another tool.

    For example, `holdfast export studies/suites --to inspect`.
    """
    from holdfast.evaluate.inspect_log import run

    files = [str(path) for path in run(study, to, output)]
    show(json, {"files": files}, "audit.panel:files")


def _reported(place: Path, block: Any, json: bool) -> None:
    """Refresh the report of the study, and print the evaluation."""
    in_study(place, None, MODEL, "audit.stage:write_report")
    page = place / "report.html"
    show(json, block, "evaluate.panel:print_evaluation", report=page)
