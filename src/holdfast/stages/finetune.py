"""Train a model on chosen rows, and write it as a stock model or adapter."""

import json
import math
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from holdfast.data.pool import Pool, PoolRow
from holdfast.errors import InputError, TooFewExamplesError
from holdfast.models.card import finetune_card
from holdfast.models.parts import Adapter
from holdfast.models.staging import require_empty, staging, writing
from holdfast.session.context import Session
from holdfast.session.finetune_settings import FinetuneSettings
from holdfast.session.pool_scoring import PoolScorer, ScoreRules
from holdfast.study import (
    atomic_write_json,
    atomic_write_text,
    canonical_json,
    fingerprint,
)
from holdfast.training.targets import Example, example
from holdfast.training.trainer import Trained, require_trl, train

RECORD = "holdfast_finetune.json"
FORMAT = "holdfast-finetune/1"
LISTED = 5


@dataclass(frozen=True)
class Material:
    """Rows of one source that are trained on.

    Attributes:
        examples: Their sequences.
        record: What is said of the source.
    """

    examples: tuple[Example, ...]
    record: dict[str, Any]


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
    trl = require_trl()
    output = output.expanduser().absolute()
    session = _for_training(session, settings)
    adapter = session.adapter
    material = _gather(settings, adapter)
    key = {
        "format": FORMAT,
        "base": asdict(adapter.identity),
        "data": {name: each.record for name, each in material.items()},
        "settings": _kept(settings),
    }
    mark = fingerprint(key)
    known = _finished(output, mark)
    if known is not None:
        session.progress.say(f"{output} is there and up to date.")
        return known
    require_empty(output)
    _tell(session, material)
    examples = [each for part in material.values() for each in part.examples]
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
    _write(trained, output, record, adapter)
    session.release()
    if trained.is_main:
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
    return Session(session.name, chosen, session.progress)


def _total_steps(settings: FinetuneSettings, n: int) -> int:
    """Return the optimiser steps of a run, for its bar."""
    recipe = settings.recipe
    if recipe.steps is not None:
        return recipe.steps
    world = int(os.environ.get("WORLD_SIZE", "1"))
    each = recipe.train_batch * recipe.accumulate * world
    return math.ceil(recipe.epochs * math.ceil(n / each))


def _kept(settings: FinetuneSettings) -> dict[str, Any]:
    """Return the settings on which the result depends; paths are no part of it."""
    made: dict[str, Any] = json.loads(canonical_json(settings))
    return {key: value for key, value in made.items() if key not in ("data", "benign")}


def _gather(settings: FinetuneSettings, adapter: Adapter) -> dict[str, Material]:
    """Read the rows, and mix in harmless ones at the ratio that was asked for."""
    safety = _read("data", settings.data, settings, adapter, None)
    material = {"data": safety}
    if settings.benign is not None:
        n = round(settings.benign_ratio * len(safety.examples))
        material["benign"] = _read("benign", settings.benign, settings, adapter, n)
    return material


def _read(
    name: str,
    source: str,
    settings: FinetuneSettings,
    adapter: Adapter,
    n: int | None,
) -> Material:
    """Return the rows of a source that fit the model: all, or `n` drawn at random."""
    pool = Pool(source, settings.columns())
    scorer = PoolScorer(adapter, None, ScoreRules(system_prompt=settings.system_prompt))
    stop, loss = _stop_token(adapter), settings.recipe.loss
    made: dict[int, Example] = {}
    left: dict[str, list[str]] = {}
    for row in _offered(pool, n, settings.recipe.seed):
        if len(made) == n:
            break
        found = scorer.render(row)
        if found.conversation is None:
            left.setdefault(str(found.kind), []).append(row.place)
        elif len(found.conversation.token_ids) == adapter.max_positions:
            left.setdefault("no room for the stop token", []).append(row.place)
        else:
            made[row.row] = example(found.conversation, loss, stop=stop)
    _require(name, source, len(made), 1 if n is None else n, left)
    record = {
        "source": Path(source).name,
        "sha256": pool.survey.sha256,
        "rows": pool.survey.n_rows,
        "used": len(made),
        "left_out": sum(map(len, left.values())),
        "why": {
            why: {"rows": len(places), "places": places} for why, places in left.items()
        },
    }
    # In the order of the source, whatever the order of the draw.
    return Material(tuple(made[number] for number in sorted(made)), record)


def _offered(pool: Pool, n: int | None, seed: int) -> Iterator[PoolRow]:
    """Yield all rows in their order, or all in a random order, `n` and a few at once.

    A draw reads little more of a long source than it needs: rows that are not wanted
    are neither parsed nor tokenised.
    """
    if n is None:
        yield from pool.rows(lambda number: True)
        return
    order = list(range(pool.survey.n_rows))
    random.Random(f"benign-{seed}").shuffle(order)
    step = n + n // 8 + 16
    for start in range(0, len(order), step):
        wanted = order[start : start + step]
        found = {row.row: row for row in pool.rows(set(wanted).__contains__)}
        yield from (found[number] for number in wanted)


def _require(
    name: str, source: str, found: int, least: int, left: dict[str, list[str]]
) -> None:
    if found >= least:
        return
    why = ", ".join(f"{len(places)} {kind}" for kind, places in left.items())
    raise TooFewExamplesError(
        f"{least} rows of --{name} that can be trained on",
        f"{found} in `{source}`" + (f"; left out: {why}" if why else ""),
        "Give more rows, or lower --benign-ratio. A model that thinks is trained on "
        "rows with thinking: `holdfast select --thinking model --budget 100%` draws it."
        if name == "benign" or left
        else "Give more rows.",
    )


def _stop_token(adapter: Adapter) -> int:
    token = adapter.tokenizer.eos_token_id
    if token is None:
        raise InputError(
            "a tokenizer with a token that ends an answer",
            f"none with {adapter.identity.model_id}",
            "Add `eos_token` to the model's tokenizer_config.json.",
        )
    return int(token)


def _tell(session: Session, material: dict[str, Material]) -> None:
    for name, each in material.items():
        session.progress.say(f"{name}: {each.record['used']} rows to train on")
        for why, entry in each.record["why"].items():
            session.progress.warn(
                f"{entry['rows']} rows left out ({why}), the first at "
                f"{', '.join(entry['places'][:LISTED])}"
            )


def _finished(output: Path, mark: str) -> dict[str, Any] | None:
    """Return the record of a run that is done, if it is this one."""
    try:
        known = json.loads((output / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dict(known) if known.get("fingerprint") == mark else None


def _write(
    trained: Trained, output: Path, record: dict[str, Any], adapter: Adapter
) -> None:
    """Write model or adapter, card and record; whole or not at all."""
    if not trained.is_main:
        # The weights of a distributed model are gathered by all of its processes.
        return trained.save(output)
    lora = record["settings"]["recipe"]["method"] == "lora"
    rows = [
        (name, f"{entry['used']} of {entry['rows']} rows of `{entry['source']}`")
        for name, entry in record["data"].items()
    ]
    card = finetune_card(
        adapter.identity,
        adapter=lora,
        record=RECORD,
        rows=rows,
        settings=record["settings"]["recipe"] | {"steps": record["steps"]},
    )
    with staging(output) as staged:
        with writing(output):
            trained.save(staged)
        atomic_write_json(staged / RECORD, record)
        atomic_write_text(staged / "README.md", card)
    return None
