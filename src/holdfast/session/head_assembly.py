"""The blocks `heads` and `ablation` of the report, and the verdict on them."""

from typing import Any, NamedTuple

from holdfast.analysis.sparse import SparseVerdict, sparse_verdict
from holdfast.session.ablation_records import ablated_of
from holdfast.session.figures import estimate_of
from holdfast.study import Study

FILES = {"heads": "heads.json", "ablate": "ablation.json"}
BLOCKS = {"heads": "heads", "ablate": "ablation"}
STAGES = tuple(FILES)
NO_PLATEAU = "the model has no thinking format, so there is no plateau"
"""Why neither a trace nor a ranking of heads can be had, whatever else is asked."""


class HeadBlocks(NamedTuple):
    """What the report says of single heads.

    Attributes:
        blocks: `heads` and `ablation`, as far as they are there.
        verdict: Whether few heads do it.
    """

    blocks: dict[str, Any]
    verdict: SparseVerdict


def head_blocks(study: Study, attack_succeeds: bool | None) -> HeadBlocks:
    """Return what the stages `heads` and `ablate` have found, if they have run.

    Args:
        study: A study whose stages have run, as far as they could.
        attack_succeeds: The verdict on the attacks.
    """
    blocks = {
        BLOCKS[stage]: study.read_json(FILES[stage])
        for stage in STAGES
        if is_current(study, stage)
    }
    if "heads" not in blocks:
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
    )
    return HeadBlocks(blocks, found)


def is_current(study: Study, stage: str) -> bool:
    """Tell whether a stage is done, on the files that the study holds now."""
    record = study.record(stage)
    if record.get("state") != "done":
        return False
    written = all(study.path(name).exists() for name in record["outputs"])
    return written and all(
        study.path(name).exists() and study.input_hash(name) == known
        for name, known in record["inputs"].items()
    )


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
