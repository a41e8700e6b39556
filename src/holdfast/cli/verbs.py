"""The verbs. Each turns flags into settings, runs a stage, and shows its result."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from cyclopts import App

from holdfast.audit.settings import AuditSettings
from holdfast.cli.evaluate_verbs import evaluate, export, judge
from holdfast.cli.gate import Conditions, IfNull, check_asked, exit_status
from holdfast.cli.method_verbs import (
    bake,
    finetune,
    guard,
    probe_transfer,
    select,
    sinks,
)
from holdfast.cli.options import (
    DEFAULT_MODEL,
    MODEL,
    Json,
    Loading,
    ModelName,
    Output,
    StudyPath,
    about,
    default_study,
    in_study,
    show,
    study_verb,
    written,
)
from holdfast.cli.organism_verbs import organism
from holdfast.dynamics.settings import SignalSettings
from holdfast.errors import AdapterError
from holdfast.flags import flat
from holdfast.heads.settings import AblateSettings, HeadsSettings
from holdfast.rollout.settings import ProbeSettings, RolloutSettings, TraceSettings

Asking = Annotated[RolloutSettings, flat("Prompts")]
Fitting = Annotated[ProbeSettings, flat("Probe")]
Tracing = Annotated[TraceSettings, flat("Probe")]
Ranking = Annotated[HeadsSettings, flat("Heads")]
WithHeads = Annotated[bool, about("Whether single heads are looked at.", "Heads")]
Ablating = Annotated[AblateSettings, flat("Heads")]
ROLLOUT, PROBE, TRACE = RolloutSettings(), ProbeSettings(), TraceSettings()
HEADS, ABLATE = HeadsSettings(), AblateSettings()
app = App(
    name="holdfast",
    help="Find where a language model's refusal lets go.",
    help_epilogue=(
        "Every verb takes --config FILE, a TOML file with a table per verb.\n\n"
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
    model: ModelName = DEFAULT_MODEL,
    /,
    *,
    asking: Asking = ROLLOUT,
    fitting: Fitting = PROBE,
    tracing: Tracing = TRACE,
    ranking: Ranking = HEADS,
    ablating: Ablating = ABLATE,
    heads: WithHeads = True,
    loading: Loading = MODEL,
    output: Output = None,
    json: Json = False,
    fail_if: Conditions = (),
    if_null: IfNull = "fail",
) -> int:
    """Find out whether a model's refusal is lost at the end of its thinking.

    Runs rollout, probe, trace, heads, ablate and report. Run it again to continue
    or to refresh. For example, `holdfast audit organism:cliff --limit 60`.
    """
    check_asked(fail_if, with_heads=heads)
    settings = AuditSettings(asking, fitting, tracing, ranking, ablating, heads)
    place = output or default_study(model)
    report = in_study(place, model, loading, "audit.stage:run", settings=settings)
    show(json, report, "audit.panel:print_report", report=place / "report.html")
    return exit_status(report["verdict"], fail_if, if_null)


@app.command
def rollout(
    model: ModelName = DEFAULT_MODEL,
    /,
    *,
    asking: Asking = ROLLOUT,
    loading: Loading = MODEL,
    output: Output = None,
    json: Json = False,
) -> None:
    """Ask every prompt, keep and judge every answer; the first stage of an audit.

    For example, `holdfast rollout organism:cliff --limit 60 -o studies/cliff`.
    """
    place = output or default_study(model)
    counts = in_study(place, model, loading, "rollout.stage:run", settings=asking)
    show(json, counts, "audit.panel:counts", study=place)


@app.command
def report(study: StudyPath, /, *, json: Json = False) -> None:
    """Put everything a study has found into report.json and report.html.

    For example, `holdfast report studies/cliff`.
    """
    found = in_study(study, None, MODEL, "audit.stage:write_report")
    show(json, found, "audit.panel:print_report", report=study / "report.html")


@app.command
def compare(
    first: Annotated[Path, about("A study, or its report.json.")],
    second: Annotated[Path, about("Another.")],
    /,
    *,
    output: Annotated[Path | None, written("An HTML page to write.")] = None,
    json: Json = False,
) -> None:
    """Set two studies side by side.

    For example, `holdfast compare studies/before studies/after -o compare.html`.
    """
    from holdfast.audit.stage import compare_studies

    found = compare_studies(first, second, output)
    show(json, found, "audit.panel:comparison")


@app.command
def doctor(
    model: ModelName = DEFAULT_MODEL,
    /,
    *,
    loading: Loading = MODEL,
    json: Json = False,
) -> None:
    """Load a model and show what was proved about it.

    For example, `holdfast doctor organism:cliff`.
    """
    from holdfast.audit import stage
    from holdfast.report.terminal import Shown
    from holdfast.rollout.session import Session

    session = Session(model, loading, Shown())
    try:
        found = stage.check_model(session)
    except AdapterError as error:
        if error.proofs:
            show(json, stage.refused(session, error), "audit.panel:proofs")
        raise
    show(json, found, "audit.panel:proofs")


study_verb(
    app,
    "probe",
    ProbeSettings,
    "Probe",
    "cliff.fit:run",
    "audit.panel:probe",
    "Fit the refusal probe and its control on a study with rollouts.\n\n"
    "For example, `holdfast probe studies/cliff --folds 5`.",
)
study_verb(
    app,
    "trace",
    TraceSettings,
    "Probe",
    "cliff.trace:run",
    "audit.panel:trace",
    "Read the probe at every token of the held-out answers of a study.\n\n"
    "For example, `holdfast trace studies/cliff --window 64`.",
)
study_verb(
    app,
    "heads",
    HeadsSettings,
    "Heads",
    "heads.rank:run",
    "heads.panel:section",
    "Rank the heads of a study's model by what they take from refusal.\n\n"
    "The study has rollouts and a probe. For example, `holdfast heads studies/cliff "
    "--checked-heads 16`.",
)
study_verb(
    app,
    "ablate",
    AblateSettings,
    "Heads",
    "heads.ablate:run",
    "heads.panel:ablation",
    "Switch heads off on held-out prompts, beside nothing and random heads.\n\n"
    "The study has ranked heads. For example, `holdfast ablate studies/cliff "
    "--fractions 0.01 0.05`.",
)
study_verb(
    app,
    "signal",
    SignalSettings,
    "Signal",
    "dynamics.stage:run",
    "dynamics.panel:print_signal",
    "Read at every step whether an answer is nearer to complying or to refusing.\n\n"
    "The study has rollouts. For example, `holdfast signal studies/cliff --steps 32`.",
)
for _verb in (bake, evaluate, export, select, finetune, sinks):
    app.command(_verb)
app.command(probe_transfer, name="probe-transfer")
