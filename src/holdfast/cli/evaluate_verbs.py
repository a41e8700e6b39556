"""The verbs of evaluation: evaluate, export and judge."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from holdfast.cli.options import (
    MODEL,
    Flat,
    Json,
    Judging,
    Loading,
    default_study,
    in_study,
    show,
)
from holdfast.errors import SettingsError
from holdfast.evaluate.settings import EvaluateSettings, Several
from holdfast.judges.settings import BY_RULES
from holdfast.report import terminal

Output = Annotated[Path | None, Parameter(name=["--output", "-o"])]
Suites = Annotated[EvaluateSettings, Flat]
SUITES = EvaluateSettings()
DEFAULT_MODEL = "organism:cliff"
judge = App(name="judge", help="Judges: compare them with people, or judge again.")


def evaluate(
    model: str = DEFAULT_MODEL,
    /,
    *,
    asking: Suites = SUITES,
    judging: Judging = BY_RULES,
    loading: Loading = MODEL,
    output: Output = None,
    list_: Annotated[
        bool, Parameter(name="--list", negative=(), show_default=False)
    ] = False,
    json: Json = False,
) -> None:
    """Measure attack success, over-refusal and utility on suites, side by side.

    Answers are drawn first and judged then. Run it again to continue; another judge
    judges the same answers anew.

    Args:
        model: organism:NAME, a model directory, or a Hub id.
        asking: Suites, attacks and sampling.
        judging: The judge.
        loading: The model.
        output: The study. Default: studies/MODEL-DATE.
        list_: List the suites and the attacks, and do nothing else.
        json: Print the evaluation as JSON, and nothing else, on stdout.
    """
    if list_:
        return _list(json)
    from holdfast.evaluate import stage

    place = output or default_study(model)
    work = partial(stage.run, settings=asking, flags=judging)
    block = in_study(place, model, loading, work)
    return _reported(place, block, json)


@judge.command
def calibrate(
    judge: str = "rules",
    /,
    *,
    labels: Annotated[tuple[str, ...], Several],
    judging: Judging = BY_RULES,
    worst: int = 10,
    seed: int = 0,
    json: Json = False,
) -> None:
    """Compare a judge with people: agreement, confusion, and its worst mistakes.

    The record goes to the folder of --calibrations, where evaluations find it.

    Args:
        judge: rules, guard: and a guard model, or the URL of a chat server.
        labels: A file of answers that people have judged; may be repeated.
        judging: How the judge works.
        worst: How many of the worst mistakes are listed.
        seed: Seed of the intervals.
        json: Print the record as JSON, and nothing else, on stdout.
    """
    from dataclasses import replace

    from holdfast.evaluate import calibrate as stage
    from holdfast.evaluate import panel as evaluate_panel

    named = judge if judging.judge == BY_RULES.judge else judging.judge
    if named != judge and judge != BY_RULES.judge:
        raise SettingsError("one judge", f"{judge} and {named}", "Name it once.")
    settings = stage.CalibrateSettings(
        labels,
        replace(judging, judge=named),
        worst=worst,
        seed=seed,
        output=judging.calibrations,
    )
    record = stage.run(settings, terminal.Shown())
    show(json, record, evaluate_panel.print_calibration)


@judge.command
def again(study: Path, /, *, judging: Judging = BY_RULES, json: Json = False) -> None:
    """Judge the answers of an evaluation anew, with another judge; needs no model.

    Args:
        study: A study with an evaluation.
        judging: The judge.
        json: Print the evaluation as JSON, and nothing else, on stdout.
    """
    from holdfast.evaluate import stage
    from holdfast.study import Study

    opened = Study.open(study)
    with opened.lock():
        block = stage.judge(opened, judging, terminal.Shown())
    _reported(study, block, json)


def export(
    study: Path,
    /,
    *,
    to: Literal["inspect"] = "inspect",
    output: Output = None,
    json: Json = False,
) -> None:
    """Write an evaluation in the format of another tool.

    Args:
        study: A study with an evaluation.
        to: inspect, for a log that `inspect view` opens.
        output: Folder to write to. Default: the folder `inspect` of the study.
        json: Print the files as JSON, and nothing else, on stdout.
    """
    from holdfast.evaluate import inspect_log as stage

    files = [str(path) for path in stage.run(study, to, output)]
    show(json, {"files": files}, lambda found: terminal.print_lines(*found["files"]))


def _reported(place: Path, block: Any, json: bool) -> None:
    """Refresh the report of the study, and print the evaluation."""
    from holdfast.audit import stage
    from holdfast.evaluate import panel as evaluate_panel

    in_study(place, None, MODEL, stage.write_report)
    page = place / "report.html"
    show(json, block, evaluate_panel.print_evaluation, lies=("report", page))


def _list(json: bool) -> None:
    from holdfast.data.attacks import attacks
    from holdfast.data.suites import suites
    from holdfast.evaluate import panel as evaluate_panel

    known = {
        "suites": [
            {
                "name": suite.name,
                "about": suite.about,
                "files": list(suite.files),
                "hub": suite.hub,
                "revision": suite.revision or None,
                "sha256": list(suite.sha256),
                "licence": suite.licence,
                "note": suite.note,
            }
            for suite in suites().values()
        ],
        "attacks": [
            {"name": each.name, "family": each.family, "about": each.about}
            for each in attacks().values()
        ],
    }
    show(json, known, evaluate_panel.print_known)
