"""The verbs that mend a model: choose rows, train on them, watch what training does."""

from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from holdfast.cli import showing, showing_mending
from holdfast.cli.studies import (
    MODEL,
    Flat,
    Json,
    Loading,
    Output,
    default_study,
    in_study,
    show,
)
from holdfast.errors import SettingsError
from holdfast.session.evaluating import JudgeFlags
from holdfast.session.finetune_settings import FinetuneSettings
from holdfast.session.select_settings import SelectSettings
from holdfast.session.sink_settings import SinksSettings

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
    Several processes may share a pool, one an accelerator.

    Args:
        model: organism:NAME, a model directory, or a Hub id.
        choosing: Pool, selector and budget.
        output: A JSONL file for the chosen rows.
        judging: The judge, for selectors that ask one.
        loading: The model.
        json: Print the record as JSON, and nothing else, on stdout.
    """
    from holdfast.session.context import Session
    from holdfast.stages import select as stage

    session = Session(model, loading, showing.Shown())
    found = stage.run(choosing, judging, session, output)
    show(json, found, showing_mending.print_selection)


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
    from holdfast.session.context import Session
    from holdfast.stages import finetune as stage

    session = Session(model, loading, showing.Shown())
    found = stage.run(training, session, output)
    show(json, found, showing_mending.print_finetuned)


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
    from holdfast.stages import report
    from holdfast.stages import sinks as stage

    if not models:
        raise SettingsError("a model", "none", "Name one: `holdfast sinks MODEL …`.")
    last = stage.last_of(models)
    place = output or default_study(last)
    work = partial(stage.run, settings=measuring, models=models)
    found = in_study(place, last, loading, work)
    in_study(place, None, MODEL, report.run)
    show(json, found, showing_mending.print_sinks)
    if not json:
        showing.print_lines("", f"The report lies in {place / 'report.html'}")
