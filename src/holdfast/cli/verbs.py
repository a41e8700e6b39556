"""The verbs. Each turns flags into settings, runs a stage, and shows its result."""

from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from cyclopts import App

from holdfast.audit.settings import AuditSettings
from holdfast.cli import show as cli_show
from holdfast.cli.evaluate_verbs import evaluate, export, judge
from holdfast.cli.gate import Conditions, IfNull, check_asked, exit_status
from holdfast.cli.method_verbs import (
    ABLATE,
    HEADS,
    Ablating,
    Ranking,
    ablate,
    bake,
    finetune,
    guard,
    heads,
    select,
    signal,
    sinks,
    transfer,
)
from holdfast.cli.options import (
    MODEL,
    Flat,
    Json,
    Judging,
    Loading,
    Output,
    default_study,
    in_study,
    show,
)
from holdfast.cli.organism_verbs import organism
from holdfast.errors import AdapterError
from holdfast.judges.settings import BY_RULES
from holdfast.report import terminal
from holdfast.rollout.settings import ProbeSettings, RolloutSettings, TraceSettings

Asking = Annotated[RolloutSettings, Flat]
Fitting = Annotated[ProbeSettings, Flat]
Tracing = Annotated[TraceSettings, Flat]
ROLLOUT, PROBE = RolloutSettings(), ProbeSettings()
TRACE = TraceSettings()
DEFAULT_MODEL = "organism:cliff"
app = App(
    name="holdfast",
    help="Find where a language model's refusal lets go.",
    help_epilogue=(
        "Every verb takes --config FILE, a TOML file with a table a verb.\n\n"
        "Exit status: 0 done; 1 --fail-if applies; 2 bad input; 3 the model does not "
        "fit; 4 not enough evidence, also for --fail-if; 5 disk or network; 130 "
        "interrupted, run the same command again to continue."
    ),
    version=lambda: version("holdfast"),
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
app.command(organism)
app.command(judge)
app.command(guard)


@app.command
def audit(
    model: str = DEFAULT_MODEL,
    /,
    *,
    asking: Asking = ROLLOUT,
    fitting: Fitting = PROBE,
    tracing: Tracing = TRACE,
    ranking: Ranking = HEADS,
    ablating: Ablating = ABLATE,
    heads: bool = True,
    judging: Judging = BY_RULES,
    loading: Loading = MODEL,
    output: Output = None,
    json: Json = False,
    fail_if: Conditions = (),
    if_null: IfNull = "fail",
) -> int:
    """Find out whether a model's refusal is lost at the end of its thinking.

    Runs rollout, probe, trace, heads, ablate and report. Run it again to continue
    or to refresh.

    Args:
        model: organism:NAME, a model directory, or a Hub id.
        asking: Prompts and sampling.
        fitting: The probe.
        tracing: The trace.
        ranking: The ranking of heads.
        ablating: Which heads are switched off, where, on how many prompts.
        heads: Whether single heads are looked at.
        judging: The judge of rollouts and ablations.
        loading: The model.
        output: The study. Default: studies/MODEL-DATE.
        json: Print the report as JSON, and nothing else, on stdout.
        fail_if: Exit with status 1 if the verdict says so; may be repeated.
        if_null: Where --fail-if asks and the verdict is null: fail with status 4, or
            pass with a warning.
    """
    from holdfast.audit import stage

    check_asked(fail_if, with_heads=heads)
    settings = AuditSettings(
        asking, fitting, tracing, ranking, ablating, heads, judging
    )
    place = output or default_study(model)
    report = in_study(place, model, loading, partial(stage.run, settings=settings))
    page = place / "report.html"
    show(json, report, cli_show.print_report, lies=("report", page))
    return exit_status(report["verdict"], fail_if, if_null)


@app.command
def rollout(
    model: str = DEFAULT_MODEL,
    /,
    *,
    asking: Asking = ROLLOUT,
    judging: Judging = BY_RULES,
    loading: Loading = MODEL,
    output: Output = None,
    json: Json = False,
) -> None:
    """Ask every prompt, keep and judge every answer; the first stage of an audit.

    Another judge judges the same answers anew.

    Args:
        model: organism:NAME, a model directory, or a Hub id.
        asking: Prompts and sampling.
        judging: The judge.
        loading: The model.
        output: The study. Default: studies/MODEL-DATE.
        json: Print the counts as JSON, and nothing else, on stdout.
    """
    from holdfast.rollout import stage

    place = output or default_study(model)
    summary = in_study(
        place, model, loading, partial(stage.run, settings=asking, judge=judging)
    )
    show(json, summary, cli_show.print_counts, lies=("study", place))


@app.command
def probe(
    study: Path,
    /,
    *,
    fitting: Fitting = PROBE,
    loading: Loading = MODEL,
    json: Json = False,
) -> None:
    """Fit the refusal probe and its control on a study with rollouts.

    Args:
        study: The study.
        fitting: The probe.
        loading: The model; the study's own by default.
        json: Print the figures as JSON, and nothing else, on stdout.
    """
    from holdfast.cliff import fit as stage

    figures = in_study(study, None, loading, partial(stage.run, settings=fitting))
    show(json, figures, lambda found: terminal.print_figures("Probe", found))


@app.command
def trace(
    study: Path,
    /,
    *,
    tracing: Tracing = TRACE,
    loading: Loading = MODEL,
    json: Json = False,
) -> None:
    """Read the probe at every token of the held-out answers of a study.

    Args:
        study: The study.
        tracing: The trace.
        loading: The model; the study's own by default.
        json: Print the figures as JSON, and nothing else, on stdout.
    """
    from holdfast.cliff import trace as stage

    found = in_study(study, None, loading, partial(stage.run, settings=tracing))
    show(json, found, cli_show.print_trace)


@app.command
def report(study: Path, /, *, json: Json = False) -> None:
    """Put everything a study has found into report.json and report.html.

    Args:
        study: The study.
        json: Print the report as JSON, and nothing else, on stdout.
    """
    from holdfast.audit import stage

    found = in_study(study, None, MODEL, stage.write_report)
    page = study / "report.html"
    show(json, found, cli_show.print_report, lies=("report", page))


@app.command
def compare(
    first: Path,
    second: Path,
    /,
    *,
    output: Output = None,
    json: Json = False,
) -> None:
    """Set two studies side by side.

    Args:
        first: A study, or its report.json.
        second: Another.
        output: An HTML page to write.
        json: Print the comparison as JSON, and nothing else, on stdout.
    """
    from holdfast.audit import stage

    found = stage.compare_studies(first, second, output)
    show(json, found, cli_show.print_comparison)


@app.command
def doctor(
    model: str = DEFAULT_MODEL,
    /,
    *,
    loading: Loading = MODEL,
    json: Json = False,
) -> None:
    """Load a model and show what was proved about it.

    Args:
        model: organism:NAME, a model directory, or a Hub id.
        loading: The model.
        json: Print the proofs as JSON, and nothing else, on stdout.
    """
    from holdfast.audit import stage
    from holdfast.rollout.session import Session

    session = Session(model, loading, terminal.Shown())
    try:
        found = stage.check_model(session)
    except AdapterError as error:
        if error.proofs:
            show(json, stage.refused(session, error), cli_show.print_proofs)
        raise
    show(json, found, cli_show.print_proofs)


_VERBS = (heads, ablate, bake, transfer, evaluate, export, select, finetune)
for _verb in (*_VERBS, sinks, signal):
    app.command(_verb)
