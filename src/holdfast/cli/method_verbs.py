"""The verbs of single methods: heads, select, finetune, sinks, signal and guard."""

from pathlib import Path
from typing import Annotated

from holdfast.cli.options import (
    MODEL,
    Json,
    Loading,
    about,
    default_study,
    in_study,
    show,
    written,
)
from holdfast.errors import SettingsError
from holdfast.flags import Several, flat
from holdfast.sinks.settings import SinksSettings

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
    show(json, found, "heads.panel:print_transfer")


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
