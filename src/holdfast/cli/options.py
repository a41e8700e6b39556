"""Flags that verbs share, how a verb opens a study, and how it shows a result."""

import datetime
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from holdfast.flags import GROUPS, flat
from holdfast.judges.settings import JudgeFlags
from holdfast.rollout.settings import ModelSettings

DEFAULT_MODEL = "organism:cliff"
MODEL, JUDGE = ModelSettings(), JudgeFlags()
Switch = Parameter(negative=(), show_default=False)


def about(words: str, group: str | None = None, **more: Any) -> Parameter:
    """Return what help says of a flag, and in which group; of an argument, in none."""
    if group is not None:
        more["group"] = GROUPS[group]
    return Parameter(help=words, **more)


def written(words: str) -> Parameter:
    """Return the flag that says where a result goes."""
    return about(words, "Output", name=["--output", "-o"])


ModelName = Annotated[str, about("organism:NAME, a model directory, or a Hub id.")]
StudyPath = Annotated[Path, about("The study.")]
Loading = Annotated[ModelSettings, flat("Model")]
Judging = Annotated[JudgeFlags, flat("Judge")]
Output = Annotated[Path | None, written("The study. Default: studies/MODEL-DATE.")]
Json = Annotated[
    bool,
    Switch,
    about(
        "Print the result as JSON, and nothing else, on stdout.",
        "Output",
        name="--json",
    ),
]


def study_verb(
    app: App,
    name: str,
    settings: Any,
    group: str,
    stage: str,
    panel: str,
    words: str,
    *,
    loads: bool = True,
) -> None:
    """Add a verb that runs one stage in a study, and shows what it returns.

    `settings`: A class whose fields are flags, which help lists in the group.
    `stage`: Module and function, as `heads.rank:run`.
    `panel`: What shows the result, as `heads.panel:section`.
    `words`: What help says of the verb.
    `loads`: Whether flags say how the model is loaded.
    """
    Loads = Loading if loads else Annotated[ModelSettings, Parameter(parse=False)]
    Chosen = Annotated[settings, flat(group)]
    defaults = settings()

    def verb(
        study: StudyPath,
        /,
        *,
        settings: Chosen = defaults,
        loading: Loads = MODEL,  # type: ignore[valid-type]
        json: Json = False,
    ) -> None:
        show(json, in_study(study, None, loading, stage, settings=settings), panel)

    app.command(verb, name=name, help=words)


def default_study(model: str) -> Path:
    """Return where the study of a model lies if nothing else is said."""
    last = model.removeprefix("organism:").rstrip("/").split("/")[-1]
    name = re.sub(r"[^\w.-]+", "-", last).strip("-")
    day = datetime.date.today().isoformat()
    return Path("studies") / f"{name}-{day}"


def named(path: str) -> Callable[..., Any]:
    """Return a function of the package by its path, as `heads.rank:run`.

    It is loaded when a verb runs, so that help is there at once.
    """
    module, _, name = path.partition(":")
    found: Callable[..., Any] = getattr(import_module(f"holdfast.{module}"), name)
    return found


def in_study(
    place: Path, model: str | None, loading: ModelSettings, stage: str, **given: Any
) -> Any:
    """Open a study under its lock and run a stage in it.

    `model`: The model; None for that of a study that is there.
    `given`: What the stage takes beside the study and the session.
    """
    from holdfast.report.terminal import Shown
    from holdfast.rollout.session import Session
    from holdfast.study import Study

    study = Study.open(place) if model is None else Study.create(place)
    with study.lock():
        if model is None:
            session = Session.of(study, loading, Shown())
        else:
            session = Session(model, loading, Shown())
            session.remember(study)
        return named(stage)(study, session=session, **given)


def show(json: bool, found: Any, panel: str, **lies: Path) -> None:
    """Print a result as JSON, or the section that a panel makes of it.

    `lies`: What was written where, told below.
    """
    from holdfast.report import terminal

    if json:
        return terminal.print_json(found)
    section = named(panel)(found)
    if section is not None:
        terminal.print_section(section)
    for name, place in lies.items():
        terminal.print_lines("", f"The {name} lies in {place}")
    return None
