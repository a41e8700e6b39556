"""Train a model on chosen rows, and write it as a stock model or adapter."""

import json
import math
import os
import shutil
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from holdfast.data.chat.rendering import rendering_record
from holdfast.finetune.material import Gathered, gather
from holdfast.finetune.settings import FinetuneSettings
from holdfast.finetune.targets import shown
from holdfast.finetune.trainer import Trained, require_trl, train
from holdfast.models.export import finetune_card
from holdfast.models.loading.files import ADAPTER_CONFIG, FINETUNE_RECORD
from holdfast.models.model import Adapter
from holdfast.rollout.session import ORGANISM, Session
from holdfast.study import (
    atomic_write_json,
    atomic_write_text,
    canonical_json,
    fingerprint,
    require_place,
)
from holdfast.study.files import require_empty, staging, writing

FORMAT = "holdfast-finetune/1"
LISTED = 5
SHOWN = 120


def run(settings: FinetuneSettings, session: Session, output: Path) -> dict[str, Any]:
    """Train a model and write it.

    Checkpoints lie in `<output>.checkpoints` while the run lasts; an interrupted run
    goes on from the last. A finished one with the same data and settings is told as
    done.

    Args:
        settings: Data, targets and optimisation.
        session: The model, which is changed in memory and let go of.
        output: Folder to write: a model, or a PEFT adapter over it.

    Returns:
        What lies in `holdfast_finetune.json`: data, settings, losses, versions.

    Raises:
        InputError: If the data cannot be read, or the folder holds something else.
        TooFewExamplesError: If no row is left, or too few harmless ones.
        EnvironmentProblem: If TRL is not installed.
        ModelError: If the loss is no longer a number.
    """
    trl = str(require_trl().__version__)
    output = output.expanduser().absolute()
    require_place(output, folder=True)
    session = _for_training(session, settings)
    adapter = session.adapter
    gathered = gather(settings, adapter)
    key = {
        "format": FORMAT,
        "base": asdict(adapter.identity),
        "rendering": rendering_record(adapter.tokenizer),
        "data": {name: each.record for name, each in gathered.sources.items()},
        "settings": _kept(settings),
    }
    mark = fingerprint(key)
    known = _finished(output, mark)
    if known is not None:
        session.progress.say(f"{output} is there and up to date.")
        return known
    require_empty(output)
    _tell(session, gathered)
    examples = [each for part in gathered.task.values() for each in part.examples]
    checkpoints = output.with_name(f"{output.name}.checkpoints")
    total = _total_steps(settings, len(examples))
    with session.progress.track("Training", total) as advance:
        at = 0

        def told(step: int, steps: int, loss: float) -> None:
            nonlocal at
            advance(step - at)
            at = step

        trained = train(
            adapter,
            examples,
            settings.recipe,
            checkpoints,
            fingerprint=mark,
            told=told,
            data=gathered.data,
            kept=None if settings.keep_checkpoints else 2,
            # It lies in a cache, under a name that neither PEFT nor others know.
            whole=session.name.startswith(ORGANISM),
        )
    record = key | {
        "fingerprint": mark,
        "directory": str(output),
        "steps": trained.steps,
        "resumed_at": trained.resumed_at,
        "losses": list(trained.losses),
        "versions": {"trl": trl}
        | {n: version(n) for n in ("holdfast", "torch", "transformers", "peft")},
    }
    _write(trained, output, record, adapter, settings)
    session.release()
    if trained.is_main and not settings.keep_checkpoints:
        shutil.rmtree(checkpoints, ignore_errors=True)
    return record


def _for_training(session: Session, settings: FinetuneSettings) -> Session:
    """Return the session with the arithmetic and the place that training wants."""
    chosen = session.settings
    if settings.recipe.method == "full" and chosen.dtype == "auto":
        # Small updates vanish in 16-bit weights; autocast does the rest.
        chosen = replace(chosen, dtype="float32")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and chosen.device == "auto":
        # Each process moves the model to a device of its own.
        chosen = replace(chosen, device="cpu")
    if chosen == session.settings:
        return session
    return Session(session.name, chosen, session.progress, directory=session.directory)


def _total_steps(settings: FinetuneSettings, n: int) -> int:
    """Return the optimiser steps of a run, for its bar."""
    recipe = settings.recipe
    if recipe.steps is not None:
        return recipe.steps
    world = int(os.environ.get("WORLD_SIZE", "1"))
    each = recipe.train_batch * recipe.accumulate * world
    return math.ceil(recipe.epochs * math.ceil(n / each))


def _kept(settings: FinetuneSettings) -> dict[str, Any]:
    """Return the settings on which the result depends; what is kept is no part of it.

    The options of a defense are written out, those not named too. Without a defense
    there is no word of it, and the fingerprint is what it was before there were any.
    """
    made: dict[str, Any] = json.loads(canonical_json(settings))
    aside = ("data", "benign", "defense_data", "defense_harmful", "keep_checkpoints")
    kept = {key: value for key, value in made.items() if key not in aside}
    del kept["recipe"]["defense_option"]
    if settings.recipe.defense != "none":
        kept["defense_options"] = asdict(settings.recipe.options())
    return kept


def _tell(session: Session, gathered: Gathered) -> None:
    for name, each in gathered.sources.items():
        use = "to train on" if name in gathered.task else "for the defense"
        session.progress.say(f"{name}: {each.record['used']} rows {use}")
        dropped = each.record.get("thinking_dropped", 0)
        if dropped:
            session.progress.warn(
                f"{name}: the thinking of {dropped} of {each.record['used']} rows is "
                "dropped, since the model has no thinking format; it is trained on "
                "their answers alone."
            )
        for why, entry in each.record["why"].items():
            session.progress.warn(
                f"{entry['rows']} rows left out ({why}), the first at "
                f"{', '.join(entry['places'][:LISTED])}"
            )
    rows = next((each.examples for each in gathered.task.values() if each.examples), ())
    if rows:
        masked, trained = shown(session.adapter.tokenizer, rows[0])
        session.progress.say(f"The first row, masked:  {_brief(masked)}")
        session.progress.say(f"The first row, trained: {_brief(trained)}")


def _brief(text: str) -> str:
    """Return a text as one line, its middle left out; what matters is at its ends."""
    if len(text) > 2 * SHOWN:
        return f"{text[:SHOWN]!r} … {text[-SHOWN:]!r}"
    return repr(text)


def _finished(output: Path, mark: str) -> dict[str, Any] | None:
    """Return the record of a run that is done, if it is this one."""
    try:
        known = json.loads((output / FINETUNE_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dict(known) if known.get("fingerprint") == mark else None


def _write(
    trained: Trained,
    output: Path,
    record: dict[str, Any],
    adapter: Adapter,
    settings: FinetuneSettings,
) -> None:
    """Write model or adapter, card and record; whole or not at all."""
    if not trained.is_main:
        # The weights of a distributed model are gathered by all of its processes.
        return trained.save(output)
    rows = [
        (name, f"{entry['used']} of {entry['rows']} rows of `{entry['source']}`")
        for name, entry in record["data"].items()
    ]
    for index, (name, text) in enumerate(rows):
        if dropped := record["data"][name].get("thinking_dropped", 0):
            rows[index] = (name, f"{text}, the thinking of {dropped} dropped")
    used = settings.recipe.used(trained.steps)
    if settings.system_prompt is not None:
        used |= {"system_prompt": json.dumps(settings.system_prompt)}
    with staging(output) as staged:
        with writing(output):
            trained.save(staged)
        card = finetune_card(
            adapter.identity,
            adapter=(staged / ADAPTER_CONFIG).is_file(),
            record=FINETUNE_RECORD,
            rows=rows,
            settings=used,
            thinks=adapter.thinking is not None,
            defense=record["settings"].get("defense_options"),
        )
        atomic_write_json(staged / FINETUNE_RECORD, record)
        atomic_write_text(staged / "README.md", card)
    return None
