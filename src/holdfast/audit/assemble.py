"""One report from what the stages have written."""

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NamedTuple

from holdfast.audit.browse import BrowsedAnswer
from holdfast.cliff.commitment.panel import decide_blocks
from holdfast.cliff.groups import COMPLIED, NO_PLATEAU, PROBE_FIGURES
from holdfast.cliff.trace import doubts, no_trace
from holdfast.cliff.verdict import CliffVerdict, Figures, verdict
from holdfast.dynamics.panel import signal_blocks
from holdfast.evaluate.panel import EVALUATED, TABLE, is_evaluated, suite_sources
from holdfast.evaluate.rows import NOTES
from holdfast.heads.checks import Ablated, SparseVerdict, sparse_verdict
from holdfast.report.schema import SCHEMA
from holdfast.report.text import ROLES, closed_by_force, title
from holdfast.rollout.rows import (
    JUDGE_STAGE,
    Rollout,
    attack_block,
    held_out,
    judging_record,
    outcome_block,
)
from holdfast.rollout.settings import ROLES as SOURCES
from holdfast.sinks.panel import MASSES, is_measured, sink_sources
from holdfast.stats.bootstrap import Estimate, undefined
from holdfast.study import Study
from holdfast.study.directory import is_current
from holdfast.study.figures import estimate_of, null_figures, study_seed

METERS = {"plain": "auroc", "wrapped": "wrapped_auroc"}
"""Figure of the probe that shows if it reads refusal on a kind of request."""
PATHS = (*SOURCES, "imported")
PACKAGES = ("holdfast", "torch", "transformers", "tokenizers", "safetensors", "pyarrow")


def assemble(study: Study, rows: Sequence[Rollout]) -> dict[str, Any]:
    """Return the report of a study.

    `study`: A study whose stages have run, as far as they could.
    """
    seed = study_seed(study)
    unfit, untraced = (missing(study, stage) for stage in ("probe", "trace"))
    probe = _read(study, "probe", "probes/summary.json") or null_figures(
        PROBE_FIGURES, unfit
    )
    traced = _read(study, "trace", "trace.json") or no_trace(untraced)
    probe |= traced.get("reach", {})
    thinks = study.manifest["model"]["thinking"] is not None
    success = attack_block(rows, seed)
    decided = decide_blocks(study)
    figures = figures_of(probe, traced, success, thinks, complied_kinds(rows), untraced)
    accounts = decided.get("decide", {}).get("curve")
    if accounts:
        figures = replace(figures, fell_at_template=fell_of(accounts))
    outcome = verdict(figures)
    heads = head_blocks(study, outcome.attack_succeeds)
    asked = dict(study.manifest.get("settings", {}).get("rollout", {}))
    paths = {name: asked.pop(name) for name in PATHS if asked.get(name)}
    settings = {
        "rollout": {key: value for key, value in asked.items() if key not in PATHS},
        "sampling": study.record("rollout").get("settings", {}).get("sampling", {}),
        "probe": study.record("probe").get("settings", {}),
        "trace": study.record("trace").get("settings", {}),
    }
    for stage, block in BLOCKS.items():
        if block in heads.blocks:
            settings[stage] = study.record(stage)["settings"]
    report = {
        "schema": SCHEMA,
        "model": study.manifest["model"],
        "settings": settings,
        "verdict": _words(outcome, heads.verdict)
        | ({"account": accounts["account"]} if accounts else {}),
        "probe": probe,
        "trace": traced["trace"],
        "controls": traced["controls"],
        "outcomes": outcome_block(rows, seed),
        "attack_success": success,
        "data": _data(study, rows),
        "limits": [*_limits(study, rows, untraced), *doubts(probe)],
        "run": _occasion(study, paths),
    } | (heads.blocks | decided)
    if judge := judge_block(study):
        report |= {"judge": judge}
    report |= signal_blocks(study)
    if is_evaluated(study):
        report |= {"evaluation": study.read_json(EVALUATED)}
    if is_measured(study):
        report |= {"sinks": study.read_json(MASSES)}
        settings["sinks"] = study.record("sinks")["settings"]
    # Tuples become lists, so that what is returned is what a reader of the file gets.
    plain: dict[str, Any] = json.loads(json.dumps(report))
    return plain


def missing(study: Study, stage: str) -> str:
    """Return why a stage, `probe` or `trace`, has found nothing; empty if it has."""
    if stage == "trace" and study.manifest["model"]["thinking"] is None:
        return NO_PLATEAU
    if stage == "trace" and (unfit := missing(study, "probe")):
        return unfit
    record = study.record(stage)
    if record.get("outputs") and is_current(study, stage):
        return ""
    if record.get("outputs"):
        return f"the stage `{stage}` belongs to earlier answers; run it again"
    reason = record.get("reason") or f"the stage `{stage}` has not been run"
    return str(reason).removesuffix(".")


def _read(study: Study, stage: str, name: str) -> dict[str, Any] | None:
    """Read what a stage has written, if it has."""
    if name not in study.record(stage).get("outputs", []):
        return None
    if not (is_current(study, "probe") and is_current(study, stage)):
        return None
    return dict(study.read_json(name))


def figures_of(
    probe: Mapping[str, Any],
    traced: Mapping[str, Any],
    success: Mapping[str, Any],
    thinks: bool,
    kinds: Sequence[str],
    untraced: str,
) -> Figures:
    """Return what the verdict is read from.

    `probe`: The block `probe` of the report.
    `traced`: Its blocks `trace` and `controls`.
    `untraced`: Why nothing was traced; empty where something was.
    """
    complied, controls = traced["trace"][COMPLIED], traced["controls"]

    def tried(role: str) -> Estimate | None:
        return estimate_of(success[role]) if success[role]["n"] else None

    return Figures(
        harmful=tried("harmful"),
        wrapped=tried("wrapped"),
        thinks=thinks,
        n_requests=complied.get("n_requests", 0),
        short_thinking_excluded=complied["short_thinking_excluded"],
        scaled_cliff=estimate_of(complied["scaled_cliff"]),
        excess_over_refused=estimate_of(controls["excess_over_refused"]),
        excess_over_benign=estimate_of(controls["excess_over_benign"]),
        plateau_over_benign=estimate_of(controls["plateau_over_benign"]),
        meters={kind: estimate_of(probe[METERS[kind]]) for kind in kinds},
        untraced=untraced,
    )


def fell_of(block: Mapping[str, Any]) -> Estimate:
    """Return the share of answers that fell at the end template, as `decide` found it.

    Undefined where nothing was read that could show it.
    """
    found = estimate_of(block["account"]["fell_at_template"])
    return undefined(found.n, block["unread"]) if block["unread"] else found


def complied_kinds(rows: Sequence[Rollout]) -> list[str]:
    """Return under which kinds of request harmful rows that are traced complied."""
    complied = held_out(rows)[COMPLIED]
    found = {"wrapped" if row.role == "wrapped" else "plain" for row in complied}
    return [kind for kind in METERS if kind in found]


def _words(found: CliffVerdict, heads: SparseVerdict) -> dict[str, Any]:
    """Return the block `verdict`; whatever is null says why."""
    reasons = dict(found.reasons)
    if heads.reason is not None:
        reasons["sparse"] = heads.reason
    return {
        "attack_succeeds": found.attack_succeeds,
        "cliff": found.cliff,
        "sparse": heads.sparse,
        "evidence": [*found.evidence, *heads.evidence],
        "reasons": reasons,
    }


def _data(study: Study, rows: Sequence[Rollout]) -> dict[str, Any]:
    record = study.record("rollout")
    splits: dict[str, dict[str, int]] = {}
    for (role, split), count in sorted(
        Counter((r.role, r.split) for r in rows).items()
    ):
        splits.setdefault(role, {})[split] = count
    return {
        "sources": [
            *record.get("sources", ()),
            *suite_sources(study),
            *sink_sources(study),
        ],
        "overlap": record.get("overlap", {}),
        "splits": splits,
    }


def _limits(study: Study, rows: Sequence[Rollout], reason: str) -> list[str]:
    """Return sentences on what this study could not do."""
    record = study.record("rollout")
    judging = judging_record(study)
    said = [*record.get("prompt_notes", ()), *judging.get("split_notes", ())]
    if "reason" in judging:
        said.append(f"Not every answer was judged: {judging['reason']}")
    measures = judge_block(study).get("measures")
    if measures == "harm":
        said.append(NOTES[measures])
    if reason:
        said.append(f"There is no trace: {reason}.")
    forced = sum(row.forced_close for row in rows)
    if forced:
        said.append(closed_by_force(forced, len(rows)))
    return [sentence[:1].upper() + sentence[1:] for sentence in said]


def judge_block(study: Study) -> dict[str, Any]:
    """Return who judged the rollouts, and its agreement with people.

    Returns: The block `judge` of the report; empty in studies of before there was a
    choice of judges.
    """
    record = study.record(JUDGE_STAGE)
    if not record:
        return {}
    known = {"calibration": record.get("calibration")}
    if record.get("cascade") is not None:
        known["cascade"] = record["cascade"]
    return {**record["settings"]["judge"], **known}


def _occasion(study: Study, paths: dict[str, Any]) -> dict[str, Any]:
    """Return the block `run`, which no comparison reads."""
    stages = {
        name: {key: record.get(key) for key in ("started", "finished", "batch_size")}
        for name, record in study.manifest["stages"].items()
    }
    return {
        "study": str(study.directory),
        "paths": paths,
        "stages": stages,
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
    }


FILES = {"heads": "heads.json", "ablate": "ablation.json"}
BLOCKS = {"heads": "heads", "ablate": "ablation"}
STAGES = (*FILES, "judge_ablation")


class HeadBlocks(NamedTuple):
    """What the report says of single heads."""

    blocks: dict[str, Any]  # `heads` and `ablation`, as far as they are there.
    verdict: SparseVerdict  # Whether few heads do it.


def head_blocks(study: Study, attack_succeeds: bool | None) -> HeadBlocks:
    """Return what the stages `heads` and `ablate` have found, if they have run.

    `study`: A study whose stages have run, as far as they could.
    """
    blocks = {}
    if is_current(study, "probe"):
        blocks = {
            BLOCKS[stage]: study.read_json(file)
            for stage, file in FILES.items()
            if is_current(study, stage) and _is_written(study, file)
        }
    judging = study.record("judge_ablation")
    if "heads" not in blocks or (judging and not is_current(study, "judge_ablation")):
        blocks.pop("ablation", None)
    if "ablation" not in blocks:
        reason = _missing(study)
        return HeadBlocks(blocks, SparseVerdict(None, (), reason))
    sparse = blocks["ablation"]["sparse"]
    found = sparse_verdict(
        attack_succeeds,
        estimate_of(sparse["baseline"]),
        sparse["n_requests"],
        ablated_of(sparse),
        is_limited=sparse["baseline"]["n"]
        >= study.record("ablate")["settings"]["ablation_prompts"],
    )
    return HeadBlocks(blocks, found)


def _is_written(study: Study, file: str) -> bool:
    """Return whether a stage has written a file that is not being made anew."""
    return any(file in study.record(stage).get("outputs", ()) for stage in STAGES)


def _missing(study: Study) -> str:
    """Say why single heads were not looked at: the first cause, not the last stage."""
    if study.manifest["model"]["thinking"] is None:
        return f"Single heads could not be looked at: {NO_PLATEAU}."
    probe = study.record("probe")
    if not probe.get("outputs"):
        found = probe.get("reason") or "the stage `probe` has not been run"
        found = str(found).removesuffix(".")
        return f"Single heads could not be looked at without a probe: {found}."
    for stage in STAGES:
        record = study.record(stage)
        if record.get("reason"):
            reason = str(record["reason"]).removesuffix(".")
            return f"Single heads could not be looked at: {reason}."
        if record and not is_current(study, stage):
            return f"The stage `{stage}` belongs to earlier answers; run it again."
        if not record:
            return f"The stage `{stage}` has not been run."
    return "Single heads were not looked at in this study."


ROLLOUTS = "rollouts.parquet"
LIMIT = "cut at the token limit"
"""What reasons of the judges say of a cut already."""
CUT = "cut at its limit"
FORCED = "thinking closed by force"


def browsed(
    rollouts: Sequence[Rollout], evaluated: Sequence[Mapping[str, Any]]
) -> list[BrowsedAnswer]:
    """Return every answer of a study."""
    read = ("wrapper", "prompt", "thinking", "answer", "reason", "finish")
    keys = (*read, "forced_close")
    correct = {True: "correct", False: "wrong", None: "not judged"}
    return [
        _browsed(
            {key: getattr(row, key) for key in keys},
            title(row.role, ROLES),
            row.verdict,
            ROLLOUTS,
        )
        for row in rollouts
    ] + [
        _browsed(
            row,
            f"{row['suite']}: {row['kind'].replace('_', ' ')}",
            row["verdict"] or correct[row["correct"]],
            TABLE,
        )
        for row in evaluated
    ]


def _browsed(
    row: Mapping[str, Any], group: str, outcome: str, file: str
) -> BrowsedAnswer:
    """Return an answer with the judge's reason and what befell it."""
    reason = row["reason"] or ""
    is_cut = row["finish"] == "length" and LIMIT not in reason
    note = (reason, CUT * is_cut, FORCED * bool(row["forced_close"]))
    return BrowsedAnswer(
        group=group,
        wrapper=row["wrapper"],
        outcome=outcome,
        prompt=row["prompt"],
        thinking=row["thinking"],
        answer=row["answer"],
        note="; ".join(part for part in note if part),
        file=file,
    )


def ablated_of(block: Mapping[str, Any]) -> tuple[Ablated, ...]:
    """Return what `sparse_of` made, as the verdict reads it."""
    return tuple(
        Ablated(
            n_heads=size["n_heads"],
            n_total=block["n_total"],
            restored=estimate_of(size["restored"]),
            beyond_random=estimate_of(size["beyond_random"]),
            benign_lost=estimate_of(size["benign_lost"]),
            degenerate_gained=estimate_of(size["degenerate_gained"]),
        )
        for size in block["sizes"]
    )
