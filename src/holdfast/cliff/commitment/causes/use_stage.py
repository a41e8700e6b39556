"""Is the probe what the model uses? Taken out beside controls, and read past masks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from holdfast.cliff.cliff import MIN_TOKENS
from holdfast.cliff.commitment.causes.directions import (
    PROBE_FILES,
    Probes,
    last_states,
    read_fitted,
    read_probes,
    train_rows,
)
from holdfast.cliff.commitment.causes.edited import (
    Item,
    draw_items,
    edited_sampling,
    fits,
    judge_items,
    n_draws,
    own_item,
)
from holdfast.cliff.commitment.causes.places import (
    CONTROL,
    PLAIN,
    READ,
    Place,
    described,
    edits_of,
    places_of,
)
from holdfast.cliff.commitment.causes.removals import removals_of
from holdfast.cliff.commitment.causes.word_masks import masked_scores
from holdfast.cliff.commitment.opened import ROLLOUTS, Opened
from holdfast.cliff.commitment.settings import file_of, stage_of
from holdfast.cliff.groups import COMPLIED, REFUSED
from holdfast.cliff.held_out import first_by_hash
from holdfast.cliff.openings import FirstToken, Known, openings
from holdfast.errors import TooFewExamplesError
from holdfast.judges.calibration import identity_record
from holdfast.models.decoding.edits import DirectionEdit, Edit
from holdfast.models.hidden_states import Site
from holdfast.models.model import Adapter
from holdfast.rollout.rows import Rollout, from_table, held_out
from holdfast.study.files import fingerprint

KEY, ANSWERS = "use", "use_answers"


def run(opened: Opened) -> dict[str, Any]:
    """Take the probe out of held-out answers; writes `decide_use.json`."""
    rows = from_table(opened.study.read_table(ROLLOUTS))
    chosen = _chosen(opened, rows)
    probes = _probes(opened)
    opened.session.check_same(opened.study)
    adapter, train = opened.session.adapter, train_rows(rows)
    sites: list[Site] = [*range(adapter.n_layers), "final_norm"]
    fitted = read_fitted(adapter, train, sites, opened.session.batch_size)
    n = opened.settings.random_directions
    places = places_of(adapter, fitted, probes, n, opened.seed)
    edits = edits_of(places, fitted, probes, n)
    answers = _answers(opened, rows, chosen, edits, places, openings(train))
    judge = opened.session.open_judge(opened.judge)
    key = {
        "judge": identity_record(judge.identity),
        "answers": opened.study.record(stage_of(ANSWERS))["fingerprint"],
        "masked_words": opened.settings.masked_words,
    }
    with opened.stage(KEY, key, PROBE_FILES) as stage:
        if stage.is_done:
            return stage.read_json(file_of(KEY))
        # Before judging, for which a guard model may take the place of the model.
        words = masked_scores(opened, rows, train)
        said = judge_items(opened, KEY, answers)
        refused = {row.row_id for row in chosen[REFUSED]}
        block = removals_of(said, refused, opened.seed)
        block["judge"] = key["judge"]
        block["draws"] = n_draws(opened, edited_sampling(opened))
        block |= described(fitted, probes, places)
        block["words"] = words
        return stage.write_json(file_of(KEY), block)


def require(opened: Opened) -> None:
    """Refuse a study without probe, or without answers to take it out of.

    Raises:
        HoldfastError: If it is one.
    """
    _chosen(opened, opened.every)
    _probes(opened)
    train_rows(opened.every)


def _chosen(opened: Opened, rows: Sequence[Rollout]) -> dict[str, list[Rollout]]:
    """Return held-out answers, as many refused as complied harmful ones.

    Raises:
        TooFewExamplesError: If there are none of either.
    """
    sampling, groups = edited_sampling(opened), held_out(rows)
    fitting = {
        name: [
            row
            for row in groups[name]
            if row.n_thinking >= MIN_TOKENS
            and fits(opened, sampling, own_item(PLAIN, row, 0))
        ]
        for name in (REFUSED, COMPLIED)
    }
    n = min(opened.settings.use_prompts, *map(len, fitting.values()))
    if not n:
        raise TooFewExamplesError(
            "held-out harmful answers, refused and complied",
            f"{len(fitting[REFUSED])} and {len(fitting[COMPLIED])}",
            "Add harmful prompts, or jailbreak wrappers that work at times.",
        )
    return {name: first_by_hash(group, n) for name, group in fitting.items()}


def _probes(opened: Opened) -> Probes:
    if not opened.study.path(PROBE_FILES[0]).exists():
        raise TooFewExamplesError(
            "a probe whose use can be asked for",
            "a study without one",
            "Run `holdfast probe` on the study first.",
        )
    return read_probes(opened)


def _answers(
    opened: Opened,
    rows: Sequence[Rollout],
    chosen: Mapping[str, Sequence[Rollout]],
    edits: Mapping[str, DirectionEdit],
    places: Mapping[str, Place],
    words: Known,
) -> pa.Table:
    sampling = edited_sampling(opened)
    items = [
        own_item(condition, row, draw)
        for condition in (PLAIN, *edits)
        for draw in range(n_draws(opened, sampling))
        for name in (REFUSED, COMPLIED)
        for row in chosen[name]
    ]

    def plan(condition: str, batch: Sequence[Item]) -> Edit | None:
        if condition == PLAIN:
            return None
        place = places[READ if condition == CONTROL else condition.split("/")[0]]
        rows = [(item.template[0], len(item.token_ids)) for item in batch]
        return replace(edits[condition], ranges=place.ranges(rows))

    settings = {
        "items": fingerprint([item.name for item in items]),
        "random_directions": opened.settings.random_directions,
        "tokens": opened.settings.edited_tokens,
    }
    output = f"decide_{ANSWERS}.parquet"
    with opened.stage(ANSWERS, settings, [ROLLOUTS, *PROBE_FILES]) as stage:
        if not stage.is_done:
            requests = {r.request_id: r.prompt for r in rows if r.wrapper is None}
            adapter, size = opened.session.adapter, opened.session.batch_size
            reading = None if words.reason else FirstToken(adapter, words.openings)
            read = partial(_margins, adapter, reading, size)
            table = draw_items(
                opened, stage, items, plan, requests,
                label="Taking directions out", margins=read,
            )  # fmt: skip
            stage.write_table(output, table)
        return opened.study.read_table(output)


def _margins(
    adapter: Adapter,
    reading: FirstToken | None,
    batch_size: int,
    items: Sequence[Item],
    edit: Edit | None,
) -> list[float | None]:
    """Return the log-odds of refusing at the first answer token, if it tells them."""
    assert edit is None or isinstance(edit, DirectionEdit)
    if reading is None:
        return [None] * len(items)
    sequences = [item.token_ids for item in items]
    states = last_states(adapter, sequences, ["final_norm"], batch_size, edit)
    with torch.inference_mode():
        return reading(states["final_norm"]).tolist()
