"""How a verb opens a study, and how it shows what a stage returns."""

import datetime
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from holdfast.report import terminal
from holdfast.report.section import Section
from holdfast.rollout.settings import ModelSettings

Flat = Parameter(name="*")
Loading = Annotated[ModelSettings, Flat]
Output = Annotated[Path | None, Parameter(name=["--output", "-o"])]
Json = Annotated[bool, Parameter(name="--json", negative=(), show_default=False)]
MODEL = ModelSettings()


def default_study(model: str) -> Path:
    """Return where the study of a model lies if nothing else is said."""
    last = model.removeprefix("organism:").rstrip("/").split("/")[-1]
    name = re.sub(r"[^\w.-]+", "-", last).strip("-")
    day = datetime.date.today().isoformat()
    return Path("studies") / f"{name}-{day}"


def in_study(
    place: Path,
    model: str | None,
    loading: ModelSettings,
    work: Callable[..., Any],
) -> Any:
    """Open a study under its lock and run a stage in it.

    Args:
        place: The study.
        model: The model; None for that of a study that is there.
        loading: How the model is loaded.
        work: Takes a study and a session.
    """
    from holdfast.rollout.session import Session
    from holdfast.study import Study

    study = Study.open(place) if model is None else Study.create(place)
    with study.lock():
        shown = terminal.Shown()
        if model is None:
            session = Session.of(study, loading, shown)
        else:
            session = Session(model, loading, shown)
            session.remember(study)
        return work(study, session=session)


def show(
    as_json: bool,
    value: Any,
    otherwise: Callable[[Any], None],
    *,
    lies: tuple[str, Path] | None = None,
) -> None:
    """Show a result as JSON, or as a person reads it, and say what lies where."""
    if as_json:
        terminal.print_json(value)
    else:
        otherwise(value)
        if lies is not None:
            terminal.print_lines("", f"The {lies[0]} lies in {lies[1]}")


def show_section(
    as_json: bool,
    value: Any,
    section: Callable[[Any], Section],
    *,
    lies: tuple[str, Path] | None = None,
) -> None:
    """Show a result as JSON, or as the section that a panel makes of it."""

    def printed(found: Any) -> None:
        terminal.print_section(section(found))

    show(as_json, value, printed, lies=lies)
