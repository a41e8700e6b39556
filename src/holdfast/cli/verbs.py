"""The verbs. Each turns flags into settings, runs a stage, and shows its result."""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App

from holdfast.audit.settings import AuditSettings
from holdfast.cli.evaluate_verbs import evaluate, export, judge
from holdfast.cli.gate import Conditions, IfNull, check_asked, exit_status
from holdfast.cli.options import (
    DEFAULT_MODEL,
    ENGINE,
    JUDGE,
    MODEL,
    VERBS,
    Drawn,
    Json,
    Judging,
    Loading,
    ModelName,
    Output,
    StudyPath,
    about,
    add_verb,
    default_study,
    in_study,
    show,
    with_model,
    written,
)
from holdfast.cli.organism_verbs import organism
from holdfast.errors import AdapterError, SettingsError
from holdfast.flags import Several, flat
from holdfast.guard.serve.settings import ServeSettings
from holdfast.heads.settings import AblateSettings, HeadsSettings
from holdfast.rollout.settings import ProbeSettings, RolloutSettings, TraceSettings
from holdfast.sinks.settings import SinksSettings

Asking = Annotated[RolloutSettings, flat("Prompts")]
Fitting = Annotated[ProbeSettings, flat("Probe")]
Tracing = Annotated[TraceSettings, flat("Probe")]
Ranking = Annotated[HeadsSettings, flat("Heads")]
WithHeads = Annotated[bool, about("Whether single heads are looked at.", "Heads")]
Ablating = Annotated[AblateSettings, flat("Heads")]
ROLLOUT, PROBE, TRACE = RolloutSettings(), ProbeSettings(), TraceSettings()
HEADS, ABLATE = HeadsSettings(), AblateSettings()
SERVING = ServeSettings()
SERVED_BY = ("fastapi", "httpx", "prometheus_client", "uvicorn")
Models = Annotated[
    str,
    about(
        "organism:NAME, model directories, or Hub ids; a folder with "
        "`checkpoint-N` folders stands for all of them."
    ),
]
Last = Annotated[
    Path | None,
    written("The study, which belongs to the last model. Default: studies/MODEL-DATE."),
]
Others = Annotated[
    tuple[Path, ...],
    Several,
    about(
        "Another study of the same model, read against the anchors of this one: other "
        "attacks, other benign domains; may be repeated.",
        "Detectors",
        name="--on",
    ),
]


app = App(
    name="holdfast",
    help="Find where a language model's refusal lets go.",
    help_epilogue=(
        "Every verb takes --config FILE, a TOML file with a table per verb.\n\n"
        "Exit status: 0 done; 1 --fail-if applies; 2 bad input; 3 the model does not "
        "fit, or what was made of it failed its check; 4 not enough evidence, also "
        "for --fail-if; 5 disk or network; 130 interrupted, run the same command "
        "again to continue."
    ),
    version=lambda: version("holdfast"),
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)


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
    judging: Judging = JUDGE,
    engine: Drawn = ENGINE,
    loading: Loading = MODEL,
    output: Output = None,
    json: Json = False,
    fail_if: Conditions = (),
    if_null: IfNull = "fail",
) -> int:
    """Find out whether a model's refusal is lost at the end of its thinking.

    Runs rollout, probe, trace, heads, ablate and report. Run it again to continue
    or to refresh. For example, `holdfast audit organism:cliff -o studies/cliff`.
    """
    check_asked(fail_if, with_heads=heads)
    stages = (asking, fitting, tracing, ranking, ablating)
    settings = AuditSettings(*stages, with_heads=heads, judge=judging)
    place = output or default_study(model)
    given: dict[str, Any] = {"engine": engine, "settings": settings}
    report = in_study(place, model, loading, "audit.stage:run", **given)
    show(json, report, "audit.panel:print_report", report=place / "report.html")
    return exit_status(report["verdict"], fail_if, if_null)


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


@app.command(name="probe-transfer")
def probe_transfer(
    study: Annotated[Path, about("The study whose held-out answers are read.")],
    other: Annotated[Path, about("The study whose probe is tried on them.")],
    /,
    *,
    loading: Loading = MODEL,
    json: Json = False,
) -> None:
    """Read the answers of one study through the probe of another, of one shape.

    For example, `holdfast probe-transfer studies/mended studies/cliff`.
    """
    from holdfast.study import Study

    given = {"other": Study.open(other)}
    found = in_study(study, None, loading, "cliff.transfer:run", **given)
    show(json, found, "heads.panel:transfer")


@app.command
def sinks(
    *models: Models,
    measuring: Annotated[SinksSettings, flat("Prompts")],
    output: Last = None,
    loading: Loading = MODEL,
    json: Json = False,
) -> None:
    """Compare how much heads look at the first token on harmful and reference text.

    Several models are the checkpoints of a run, in order. Run it again to continue.
    For example, `holdfast sinks organism:cliff --harmful harmful.jsonl --reference
    refused.jsonl`.
    """
    if not models:
        raise SettingsError("a model", "none", "Name one: `holdfast sinks MODEL …`.")
    from holdfast.sinks.stage import last_of

    last = last_of(models)
    place = output or default_study(last)
    given = {"settings": measuring, "models": models}
    found = in_study(place, last, loading, "sinks.stage:run", **given)
    in_study(place, None, MODEL, "audit.stage:write_report")
    show(json, found, "sinks.panel:section", report=place / "report.html")


guard = App(name="guard", help="Detectors on answers: fit, evaluate, and watch live.")


@guard.command
def serve(
    model: ModelName = DEFAULT_MODEL,
    /,
    *,
    serving: Annotated[ServeSettings, flat("Serving")] = SERVING,
    loading: Loading = MODEL,
) -> None:
    """Serve a model over HTTP, and watch every answer while it is written.

    The routes are OpenAI's. It goes down in order on SIGTERM. For example, `holdfast
    guard serve organism:cliff --guard bundles/cliff`.
    """
    missing = [name for name in SERVED_BY if find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"the packages of the extra `serve` ({', '.join(SERVED_BY)})",
            f"that {', '.join(missing)} is not installed",
            "Install them in the folder of Holdfast: `pip install '.[serve]'`.",
        )
    with_model(model, loading, "guard.serve.stage:run", settings=serving)


for _each in (organism, judge, guard, evaluate, export):
    app.command(_each)
for _name in VERBS:
    if " " not in _name:
        add_verb(app, _name)
add_verb(guard, "guard fit")
add_verb(guard, "guard evaluate", others=(Others, ()))
add_verb(guard, "guard bundle")
add_verb(guard, "guard live")
