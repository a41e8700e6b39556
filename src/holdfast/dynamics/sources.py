"""Where the signal comes from: anchors, probes and states by kind."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import load, save
from torch import Tensor

from holdfast.cliff.probe import FOLDS, fit_probe
from holdfast.cliff.probe_files import model_fingerprint, names, write_probe
from holdfast.dynamics.anchors import Anchors, separation
from holdfast.dynamics.settings import SignalSettings
from holdfast.dynamics.signal import Kind, positions_of
from holdfast.dynamics.states import (
    Prefill,
    Replay,
    StateSource,
    require_no_thinking,
)
from holdfast.errors import InputError
from holdfast.models.model import MaskedModel
from holdfast.rollout.rows import Rollout, is_refused, requests_of
from holdfast.rollout.sampling import read_steps
from holdfast.rollout.session import Session
from holdfast.study import Study, atomic_write_bytes, file_sha256
from holdfast.study.figures import DIGITS, study_seed

FOLDER = "anchors"
PUBLISHED, MATCHED = "published", "matched"
STEP_PROBE = "steps"
"""Name of the probe that is fitted on pooled states of a masked-diffusion model."""
_NEXT = "Fit anchors with these settings: run `holdfast signal` without --anchors."


class AnchorFile(NamedTuple):
    """Anchors that were read."""

    anchors: Anchors
    sha256: str  # Hash of their file.
    taken: frozenset[str]  # Base requests that they were fitted on.
    # Why there are no matched ones beside them, if there are none.
    matched_reason: str | None


def anchor_names(name: str) -> tuple[str, str]:
    """Return the two files of anchors: their tensors and their facts."""
    return f"{FOLDER}/{name}.safetensors", f"{FOLDER}/{name}.json"


def anchor_counts(anchors: Anchors) -> dict[str, Any]:
    """Return how many requests are behind anchors, and how far apart they are."""
    return {
        "n_compliant": anchors.n_compliant,
        "n_refused": anchors.n_refused,
        "separation": [round(each, DIGITS) for each in separation(anchors).tolist()],
    }


def write_anchors(
    study: Study, name: str, anchors: Anchors, facts: Mapping[str, Any]
) -> list[str]:
    """Write anchors with all that they belong to: `identity`, `taken` and others."""
    tensors_name, facts_name = anchor_names(name)
    tensors = {"compliant": anchors.compliant, "refused": anchors.refused}
    data = save({key: each.contiguous() for key, each in tensors.items()})
    atomic_write_bytes(study.path(tensors_name), data)
    study.write_json(facts_name, {**facts, **anchor_counts(anchors)})
    return [tensors_name, facts_name]


def read_anchors(
    directory: Path, name: str, identity: Mapping[str, Any]
) -> AnchorFile | None:
    """Read the anchors of a study, and refuse those of anything else.

    Returns: The anchors; None where the study has no matched ones.
    """
    tensors_path, facts_path = (directory / each for each in anchor_names(name))
    if name == MATCHED and not tensors_path.exists():
        return None
    try:
        facts = json.loads(facts_path.read_text(encoding="utf-8"))
        given = dict(facts["identity"])
        tensors = load(tensors_path.read_bytes())
        counts = int(facts["n_compliant"]), int(facts["n_refused"])
        anchors = Anchors(tensors["compliant"], tensors["refused"], *counts)
    # The reader of safetensors raises its own error, which is no ValueError.
    except Exception as error:
        raise InputError(
            f"anchors in {tensors_path.parent}",
            f"none that can be read ({type(error).__name__}: {error})",
            "Fit them with `holdfast signal`.",
        ) from error
    require_identity(given, identity)
    taken = frozenset(facts["taken"])
    digest = file_sha256(tensors_path)
    return AnchorFile(anchors, digest, taken, facts.get("matched_reason"))


def require_identity(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse what belongs to another model, sampler, number of steps or positions."""
    own, other = (_flat(each) for each in (wanted, found))
    keys = dict.fromkeys([*own, *other])
    different = [key for key in keys if own.get(key) != other.get(key)]
    if different:
        expected, given = (
            ", ".join(f"{key} {_short(each.get(key, 'unknown'))}" for key in different)
            for each in (own, other)
        )
        raise InputError(f"anchors of {expected}", given, _NEXT)


def _flat(identity: Mapping[str, Any]) -> dict[str, str]:
    """Return every part as JSON; parts of a part, such as the sampler's, one by one."""
    flat = {}
    for key, value in identity.items():
        parts = value if isinstance(value, Mapping) else {"": value}
        for name, each in parts.items():
            flat[f"{key}.{name}".rstrip(".")] = json.dumps(each, sort_keys=True)
    return flat


def _short(text: str) -> str:
    """Shorten a value for the message; the whole of it has been compared."""
    return text if len(text) <= 90 else f"{text[:60]}…{text[-20:]}"


def kind_of(study: Study) -> Kind:
    """Return how the answers of a study were decoded."""
    sampling = study.record("rollout")["settings"].get("sampling", {})
    return "diffusion" if "remasking" in sampling else "autoregressive"


def identity_of(study: Study, settings: SignalSettings) -> dict[str, Any]:
    """Return what states must share with those behind the anchors."""
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


def source_of(study: Study, settings: SignalSettings, session: Session) -> StateSource:
    """Return where states step by step come from."""
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

    Returns: The files; none for a model that writes from left to right, or where one
    outcome is missing.
    """
    speaker, refused = session.speaker, is_refused(rows)
    sides = [
        {row.request_id for row in rows if row.is_refused == side}
        for side in (False, True)
    ]
    least = min(map(len, sides))
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
