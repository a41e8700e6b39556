"""Does the probe of one model read refusal in another model of the same shape?"""

from typing import Any

import torch

from holdfast.cliff.fit import refusal_auroc
from holdfast.cliff.probe_files import read_own_probe
from holdfast.cliff.trace import TRUSTED
from holdfast.errors import ModelError
from holdfast.models.hidden_states import project_states
from holdfast.rollout.rows import from_table
from holdfast.rollout.session import Session
from holdfast.study import Study
from holdfast.study.figures import figure_of, generator, study_seed

ROLES = {
    "plain": ("harmful", "benign"),
    "wrapped": ("wrapped", "benign_wrapped"),
}


def run(study: Study, session: Session, other: Study) -> dict[str, Any]:
    """Read the held-out answers of a study through the probe of another.

    Args:
        study: The study whose answers are read; it has a probe of its own.
        session: Its model.
        other: The study whose probe is tried.

    Returns:
        AUROC of both probes on plain and on wrapped answers, the cosine of their
        directions, and whether a cliff seen through the other one may be trusted.

    Raises:
        InputError: If a study has no rollouts or probe of its own.
        ModelError: If the models have states of different widths.
    """
    own, _ = read_own_probe(study, "published")
    given, _ = read_own_probe(other, "published")
    if len(own.weight) != len(given.weight):
        raise ModelError(
            f"a probe of states of width {len(own.weight)}, as in {study.directory}",
            f"one of width {len(given.weight)} in {other.directory}",
            "Choose two models of one shape.",
        )
    session.check_same(study)
    directions, offsets = zip(*(probe.raw() for probe in (own, given)), strict=True)
    rows = [
        row
        for row in from_table(study.read_table("rollouts.parquet"))
        if row.split == "test" and row.is_decided
    ]
    found = project_states(
        session.adapter,
        [row.token_ids[: row.final + 1] for row in rows],
        torch.stack([direction.float() for direction in directions]),
        torch.tensor(offsets, dtype=torch.float32),
        batch_size=session.batch_size,
    )
    logits = torch.stack([each[-1] for each in found]).double()
    seed = study_seed(study)
    figures = {}
    for column, name in enumerate(("own", "other")):
        for kind, roles in ROLES.items():
            kept = [place for place, row in enumerate(rows) if row.role in roles]
            estimate = refusal_auroc(
                [rows[place] for place in kept],
                logits[kept, column],
                generator(seed, f"transfer/{name}/{kind}"),
                "both refused and complied answers are needed",
            )
            figures[f"{name}_{kind}_auroc"] = figure_of(estimate)
    cosine = torch.cosine_similarity(directions[0], directions[1], dim=0)
    trusted = all(
        (figures[f"other_{kind}_auroc"]["low"] or 0.0) >= TRUSTED for kind in ROLES
    )
    said = (
        f"The probe of {other.manifest['model']['id']} "
        + ("reads" if trusted else "is not shown to read")
        + f" refusal in {study.manifest['model']['id']}: a cliff seen through it is "
        + ("" if trusted else "not ")
        + "to be trusted there."
    )
    return {
        "figures": figures,
        "cosine": round(float(cosine), 6),
        "trusted": trusted,
        "words": said,
    }
