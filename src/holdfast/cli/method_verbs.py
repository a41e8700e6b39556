"""The verbs of single methods that take more than a study and its settings."""

from pathlib import Path
from typing import Annotated

from cyclopts import App

from holdfast.cli.options import (
    JUDGE,
    MODEL,
    Json,
    Judging,
    Loading,
    ModelName,
    StudyPath,
    about,
    default_study,
    in_study,
    show,
    study_verb,
    written,
)
from holdfast.dynamics.settings import GuardEvaluateSettings, GuardFitSettings
from holdfast.errors import SettingsError
from holdfast.finetune.settings import FinetuneSettings
from holdfast.flags import Several, flat
from holdfast.heads.settings import BakeSettings
from holdfast.select.settings import SelectSettings
from holdfast.sinks.settings import SinksSettings

Folder = Annotated[Path, written("Folder to write: a model, or a PEFT adapter.")]
Rows = Annotated[Path, written("A JSONL file for the chosen rows.")]
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
BAKE, TRY = BakeSettings(), GuardEvaluateSettings()
guard = App(name="guard", help="Detectors on the step-wise signal: fit and evaluate.")


def bake(
    study: StudyPath,
    /,
    *,
    output: Folder,
    baking: Annotated[BakeSettings, flat("Heads")] = BAKE,
    loading: Loading = MODEL,
    json: Json = False,
) -> None:
    """Write a model without the heads that let refusal go, if that mends it.

    The study has ranked heads. The result is tried on held-out prompts. Where attack
    success rises, or more harmless requests are refused or answers broken than
    allowed, nothing is written and the exit status is 3. For example, `holdfast bake
    studies/cliff -o mended --fraction 0.03`.
    """
    given = {"settings": baking, "directory": output}
    found = in_study(study, None, loading, "heads.bake:run", **given)
    show(json, found, "heads.panel:baked")


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


def select(
    model: ModelName,
    /,
    *,
    choosing: Annotated[SelectSettings, flat("Selection")],
    output: Rows,
    judging: Judging = JUDGE,
    loading: Loading = MODEL,
    json: Json = False,
) -> None:
    """Choose the rows of a pool that are worth training on.

    Every row is scored with one prefill, shard by shard; run it again to continue.
    Several processes may share a pool, one per accelerator. For example, `holdfast
    select organism:cliff --pool pool.jsonl --direction studies/cliff -o chosen.jsonl`.
    """
    from holdfast.report.terminal import Shown
    from holdfast.rollout.session import Session
    from holdfast.select import stage

    found = stage.run(choosing, judging, Session(model, loading, Shown()), output)
    show(json, found, "select.panel:print_selection")


def finetune(
    model: ModelName,
    /,
    *,
    training: Annotated[FinetuneSettings, flat("Prompts")],
    output: Folder,
    loading: Loading = MODEL,
    json: Json = False,
) -> None:
    """Train a model on chosen rows, mixed with harmless ones.

    Run it again to continue from the last checkpoint. For several accelerators start
    it with `accelerate launch -m holdfast finetune …`. For example, `holdfast finetune
    organism:cliff --data chosen.jsonl --benign harmless.jsonl -o adapter`.
    """
    from holdfast.finetune import stage
    from holdfast.report.terminal import Shown
    from holdfast.rollout.session import Session

    found = stage.run(training, Session(model, loading, Shown()), output)
    show(json, found, "finetune.panel:print_finetuned")


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


study_verb(
    guard,
    "fit",
    GuardFitSettings,
    "Detectors",
    "guard.stage:fit",
    "guard.panel:print_fitted",
    "Fit detectors on the signal of benign answers, and set their thresholds.\n\n"
    "The study has a signal. For example, `holdfast guard fit studies/cliff --rates "
    "0.01 0.05`.",
    loads=False,
)


@guard.command
def evaluate(
    study: StudyPath,
    /,
    *,
    trying: Annotated[GuardEvaluateSettings, flat("Detectors")] = TRY,
    others: Others = (),
    json: Json = False,
) -> None:
    """Try fitted detectors on attacks and on benign answers that no fit has seen.

    The study has detectors. For example, `holdfast guard evaluate studies/cliff --on
    studies/others`.
    """
    given = {"settings": trying, "others": others}
    found = in_study(study, None, MODEL, "guard.stage:evaluate", **given)
    show(json, found, "guard.panel:print_evaluated")
