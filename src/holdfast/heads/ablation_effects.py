"""Effects of an ablation: rates, paired differences, and self-repair."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.cliff.held_out import BENIGN, HARMFUL, LOOKALIKE
from holdfast.cliff.probe import Probe
from holdfast.errors import HoldfastError
from holdfast.heads.conditions import ROLE, AnswerRow, by_condition, with_outcomes
from holdfast.heads.ranking import Head, drops, rank_heads, top_heads
from holdfast.heads.readings import read, unpack
from holdfast.judges.calibration import identity_record, is_same
from holdfast.judges.cascade import cascade_record
from holdfast.judges.rows import judge_rows
from holdfast.judges.settings import JudgeSettings
from holdfast.models.hidden_states import project_states
from holdfast.models.interventions import HeadEdit, head_factors, scale_heads
from holdfast.models.model import Adapter
from holdfast.rollout.rows import Judged, Rollout, counted, judging_record, unread
from holdfast.rollout.rows import rate as rate_of
from holdfast.rollout.session import Session
from holdfast.stats.bootstrap import Estimate, bootstrap_means, undefined
from holdfast.stats.paired import paired_difference
from holdfast.stats.unjudged import judged_difference
from holdfast.study import Study
from holdfast.study.figures import figure_of, generator, study_seed
from holdfast.study.rows import table_schema

Row = Mapping[str, Any]


OTHER_JUDGE = "Another judge judged the rollouts, on which the heads were chosen."


class Measure(NamedTuple):
    """A rate: over rows of which roles (`rollout.rows` says which of them count)."""

    roles: tuple[str, ...] | None  # Roles of the rows; None for all.
    optional: bool = False  # Whether it is left out where no such prompt was asked.


MEASURES = {
    "attack_success": Measure(HARMFUL),
    "over_refusal": Measure(BENIGN),
    "lookalike_refusal": Measure((LOOKALIKE,), optional=True),
    "benign_compliance": Measure(BENIGN),
    "utility": Measure((ROLE,), optional=True),
    "degenerate": Measure(None),
}


def measures_of(rows: Sequence[Row]) -> list[str]:
    """Return the measures that have something to count, and those that must."""
    roles = {row["role"] for row in rows}
    return [
        name
        for name, measure in MEASURES.items()
        if not measure.optional or roles & set(measure.roles or ())
    ]


def rate(rows: Sequence[Row], measure: str, seed: int, name: str) -> Estimate:
    """Return one rate with its interval over base requests.

    `rows`: Answers, each with `role`, `outcome` and `request_id`.
    """
    return rate_of(_judged(_kept(rows, measure)), measure, seed, f"{name}/{measure}")


def difference(
    after: Sequence[Row], before: Sequence[Row], measure: str, seed: int, name: str
) -> Estimate:
    """Return the paired difference of a rate, answer by answer.

    `before`: Answers under the other; each prompt once.
    """
    kept = _kept(after, measure)
    if not kept:
        return undefined(0, "no prompt of this kind was asked")
    known = {row["asked"]: row for row in before}
    here, there = _judged(kept), _judged([known[row["asked"]] for row in kept])
    return judged_difference(
        counted(here, measure),
        counted(there, measure),
        unread(here, measure),
        unread(there, measure),
        [row.request_id for row in here],
        generator(seed, f"{name}/{measure}"),
    )


def conditions_of(rows: Sequence[Row], seed: int) -> list[dict[str, Any]]:
    """Return the table of conditions: each rate, and its change against nothing.

    `rows`: Rows of `ablation.parquet`, in the order of the plan.
    """
    groups = by_condition(
        rows, lambda row: (row["scope"], row["condition"], row["n_heads"])
    )
    measures = measures_of(rows)
    made = []
    for (scope, condition, n_heads), group in groups.items():
        plain = groups[scope, "none", 0]
        name = f"ablate/{scope}/{condition}/{n_heads}"
        draws = by_condition(group, lambda row: row["draw"])
        entry: dict[str, Any] = {
            "scope": scope,
            "condition": condition,
            "n_heads": n_heads,
            "draws": len(draws),
            "heads": [draw[0]["heads"] for draw in draws.values()],
            "forced": sum(row["forced_close"] for row in group),
        }
        if group[0]["fraction"] is not None:
            entry["fraction"] = group[0]["fraction"]
        entry |= {each: figure_of(rate(group, each, seed, name)) for each in measures}
        if condition != "none":
            entry["change"] = {
                each: figure_of(difference(group, plain, each, seed, f"{name}/change"))
                for each in measures
            }
        made.append(entry)
    return made


def sparse_of(rows: Sequence[Row], n_total: int, seed: int) -> dict[str, Any]:
    """Return what the verdict `sparse` is read from, by number of heads."""
    here = [row for row in rows if row["scope"] == "everywhere"]
    groups = by_condition(
        here, lambda row: (row["condition"], row["n_heads"], row["draw"])
    )
    plain = groups.get(("none", 0, 0), [])
    harmful = _kept(plain, "attack_success")
    block: dict[str, Any] = {
        "baseline": figure_of(rate(plain, "attack_success", seed, "ablate/baseline")),
        "n_requests": len({row["request_id"] for row in harmful}),
        "n_total": n_total,
        "sizes": [],
    }
    for condition, size, draw in groups:
        if condition != "top":
            continue
        top = groups[condition, size, draw]
        draws = [group for key, group in groups.items() if key[:2] == ("random", size)]
        beyond = [
            difference(each, top, "attack_success", seed, f"ablate/beyond/{size}/{i}")
            for i, each in enumerate(draws)
        ]
        closest = min(beyond, key=_low, default=undefined(0, "there are no controls"))
        name = f"ablate/sparse/{size}"
        found = {
            "restored": difference(plain, top, "attack_success", seed, name),
            "beyond_random": closest,
            "benign_lost": difference(plain, top, "benign_compliance", seed, name),
            "degenerate_gained": difference(top, plain, "degenerate", seed, name),
        }
        figures = {key: figure_of(each) for key, each in found.items()}
        block["sizes"].append({"n_heads": size} | figures)
    return block


def _low(found: Estimate) -> float:
    return float("-inf") if found.low is None else found.low


def _kept(rows: Sequence[Row], measure: str) -> list[Row]:
    roles = MEASURES[measure].roles
    return [row for row in rows if roles is None or row["role"] in roles]


def _judged(rows: Sequence[Row]) -> list[Judged]:
    return [
        Judged(row["request_id"], row["outcome"], score=row.get("score"))
        for row in rows
    ]


STAGE, JUDGE_STAGE = "ablate", "judge_ablation"
OUTPUT, SUMMARY = "ablation.parquet", "ablation.json"


def judge_ablation(
    study: Study, session: Session, chosen: JudgeSettings
) -> dict[str, Any]:
    """Judge the answers of an ablation, and count; no model is needed.

    Returns: The block `ablation` of the report.
    """
    judge, answered = session.open_judge(chosen), study.record(STAGE)
    identity = identity_record(judge.identity)
    key = {"judge": identity, "answers": answered["fingerprint"]}
    state, _ = study.begin(JUDGE_STAGE, key, {})
    record = study.manifest["stages"][JUDGE_STAGE]
    if state == "done":
        return dict(study.read_json(SUMMARY))
    rows = study.read_table(OUTPUT).to_pylist()
    try:
        verdicts = judge_rows(study, JUDGE_STAGE, rows, judge, session.progress)
    except HoldfastError as error:
        record["reason"] = str(error)
        study.save()
        raise
    cascade = cascade_record(judge, rows, verdicts.to_pylist())
    rows = with_outcomes(rows, verdicts.to_pylist())
    study.write_table(
        OUTPUT, pa.Table.from_pylist(rows, schema=table_schema(AnswerRow))
    )
    seed, settings = study_seed(study), answered["settings"]
    block: dict[str, Any] = answered["block"] | {
        "judge": identity,
        "conditions": conditions_of(rows, seed),
        "sparse": sparse_of(rows, answered["n_total"], seed),
    }
    if cascade is not None:
        block["cascade"] = cascade
    if settings["ablated_heads"] or settings["factor"] != 0:
        # The verdict is on heads that the ranking has found, and switched off.
        block["sparse"]["sizes"] = []
    if not is_same(judging_record(study)["settings"]["judge"], identity):
        block["notes"] = [*block["notes"], OTHER_JUDGE]
    study.write_json(SUMMARY, block)
    record.pop("reason", None)
    study.finish(JUDGE_STAGE, [OUTPUT, SUMMARY])
    return block


LATE = 16
"""Tokens at the end of an answer over which the late score is the mean."""


def second_round(
    adapter: Adapter,
    rows: Sequence[Rollout],
    probe: Probe,
    first: Sequence[Head],
    seed: int,
    batch_size: int,
) -> tuple[tuple[Head, ...], dict[str, Any]]:
    """Rank heads again while the first ones are off, and say who took over.

    The tokens stay the same, so that nothing but the edit differs.

    Returns: As many new heads, and figures: what all other heads contribute before and
    after, and the contribution of each new head before and after.
    """
    edit = HeadEdit(head_factors(adapter, first, 0.0))
    before, after = (
        unpack(
            read(adapter, rows, probe, batch_size=batch_size, edit=each), rows, adapter
        )
        for each in (None, edit)
    )
    ranking = rank_heads(
        after.readings, after.clusters, generator(seed, "repair/ranking")
    )
    others = [row for row in ranking if row.head not in first]
    new = top_heads(others, len(first))
    was, now = (drops(each.readings).total for each in (before, after))
    keep = torch.ones(was.shape[1:], dtype=torch.bool)
    for head in first:
        keep[head] = False
    rest_before, rest_after = (each[:, keep].sum(1) for each in (was, now))
    clusters = before.clusters
    change = paired_difference(
        rest_after, rest_before, clusters, generator(seed, "repair/change")
    )
    block: dict[str, Any] = {
        "others_before": _mean(rest_before, clusters, seed, "before"),
        "others_after": _mean(rest_after, clusters, seed, "after"),
        "others_change": figure_of(change),
        "new_heads": [
            {
                "layer": layer,
                "head": head,
                "before": _mean(
                    was[:, layer, head], clusters, seed, f"{layer}:{head}/before"
                ),
                "after": _mean(
                    now[:, layer, head], clusters, seed, f"{layer}:{head}/after"
                ),
            }
            for layer, head in new
        ],
    }
    return new, block


def score_along_answers(
    adapter: Adapter,
    rows: Sequence[Mapping[str, Any]],
    probe: Probe,
    heads: Sequence[Head],
    batch_size: int,
) -> Float[Tensor, "example _"]:
    """Read the probe's logit before the answer and late in it, under an edit.

    `rows`: Rows of `ablation.parquet` of one condition.
    Returns: One row per answer: the logit at its final token, and the mean over its
    last tokens.
    """
    direction, offset = probe.raw()
    edit = HeadEdit(head_factors(adapter, heads, 0.0)) if heads else None
    with scale_heads(adapter, edit):
        found = project_states(
            adapter,
            [row["token_ids"] for row in rows],
            direction.float()[None],
            torch.tensor([offset]),
            batch_size=batch_size,
        )
    ends = []
    for row, logits in zip(rows, found, strict=True):
        start = row["answer_start"]
        late = logits[max(start, len(logits) - LATE) :, 0]
        # An answer that is empty is as it was at its beginning.
        ends.append((logits[start - 1, 0], late.mean() if len(late) else logits[-1, 0]))
    return torch.tensor([[float(a), float(b)] for a, b in ends])


def comes_back(
    plain: Float[Tensor, "example _"],
    edited: Float[Tensor, "example _"],
    clusters: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Return the score before the answer and late in it, without and with the edit.

    `plain`: What `score_along_answers` read without an edit.
    """
    columns = {
        "final_plain": plain[:, 0],
        "final_edited": edited[:, 0],
        "late_plain": plain[:, 1],
        "late_edited": edited[:, 1],
        "lost_again": (edited[:, 0] - plain[:, 0]) - (edited[:, 1] - plain[:, 1]),
    }
    return {
        name: _mean(column, clusters, seed, f"score/{name}")
        for name, column in columns.items()
    }


def ablation_sentences(block: Mapping[str, Any]) -> list[str]:
    """Say what the figures of self-repair mean.

    `block`: Figures of `second_round` and of `comes_back`, side by side.
    """
    change, lost = block["others_change"], block["lost_again"]
    repair = "With the top heads off, no other heads visibly take over."
    if (change["low"] or 0) > 0:
        repair = (
            f"With the top heads off, other heads take more from the logit than before "
            f"({change['value']:.2f} more): they take over in part."
        )
    fade = "The gain in the refusal logit does not visibly shrink again."
    if (lost["low"] or 0) > 0:
        fade = (
            f"The gain in the refusal logit shrinks along the answer, by "
            f"{lost['value']:.2f} of {_gain(block):.2f}."
        )
    return [repair, fade]


def _gain(block: Mapping[str, Any]) -> float:
    plain, edited = block["final_plain"]["value"], block["final_edited"]["value"]
    return float(edited or 0) - float(plain or 0)


def _mean(
    values: Tensor, clusters: Sequence[str], seed: int, name: str
) -> dict[str, Any]:
    [mean] = bootstrap_means(
        values[:, None], clusters, generator(seed, f"repair/{name}")
    )
    return figure_of(mean)
