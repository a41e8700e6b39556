"""Read the probe at every token, and write traces, examples and figures.

It is fitted on plain requests at the last token before the answer. A cliff is seen
under wrappers, and in the middle of the thinking: there it is tried here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from holdfast.cliff.groups import (
    AS_GENERATED,
    BENIGN,
    COMPLIED,
    CONTROL_FIGURES,
    CONTROLS,
    FIGURES,
    NO_PLATEAU,
    REFUSED,
    SCHEMA,
    Group,
    Scores,
    Traced,
    curves,
    measure,
    read_group,
    scores_from_table,
    scores_to_table,
)
from holdfast.cliff.probe_files import check_current, names, read_probe
from holdfast.cliff.verdict import Thresholds
from holdfast.models.hidden_states import project_states
from holdfast.report.progress import Progress
from holdfast.report.schema import Example, Token
from holdfast.rollout.rows import GROUPS, Rollout, from_table, held_out
from holdfast.rollout.session import Session
from holdfast.rollout.settings import TraceSettings
from holdfast.stats.auroc import auroc_interval
from holdfast.stats.bootstrap import Estimate, undefined
from holdfast.study import Study
from holdfast.study.batches import ROW_ID, Batches
from holdfast.study.directory import Stage
from holdfast.study.figures import figure_of, generator, null_figures, study_seed

STAGE = "trace"
ROLLOUTS = "rollouts.parquet"
OUTPUT = "trace.parquet"
SUMMARY = "trace.json"


def run(study: Study, settings: TraceSettings, session: Session) -> dict[str, Any]:
    """Trace the held-out answers; writes `trace.parquet` and `trace.json`.

    Args:
        study: A study with rollouts and probes.
        settings: Rule of the plateau, and the window of the mean trace.
        session: The model, and where progress is told.

    Returns:
        The figures of the blocks `trace` and `controls`, and the mean traces. All
        null, with the reason, for a model that does not think.

    Raises:
        InputError: If the earlier stages are missing.
    """
    if study.manifest.get("model", {}).get("thinking") is None:
        return _without_thinking(study, settings, session.progress)
    check_current(study)
    with study.stage(
        STAGE,
        settings,
        [ROLLOUTS, *names("published")],
        progress=session.progress,
        done="The traces are there and up to date.",
    ) as stage:
        if stage.is_done:
            return stage.read_json(SUMMARY)
        session.check_same(study)
        groups = held_out(from_table(study.read_table(ROLLOUTS)))
        table = _read(stage, session, groups)
        stage.write_table(OUTPUT, table)
        scores, seed = scores_from_table(table), study_seed(study)
        summary = measure(groups, scores, settings, seed)
        summary["reach"] = reach(groups, scores, settings, seed)
        summary["curves"] = curves(groups, scores, settings.window, seed)
        return stage.write_json(SUMMARY, summary)


def _read(stage: Stage, session: Session, groups: dict[str, list[Rollout]]) -> pa.Table:
    """Run the model over every row, and over the controls of the complied ones."""
    adapter, batches = session.adapter, Batches(stage, session.batch_size)
    probe, others = read_probe(stage.study, "published")
    direction, offset = probe.raw()
    directions = torch.stack([direction.float(), others["difference"].float()])
    offsets = torch.tensor([offset, 0.0])
    seed = study_seed(stage.study)
    items = [Traced(row, AS_GENERATED) for name in GROUPS for row in groups[name]]
    items += [Traced(row, each) for each in CONTROLS for row in groups[COMPLIED]]

    def work(batch: list[Traced]) -> pa.Table:
        token_ids = [item.token_ids(seed) for item in batch]
        logits = project_states(
            adapter, token_ids, directions, offsets, batch_size=batches.batch_size
        )
        return scores_to_table(batch, token_ids, logits, adapter.tokenizer)

    if not items:
        return SCHEMA.empty_table()
    return batches.run(
        items,
        work,
        name=lambda item: item.name,
        length=lambda item: item.row.final,
        label="Tracing",
    )


def _without_thinking(
    study: Study, settings: TraceSettings, progress: Progress
) -> dict[str, Any]:
    """Close the stage with its reason: no thinking, no plateau."""
    with study.stage(STAGE, settings, [ROLLOUTS], progress=progress, done="") as stage:
        if not stage.is_done:
            stage.facts["reason"] = NO_PLATEAU
    return no_trace(NO_PLATEAU)


def no_trace(reason: str) -> dict[str, Any]:
    """Return what `trace.json` would say, every figure null for one reason."""
    group = null_figures(FIGURES, reason) | {"short_thinking_excluded": 0}
    return {
        "trace": {name: dict(group) for name in GROUPS},
        "controls": null_figures(CONTROL_FIGURES, reason),
        "n_requests": 0,
    }


TRUSTED = Thresholds().meter
"""Lower end of an AUROC below which what is read there is not to be trusted."""
MIN_EACH = 5
WHERE_READ = {
    "wrapped_auroc": "on wrapped requests",
    "second_source_auroc": "on requests of the second source",
    "plateau_auroc": "in the middle of the thinking",
    "lowest_wrapper_auroc": "under the wrapper where it does worst",
}


def reach(
    groups: Mapping[str, Sequence[Rollout]],
    scores: Mapping[str, Scores],
    settings: TraceSettings,
    seed: int,
) -> dict[str, Any]:
    """Return how well the probe ranks refused harmful above complied benign answers.

    Returns:
        `plateau_auroc`, by the plateau; `lowest_wrapper_auroc`, by the final token
        within the wrapper where that is lowest, and `lowest_wrapper`, its name.
    """
    read = [read_group(groups[name], scores, settings) for name in (REFUSED, BENIGN)]
    found: dict[str, Any] = {
        "plateau_auroc": figure_of(_auroc(read, "plateau_logit", seed, "plateau"))
    }
    wrappers = sorted(
        {row.wrapper for group in read for row in group.rows if row.wrapper is not None}
    )
    by_wrapper = {
        name: _auroc([_within(g, name) for g in read], "final_logit", seed, name)
        for name in wrappers
    }
    known = {name: each for name, each in by_wrapper.items() if each.value is not None}
    if not known:
        reason = f"no wrapper has {MIN_EACH} refused harmful and as many benign answers"
        return found | {"lowest_wrapper_auroc": figure_of(undefined(0, reason))}
    lowest = min(known, key=lambda name: (known[name].value or 0.0, name))
    return found | {
        "lowest_wrapper_auroc": figure_of(known[lowest]),
        "lowest_wrapper": lowest,
    }


def doubts(probe: Mapping[str, Any]) -> list[str]:
    """Say where a cliff seen through this probe is not to be trusted."""
    said = []
    for key, place in WHERE_READ.items():
        figure = probe.get(key)
        if not isinstance(figure, dict) or figure["low"] is None:
            continue
        if figure["low"] < TRUSTED:
            said.append(
                f"A cliff seen through this probe is not to be trusted {place}: there "
                f"its AUROC is {figure['value']:.2f} ({figure['low']:.2f} to "
                f"{figure['high']:.2f}), not shown to reach {TRUSTED:.2f}."
            )
    return said


def _within(group: Group, wrapper: str | None) -> Group:
    kept = [i for i, row in enumerate(group.rows) if row.wrapper == wrapper]
    return Group(
        tuple(group.rows[i] for i in kept), tuple(group.cliffs[i] for i in kept)
    )


def _auroc(read: Sequence[Group], field: str, seed: int, name: str | None) -> Estimate:
    known = [
        (row, value, refused)
        for group, refused in zip(read, (True, False), strict=True)
        for row, cliff in zip(group.rows, group.cliffs, strict=True)
        if (value := getattr(cliff, field)) is not None
    ]
    labels = torch.tensor([refused for _, _, refused in known], dtype=torch.bool)
    n_refused, n_benign = int(labels.sum()), int((~labels).sum())
    if min(n_refused, n_benign) < MIN_EACH:
        return undefined(
            len(known),
            f"{n_refused} refused harmful and {n_benign} benign answers to read; "
            f"{MIN_EACH} of each are needed",
        )
    return auroc_interval(
        torch.tensor([value for _, value, _ in known], dtype=torch.float64),
        labels,
        [row.request_id for row, _, _ in known],
        generator(seed, f"reach/{name}"),
    )


PLACES = {"typical": 0.5, "steepest": 0.0}
MAX_TOKENS = 1200


def examples(table: pa.Table, groups: Mapping[str, Sequence[Rollout]]) -> list[Example]:
    """Return a few answers of each group with the score of every token.

    They are chosen by rule, not by hand: of each group the row whose score falls most
    from the middle of its thinking to the end, and the one that falls as most do.

    Returns:
        Examples as the report draws them.
    """
    scores = scores_from_table(table)
    made = []
    for group in GROUPS:
        rows = sorted(
            groups[group],
            key=lambda row: (-_fall(row, scores[_name(row)]), row.row_id),
        )
        places = {int(place * len(rows)): kind for kind, place in PLACES.items()}
        made += [
            _example(kind, rows[place], table)
            for place, kind in sorted(places.items())
            if place < len(rows)
        ]
    return made


def _name(row: Rollout) -> str:
    return Traced(row, AS_GENERATED).name


def _fall(row: Rollout, scores: Scores) -> float:
    level = torch.sigmoid(scores.logits)
    thinking = level[slice(*row.spans.thinking)]
    return float(thinking.median() - level[-1]) if len(thinking) else 0.0


def _example(kind: str, row: Rollout, table: pa.Table) -> Example:
    wrapper = f", wrapper {row.wrapper}" if row.wrapper else ""
    names = table.column(ROW_ID).cast(pa.string())
    mine = table.filter(pc.equal(names, _name(row)))
    tokens: list[Token] = [
        {
            "text": token["token"],
            "score": round(token["score"], 4),
            "region": token["region"],
        }
        for token in mine.select(["token", "score", "region"]).to_pylist()
    ]
    return {
        "title": f"The {kind} fall{wrapper}",
        "group": str(row.group),
        "verdict": f"{row.verdict}: {row.reason}",
        "tokens": tokens[-MAX_TOKENS:],
    }
