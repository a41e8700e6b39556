"""The edits whose four cells are drawn, and what is drawn in each of them."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any, NamedTuple, TypeVar

import torch

from holdfast.cliff.commitment.causes.directions import (
    Fitted,
    before_norm,
    projected_out,
    read_fitted,
    read_probes,
    train_rows,
    unit,
)
from holdfast.cliff.commitment.causes.edited import (
    Item,
    edited_sampling,
    fits,
    n_draws,
    own_item,
)
from holdfast.cliff.commitment.causes.swap import CELLS, cell_name
from holdfast.cliff.commitment.opened import Opened
from holdfast.cliff.commitment.settings import SWAPS, Swap
from holdfast.cliff.held_out import BENIGN, HARMFUL, Prompts, choose_prompts
from holdfast.data.splits import Train
from holdfast.errors import (
    HoldfastError,
    InputError,
    SettingsError,
    TooFewExamplesError,
)
from holdfast.models.decoding.edits import DirectionEdit, Edit
from holdfast.models.interventions import Head, HeadEdit, Range, head_factors
from holdfast.rollout.edits import read_edit
from holdfast.rollout.rows import Rollout

Made = TypeVar("Made")
Maker = Callable[[Opened, Sequence[Rollout]], Made]
HEADS = "heads.parquet"
NO_TWIN = "no answer to the same request without the wrapper"
UNCLOSED = "the thinking under the edit did not close"
TOO_LONG = "no room for an answer behind the thinking"


class Kind(NamedTuple):
    """One kind of edit, ready to be made."""

    name: Swap
    edit: Callable[[Sequence[Range]], Edit] | None  # From end templates; None if none.
    # What is done while the other thinking is drawn; None where it is the thinking of
    # the same request without its wrapper.
    thinking: Edit | None
    about: dict[str, Any]  # What the report says of it.


def kinds_of(
    opened: Opened, rows: Sequence[Rollout]
) -> tuple[list[Kind], dict[str, str]]:
    """Return the edits that were asked for, and which of `all` cannot be made, and why.

    Raises:
        HoldfastError: If one cannot be made that was asked for by its name.
        InputError: If a file of heads or a layer that was given cannot be used.
    """
    make: dict[Swap, Maker[Kind]] = {
        "heads": _heads,
        "direction": _direction,
        "wrapper": _wrapper,
    }
    kinds, left_out = _each(opened, rows, make)
    for name, why in left_out.items():
        opened.session.progress.say(f"--swap {name} is left out: {why}")
    return kinds, left_out


def require_kinds(opened: Opened, rows: Sequence[Rollout]) -> None:
    """Look at what the edits need that were asked for, and make none.

    Raises:
        HoldfastError: If one lacks it that was asked for by its name, or all do.
    """
    needs: dict[Swap, Maker[Any]] = {
        "heads": _heads,
        "direction": _moved,
        "wrapper": _require_twins,
    }
    _each(opened, rows, needs)


def _each(
    opened: Opened,
    rows: Sequence[Rollout],
    made_by: Mapping[Swap, Maker[Made]],
) -> tuple[list[Made], dict[str, str]]:
    """Return what is made for each edit that was asked for, and what cannot be."""
    asked = opened.settings.swap
    found: list[Made] = []
    left_out: dict[str, str] = {}
    for name in SWAPS if "all" in asked else [each for each in SWAPS if each in asked]:
        try:
            found.append(made_by[name](opened, rows))
        except HoldfastError as error:
            # What was given by hand is not left out: it was meant, and is wrong.
            if name in asked or isinstance(error, InputError):
                raise
            left_out[name] = str(error)
    if not found:
        why = " ".join(f"{name}: {each}" for name, each in left_out.items())
        raise TooFewExamplesError(
            "an edit of --swap that can be made here",
            f"none. {why.rstrip('.')}",
            "Run `holdfast heads`, or add prompts under wrappers.",
        )
    return found, left_out


def _heads(opened: Opened, _: Sequence[Rollout]) -> Kind:
    adapter, settings = opened.session.adapter, opened.settings
    adapter.require("heads")
    if settings.edit is not None:
        found = read_edit(settings.edit, adapter)
        edit, about = found.edit, dict(found.record)
    else:
        heads = _top(opened)
        edit = HeadEdit(head_factors(adapter, heads))
        about = {"heads": [list(head) for head in heads], "factor": 0.0}
    return Kind("heads", lambda _: edit, edit, about)


def _top(opened: Opened) -> list[Head]:
    """Return the heads at the top of the study's ranking."""
    if not opened.study.path(HEADS).exists():
        raise TooFewExamplesError(
            "heads to switch off: a ranking, or a file given by --edit",
            "0 heads",
            "Run `holdfast heads` on the study first, or give --edit.",
        )
    table = opened.study.read_table(HEADS).sort_by("rank")
    share = Decimal(str(opened.settings.edit_fraction))
    count = math.ceil(share * table.num_rows)
    chosen = table.select(["layer", "head"]).slice(0, count).to_pylist()
    return [(row["layer"], row["head"]) for row in chosen]


class Moved(NamedTuple):
    """What a direction is fitted on, and after which layer it acts."""

    train: Train[Rollout]
    layer: int
    probe: torch.Tensor | None  # Where the direction is that of the probe.


def _moved(opened: Opened, rows: Sequence[Rollout]) -> Moved:
    adapter, settings = opened.session.adapter, opened.settings
    layer = adapter.n_layers // 2
    layer = layer if settings.direction_layer is None else settings.direction_layer
    if layer >= adapter.n_layers:
        raise SettingsError(
            f"--direction-layer from 0 to {adapter.n_layers - 1}",
            str(layer),
            "Choose a layer that the model has.",
        )
    _require_twins(opened, rows)
    train = train_rows(rows)
    if settings.direction != "probe":
        return Moved(train, layer, None)
    return Moved(train, layer, before_norm(adapter, _own_probe(opened)))


def _direction(opened: Opened, rows: Sequence[Rollout]) -> Kind:
    adapter, settings = opened.session.adapter, opened.settings
    train, layer, probe = _moved(opened, rows)
    fitted = read_fitted(adapter, train, [layer], opened.session.batch_size)
    along = fitted.difference(layer) if probe is None else probe
    edit = _edit_of(opened, along, layer, fitted)
    about = {
        "direction": settings.direction,
        "action": settings.direction_action,
        "layer": layer,
        "strength": settings.direction_strength,
    }
    return Kind(
        "direction", lambda ranges: replace(edit, ranges=tuple(ranges)), None, about
    )


def _own_probe(opened: Opened) -> torch.Tensor:
    try:
        return read_probes(opened).probe
    except InputError as error:
        raise TooFewExamplesError(
            "a probe whose direction can be moved along",
            error.found,
            "Run `holdfast probe` first, or give --direction mean_difference.",
        ) from error


def _edit_of(
    opened: Opened, along: torch.Tensor, layer: int, fitted: Fitted
) -> DirectionEdit:
    if opened.settings.direction_action == "remove":
        return projected_out(along, [layer], fitted)
    own = unit(along)
    gap = fitted.difference(layer) @ own
    amount = opened.settings.direction_strength * float(gap)
    return DirectionEdit((layer,), own.float()[None], 0.0, torch.tensor([amount]))


def _wrapper(opened: Opened, rows: Sequence[Rollout]) -> Kind:
    wrappers = _require_twins(opened, rows)
    return Kind("wrapper", None, None, {"wrappers": wrappers})


def _require_twins(opened: Opened, rows: Sequence[Rollout]) -> list[str]:
    """Return the wrappers that work, where their requests were asked plainly as well.

    Raises:
        TooFewExamplesError: If there are none.
    """
    prompts = choose_prompts(rows, opened.settings.swap_prompts)
    pairs = _twins(rows, asked_of(prompts))
    if not any(pairs[row.row_id] for row in prompts.harmful if row.wrapper):
        raise TooFewExamplesError(
            "held-out harmful prompts under a wrapper that works, whose request was "
            "asked plainly as well",
            "0 of them",
            "Add wrapped prompts with the `request_id` of a plain one.",
        )
    return [name for name in prompts.wrappers if name is not None]


def _twins(
    rows: Sequence[Rollout], wanted: Sequence[Rollout]
) -> dict[str, Rollout | None]:
    """Return the answer to the same request without its wrapper, for each row."""
    known = {
        (row.request_id, row.label, row.sample): row
        for row in rows
        if row.wrapper is None and row.closed and row.role in (*HARMFUL, *BENIGN)
    }
    return {
        row.row_id: known.get((row.request_id, row.label, row.sample)) for row in wanted
    }


def asked_of(prompts: Prompts) -> list[Rollout]:
    """Return the rows that are answered in four cells, harmful ones first."""
    return [*prompts.harmful, *prompts.benign]


Lost = dict[tuple[str, str], Counter[str]]
"""By edit and label: how many rows were lost, by reason."""


def items_of(
    opened: Opened,
    rows: Sequence[Rollout],
    prompts: Prompts,
    kinds: Sequence[Kind],
    thinking: Mapping[str, Mapping[str, Any]],
) -> tuple[list[Item], Lost]:
    """Return what is drawn in every cell, and the rows that have not all four."""
    sampling = edited_sampling(opened)
    draws = n_draws(opened, sampling)
    asked = asked_of(prompts)
    twins = _twins(rows, asked)
    made: list[Item] = []
    lost: Lost = {}
    for kind in kinds:
        for row in asked:
            if kind.thinking is None and row.wrapper is None:
                continue
            counter = lost.setdefault((kind.name, row.label), Counter())
            found = (
                _twin_cells(kind.name, row, twins[row.row_id])
                if kind.thinking is None
                else _edit_cells(kind.name, row, thinking[f"{kind.name}#{row.row_id}"])
            )
            if isinstance(found, str):
                counter[found] += 1
            elif not all(fits(opened, sampling, item) for item in found):
                counter[TOO_LONG] += 1
            else:
                made += [i._replace(draw=draw) for draw in range(draws) for i in found]
    return made, lost


def condition_of(kind: str, place: int) -> str:
    """Return the name of a cell of an edit, by its place in `CELLS`."""
    return f"{kind}/{cell_name(*CELLS[place])}"


def _edit_cells(kind: str, row: Rollout, other: Mapping[str, Any]) -> list[Item] | str:
    """Return the four cells of a row under an edit of the model."""
    if not other["closed"]:
        return UNCLOSED
    made = []
    for place, (thinking, _) in enumerate(CELLS):
        item = own_item(condition_of(kind, place), row, 0)
        if thinking == "other":
            ids = tuple(other["token_ids"])
            item = item._replace(
                token_ids=ids,
                template=(other["template_start"], len(ids)),
                thinking=other["thinking"],
            )
        made.append(item)
    return made


def _twin_cells(kind: str, row: Rollout, twin: Rollout | None) -> list[Item] | str:
    """Return the four cells of a wrapped row, beside its twin without the wrapper.

    The other thinking is the twin's. Where the edit is the wrapper's, it takes it off.
    """
    if twin is None:
        return NO_TWIN
    made = []
    for place, (thinking, edit) in enumerate(CELLS):
        thought = row if thinking == "own" else twin
        shown = twin if kind == "wrapper" and edit == "on" else row
        prompt = shown.token_ids[: shown.spans.prompt[1]]
        start, end = thought.spans.thinking[0], thought.spans.answer[0]
        length = thought.spans.end_template[1] - thought.spans.end_template[0]
        ids = (*prompt, *thought.token_ids[start:end])
        template = (len(ids) - length, len(ids))
        name = condition_of(kind, place)
        made.append(Item(name, row, 0, ids, template, shown.prompt, thought.thinking))
    return made
