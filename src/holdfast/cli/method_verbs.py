"""The verbs of single methods: heads, select, finetune, sinks, signal and guard."""

from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from holdfast.cli.options import (
    MODEL,
    Flat,
    Json,
    Loading,
    Output,
    default_study,
    in_study,
    show,
    show_section,
)
from holdfast.dynamics.settings import (
    GuardEvaluateSettings,
    GuardFitSettings,
    SignalSettings,
)
from holdfast.errors import SettingsError
from holdfast.finetune.settings import FinetuneSettings
from holdfast.heads.settings import AblateSettings, BakeSettings, HeadsSettings
from holdfast.judges.settings import JudgeFlags
from holdfast.report import terminal
from holdfast.select.settings import SelectSettings
from holdfast.sinks.settings import SinksSettings

Ranking = Annotated[HeadsSettings, Flat]
Ablating = Annotated[AblateSettings, Flat]
Baking = Annotated[BakeSettings, Flat]
HEADS, ABLATE, BAKE = HeadsSettings(), AblateSettings(), BakeSettings()


def heads(
    study: Path,
    /,
    *,
    ranking: Ranking = HEADS,
    loading: Loading = MODEL,
    json: Json = False,
) -> None:
    """Rank the heads of a study's model by what they take from refusal.

    Args:
        study: The study, with rollouts and a probe.
        ranking: The ranking.
        loading: The model; the study's own by default.
        json: Print the block `heads` of the report as JSON, and nothing else.
    """
    from holdfast.heads import panel as showing
    from holdfast.heads import rank as stage

    found = in_study(study, None, loading, partial(stage.run, settings=ranking))
    show(json, found, showing.print_heads)


def ablate(
    study: Path,
    /,
    *,
    ablating: Ablating = ABLATE,
    loading: Loading = MODEL,
    json: Json = False,
) -> None:
    """Switch heads off on held-out prompts, beside nothing and random heads.

    Args:
        study: The study, with ranked heads.
        ablating: Which heads, where, on how many prompts.
        loading: The model; the study's own by default.
        json: Print the block `ablation` of the report as JSON, and nothing else.
    """
    from holdfast.heads import ablate as stage
    from holdfast.heads import panel as showing

    found = in_study(study, None, loading, partial(stage.run, settings=ablating))
    show(json, found, showing.print_ablation)


def bake(
    study: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    baking: Baking = BAKE,
    loading: Loading = MODEL,
    json: Json = False,
) -> None:
    """Write a model without the heads that let refusal go, if that mends it.

    The result is tried on held-out prompts. Where attack success rises, or more
    harmless requests are refused or answers broken than allowed, nothing is written
    and the exit status is 3.

    Args:
        study: The study, with ranked heads.
        output: Folder to write: an ordinary model directory.
        baking: Which heads, and what is tolerated.
        loading: The model; the study's own by default.
        json: Print the measured figures as JSON, and nothing else, on stdout.
    """
    from holdfast.heads import bake as stage
    from holdfast.heads import panel as showing

    work = partial(stage.run, settings=baking, directory=output)
    found = in_study(study, None, loading, work)
    show(json, found, showing.print_baked)


def transfer(
    study: Path, other: Path, /, *, loading: Loading = MODEL, json: Json = False
) -> None:
    """Read the answers of one study through the probe of another, of one shape.

    Args:
        study: The study whose held-out answers are read.
        other: The study whose probe is tried on them.
        loading: The model; the study's own by default.
        json: Print the figures as JSON, and nothing else, on stdout.
    """
    from holdfast.cliff import transfer as stage
    from holdfast.heads import panel as showing
    from holdfast.study import Study

    found = in_study(study, None, loading, partial(stage.run, other=Study.open(other)))
    show(json, found, showing.print_transfer)


Written = Annotated[Path, Parameter(name=["--output", "-o"])]
JUDGE = JudgeFlags()


def select(
    model: str,
    /,
    *,
    choosing: Annotated[SelectSettings, Flat],
    output: Written,
    judging: Annotated[JudgeFlags, Flat] = JUDGE,
    loading: Loading = MODEL,
    json: Json = False,
) -> None:
    """Choose the rows of a pool that are worth training on.

    Every row is scored with one prefill, shard by shard; run it again to continue.
    Several processes may share a pool, one per accelerator.

    Args:
        model: organism:NAME, a model directory, or a Hub id.
        choosing: Pool, selector and budget.
        output: A JSONL file for the chosen rows.
        judging: The judge, for selectors that ask one.
        loading: The model.
        json: Print the record as JSON, and nothing else, on stdout.
    """
    from holdfast.rollout.session import Session
    from holdfast.select import panel as select_panel
    from holdfast.select import stage

    session = Session(model, loading, terminal.Shown())
    found = stage.run(choosing, judging, session, output)
    show_section(json, found, select_panel.section)


def finetune(
    model: str,
    /,
    *,
    training: Annotated[FinetuneSettings, Flat],
    output: Written,
    loading: Loading = MODEL,
    json: Json = False,
) -> None:
    """Train a model on chosen rows, mixed with harmless ones.

    Run it again to continue from the last checkpoint. For several accelerators start
    it with `accelerate launch -m holdfast finetune …`.

    Args:
        model: organism:NAME, a model directory, or a Hub id.
        training: Data, targets and optimisation.
        output: Folder to write: a model, or a PEFT adapter.
        loading: The model.
        json: Print the record as JSON, and nothing else, on stdout.
    """
    from holdfast.finetune import panel as finetune_panel
    from holdfast.finetune import stage
    from holdfast.rollout.session import Session

    session = Session(model, loading, terminal.Shown())
    found = stage.run(training, session, output)
    show(json, found, finetune_panel.print_finetuned)


def sinks(
    *models: str,
    measuring: Annotated[SinksSettings, Flat],
    output: Output = None,
    loading: Loading = MODEL,
    json: Json = False,
) -> None:
    """Compare how much heads look at the first token on harmful and reference text.

    Several models are the checkpoints of a run, in order. Run it again to continue.

    Args:
        models: organism:NAME, model directories, or Hub ids; a folder with
            `checkpoint-N` folders stands for all of them.
        measuring: Texts and how they are compared.
        output: The study, which belongs to the last model. Default:
            studies/MODEL-DATE.
        loading: The models.
        json: Print the block `sinks` of the report as JSON, and nothing else.
    """
    from holdfast.audit import stage as audit_stage
    from holdfast.sinks import panel as sinks_panel
    from holdfast.sinks import stage

    if not models:
        raise SettingsError("a model", "none", "Name one: `holdfast sinks MODEL …`.")
    last = stage.last_of(models)
    place = output or default_study(last)
    work = partial(stage.run, settings=measuring, models=models)
    found = in_study(place, last, loading, work)
    in_study(place, None, MODEL, audit_stage.write_report)
    page = place / "report.html"
    show_section(json, found, sinks_panel.section, lies=("report", page))


Watching = Annotated[SignalSettings, Flat]
Fitting = Annotated[GuardFitSettings, Flat]
Trying = Annotated[GuardEvaluateSettings, Flat]
Others = Annotated[
    tuple[Path, ...],
    Parameter(name="--on", negative=(), consume_multiple=False, show_default=False),
]
SIGNAL, FIT, TRY = SignalSettings(), GuardFitSettings(), GuardEvaluateSettings()
guard = App(name="guard", help="Detectors on the step-wise signal: fit and evaluate.")


def signal(
    study: Path,
    /,
    *,
    watching: Watching = SIGNAL,
    loading: Loading = MODEL,
    json: Json = False,
) -> None:
    """Read at every step whether an answer is nearer to complying or to refusing.

    Args:
        study: The study, with rollouts.
        watching: Steps, mode and anchors.
        loading: The model; the study's own by default.
        json: Print the figures as JSON, and nothing else, on stdout.
    """
    from holdfast.dynamics import panel as dynamics_panel
    from holdfast.dynamics import stage

    found = in_study(study, None, loading, partial(stage.run, settings=watching))
    show_section(json, found, dynamics_panel.section)


@guard.command
def fit(study: Path, /, *, fitting: Fitting = FIT, json: Json = False) -> None:
    """Fit detectors on the signal of benign answers, and set their thresholds.

    Args:
        study: The study, with a signal.
        fitting: Rates of false positives, and how many rows are needed.
        json: Print what was fitted as JSON, and nothing else, on stdout.
    """
    from holdfast.guard import panel as guard_panel
    from holdfast.guard import stage

    found = in_study(study, None, MODEL, partial(stage.fit, settings=fitting))
    show_section(json, found, guard_panel.fitted_section)


@guard.command
def evaluate(
    study: Path,
    /,
    *,
    trying: Trying = TRY,
    others: Others = (),
    json: Json = False,
) -> None:
    """Try fitted detectors on attacks and on benign answers that no fit has seen.

    Args:
        study: The study, with detectors.
        trying: Attack families that a detector is chosen on.
        others: Another study of the same model, read against the anchors of this
            one: other attacks, other benign domains; may be repeated.
        json: Print the tables as JSON, and nothing else, on stdout.
    """
    from holdfast.guard import panel as guard_panel
    from holdfast.guard import stage

    work = partial(stage.evaluate, settings=trying, others=others)
    show_section(json, in_study(study, None, MODEL, work), guard_panel.section)
