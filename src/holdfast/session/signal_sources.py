"""Where the steps of a study's answers come from, and what its anchors belong to."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.analysis.dynamics import Kind, positions_of
from holdfast.analysis.probe import FOLDS, fit_probe
from holdfast.models.masked import MaskedModel
from holdfast.session.context import Session
from holdfast.session.denoised import STEPS, read_steps
from holdfast.session.figures import study_seed
from holdfast.session.probes import model_fingerprint, names, write_probe
from holdfast.session.rows import Rollout
from holdfast.session.signal_denoising import Replay, require_no_thinking
from holdfast.session.signal_prefill import Prefill
from holdfast.session.signal_reading import Source
from holdfast.session.signal_rows import is_refused, requests_of
from holdfast.session.signal_settings import SignalSettings
from holdfast.study import Study

ROLLOUTS = "rollouts.parquet"
STEP_PROBE = "steps"
"""Name of the probe that is fitted on pooled states of a masked-diffusion model."""


def kind_of(study: Study) -> Kind:
    """Return how the answers of a study were decoded."""
    sampling = study.record("rollout")["settings"].get("sampling", {})
    return "diffusion" if "remasking" in sampling else "autoregressive"


def inputs_of(study: Study) -> dict[str, str]:
    """Return the hashes of the files that hold the answers and their steps.

    Args:
        study: A study with rollouts.
    """
    names = (ROLLOUTS, STEPS) if study.path(STEPS).exists() else (ROLLOUTS,)
    return {name: study.input_hash(name) for name in names}


def identity_of(study: Study, settings: SignalSettings) -> dict[str, Any]:
    """Return what states must share with those behind the anchors.

    Args:
        study: A study with rollouts.
        settings: Mode, steps, region.
    """
    model, kind = study.manifest["model"], kind_of(study)
    asked = study.record("rollout")["settings"]
    own = ("revision", "weights_sha256", "template_sha256", "dtype")
    sampling = asked.get("sampling", {})
    if kind == "autoregressive":
        sampling = {key: sampling.get(key) for key in ("temperature", "top_p")}
    return {
        **{key: model[key] for key in own},
        "sampler": {"kind": kind} | sampling,
        "system_prompt": asked.get("system_prompt"),
        "steps": settings.steps,
        "time": settings.time,
        "region": settings.region,
        "positions": positions_of(settings.mode, kind),
        "after_end": "repeated"
        if settings.mode == "repo" and kind == "autoregressive"
        else "held",
        "site": "final_norm",
    }


def source_of(study: Study, settings: SignalSettings, session: Session) -> Source:
    """Return where states step by step come from.

    Args:
        study: A study with rollouts.
        settings: Mode, steps, region.
        session: The model.

    Raises:
        InputError: If a diffusion model's answers have no steps, or its thinking is
            to be left out.
    """
    speaker = session.speaker
    if not isinstance(speaker, MaskedModel):
        return Prefill(session, settings)
    require_no_thinking(speaker, settings)
    return Replay(speaker, session.batch_size, read_steps(study), settings)


def probe_of(study: Study) -> str:
    """Return the name of the probe that is read along, if there is one."""
    return STEP_PROBE if kind_of(study) == "diffusion" else "published"


def fit_step_probe(
    study: Study,
    session: Session,
    rows: Sequence[Rollout],
    states: Float[Tensor, "example step d_model"],
) -> list[str]:
    """Fit a refusal probe on the last pooled states of a diffusion model's anchors.

    `holdfast probe` reads models that write from left to right; this is its rival of
    the signal here. Beside it is the direction of first answer tokens, where the
    states that predict them are unembedded as they are.

    Args:
        study: Where it goes.
        session: The model.
        rows: Rows of the published anchors.
        states: Their pooled states.

    Returns:
        The files; none for a model that writes from left to right, or where one
        outcome is missing.
    """
    speaker, refused = session.speaker, is_refused(rows)
    sides = [
        {
            row.request_id
            for row, is_one in zip(rows, refused.tolist(), strict=True)
            if is_one == side
        }
        for side in (False, True)
    ]
    least = min(len(side) for side in sides)
    if not isinstance(speaker, MaskedModel) or least < 2:
        return []
    probe = fit_probe(
        states[:, -1],
        refused,
        clusters=requests_of(rows),
        seed=study_seed(study),
        folds=min(FOLDS, least),
    )
    more = {}
    head = getattr(speaker.model, "lm_head", None)
    if head is not None:
        weights = head.weight.detach()
        tokens = torch.tensor([row.token_ids[row.spans.answer[0]] for row in rows])
        unembedded = weights[tokens.to(weights.device)].float().cpu()
        more["difference"] = unembedded[refused].mean(0) - unembedded[~refused].mean(0)
    facts = {"model": model_fingerprint(study), "site": "final_norm", "pooled": True}
    write_probe(study, STEP_PROBE, probe, facts, **more)
    return list(names(STEP_PROBE))
