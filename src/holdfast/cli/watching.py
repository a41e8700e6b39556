"""The verbs that watch a response step by step: the signal, and detectors on it."""

from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from holdfast.cli import showing_signal as showing
from holdfast.cli.studies import MODEL, Flat, Json, Loading, in_study, show
from holdfast.session.signal_settings import (
    GuardEvaluateSettings,
    GuardFitSettings,
    SignalSettings,
)

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
    from holdfast.stages import signal as stage

    found = in_study(study, None, loading, partial(stage.run, settings=watching))
    show(json, found, showing.print_signal)


@guard.command
def fit(study: Path, /, *, fitting: Fitting = FIT, json: Json = False) -> None:
    """Fit detectors on the signal of benign answers, and set their thresholds.

    Args:
        study: The study, with a signal.
        fitting: Rates of false positives, and how many rows are needed.
        json: Print what was fitted as JSON, and nothing else, on stdout.
    """
    from holdfast.stages import guard as stage

    found = in_study(study, None, MODEL, partial(stage.fit, settings=fitting))
    show(json, found, showing.print_fitted)


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
    from holdfast.stages import guard as stage

    work = partial(stage.evaluate, settings=trying, others=others)
    show(json, in_study(study, None, MODEL, work), showing.print_evaluated)
