"""The verbs that mend a model: choose the rows to train on, and train on them."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from holdfast.cli import showing, showing_mending
from holdfast.cli.studies import MODEL, Flat, Json, Loading, show
from holdfast.session.evaluating import JudgeFlags
from holdfast.session.finetune_settings import FinetuneSettings
from holdfast.session.select_settings import SelectSettings

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
