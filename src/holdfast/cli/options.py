"""Flags that verbs share, how a verb opens a study, and how it shows a result."""

import datetime
import re
import tomllib
from collections.abc import Callable
from importlib import import_module, resources
from inspect import Parameter as Kind
from inspect import Signature
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from holdfast.engines.settings import HERE, EngineSettings
from holdfast.flags import GROUPS, flat
from holdfast.judges.settings import BY_RULES, JudgeSettings
from holdfast.rollout.settings import ModelSettings

VERBS = tomllib.loads(
    resources.files("holdfast.cli").joinpath("verbs.toml").read_text("utf-8")
)
DEFAULT_MODEL = "organism:cliff"
MODEL, JUDGE, ENGINE = ModelSettings(), BY_RULES, HERE
Switch = Parameter(negative=(), show_default=False)


def about(words: str, group: str | None = None, **more: Any) -> Parameter:
    """Return what help says of a flag, and in which group; of an argument, in none."""
    if group is not None:
        more["group"] = GROUPS[group]
    return Parameter(help=words, **more)


def written(words: str) -> Parameter:
    """Return the flag that says where a result goes."""
    return about(words, "Output", name=["--output", "-o"])


ModelName = Annotated[
    str,
    about(
        "organism:NAME, the directory of a model or of a LoRA adapter, a GGUF file, "
        "or a Hub id."
    ),
]
StudyPath = Annotated[Path, about("The study.")]
Loading = Annotated[ModelSettings, flat("Model")]
Judging = Annotated[JudgeSettings, flat("Judge")]
Drawn = Annotated[EngineSettings, flat("Engine")]
DRAWS: dict[str, tuple[Any, Any]] = {"engine": (Drawn, ENGINE)}
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


def add_verb(app: App, name: str, **more: tuple[Any, Any]) -> None:
    """Add a verb of `verbs.toml` to the program, or to the group of verbs it is of.

    `more`: Type and default of further flags, by the name that the stage knows.
    """
    row = VERBS[name]
    settings = named(row["settings"])
    flags: dict[str, tuple[Any, Any]] = {
        "settings": (Annotated[settings, flat(row["group"])], _default(settings))
    }
    if "writes" in row:
        where, words = row["writes"]
        flags[where] = (Annotated[Path, written(words)], Kind.empty)
    if "judges" in row:
        flags[row["judges"]] = (Judging, JUDGE)
    flags |= more | (DRAWS if row.get("draws") else {})
    if row.get("loads", True):
        flags["loading"] = (Loading, MODEL)
    if row["in"] == "new study":
        flags["output"] = (Output, None)
    flags["json"] = (Json, False)
    defaults = {key: default for key, (_, default) in flags.items()}

    def verb(first: Any = DEFAULT_MODEL, /, **given: Any) -> None:
        chosen = defaults | {"loading": MODEL} | given
        json, stage, lies = chosen.pop("json"), row["stage"], {}
        if row["in"] == "no study":
            found = with_model(first, stage=stage, **chosen)
        elif row["in"] == "study":
            found = in_study(first, None, stage=stage, **chosen)
        else:
            lies["study"] = chosen.pop("output") or default_study(first)
            found = in_study(lies["study"], first, stage=stage, **chosen)
        show(json, found, row["panel"], **lies)

    # The program reads the flags off the signature, which is this verb's own.
    named_study = ("study", StudyPath, Kind.empty)
    named_model = ("model", ModelName, Kind.empty)
    any_model = ("model", ModelName, DEFAULT_MODEL)
    places = {"study": named_study, "no study": named_model, "new study": any_model}
    word, kind, default = places[row["in"]]
    made = [Kind(word, Kind.POSITIONAL_ONLY, annotation=kind, default=default)]
    made += [
        Kind(key, Kind.KEYWORD_ONLY, annotation=kind, default=default)
        for key, (kind, default) in flags.items()
    ]
    verb.__signature__ = Signature(made)  # type: ignore[attr-defined]
    verb.__annotations__ = {each.name: each.annotation for each in made}
    example = f"For example, `{row['example']}`."
    words = f"{row['help']}\n\n{row.get('more', '').strip()} {example}"
    app.command(verb, name=name.split()[-1], help=words)


def _default(settings: Any) -> Any:
    """Return settings where nothing is said; none where a flag is required."""
    try:
        return settings()
    except TypeError:
        return Kind.empty


def with_model(model: str, loading: ModelSettings, stage: str, **given: Any) -> Any:
    """Run a stage with a model and without a study."""
    from holdfast.report.terminal import Shown
    from holdfast.rollout.session import Session

    session = Session(model, loading, Shown(), engine=given.pop("engine", ENGINE))
    return named(stage)(session=session, **given)


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
    `given`: What the stage takes beside the study and the session; `engine` says who
    draws answers.
    """
    from holdfast.report.terminal import Shown
    from holdfast.rollout.session import Session
    from holdfast.study import Study

    engine = given.pop("engine", ENGINE)
    study = Study.open(place) if model is None else Study.create(place)
    with study.lock():
        if model is None:
            session = Session.of(study, loading, Shown(), engine)
        else:
            session = Session(model, loading, Shown(), engine=engine)
            session.remember(study)
        return named(stage)(study, session=session, **given)


def show(json: bool, found: Any, panel: str, **lies: Path) -> None:
    """Print a result as JSON, or the section that a panel makes of it.

    `lies`: What was written where, told below.
    """
    from holdfast.report import terminal
    from holdfast.report.section import Section

    if json:
        return terminal.print_json(found)
    shown = named(panel)(found) or []
    for section in [shown] if isinstance(shown, Section) else shown:
        terminal.print_section(section)
    for name, place in lies.items():
        terminal.print_lines("", f"The {name} lies in {place}")
    return None
