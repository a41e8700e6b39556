"""Does this model fit? What was proved on loading, as a table."""

import math
from collections.abc import Sequence
from typing import Any

from holdfast.errors import AdapterError
from holdfast.models.parts import Adapter, Proof
from holdfast.session.asking import template_notes
from holdfast.session.context import Session


def run(session: Session) -> dict[str, Any]:
    """Load a model and return what was proved.

    Args:
        session: Which model, and how it is loaded.

    Returns:
        The model's record, its parts, its proofs, and what is to be known of its
        chat template.

    Raises:
        HoldfastError: If the model is not there or does not fit; the message names
            every proof that failed, and `refused` shows them beside the others.
    """
    speaker = session.speaker
    parts = {"d_model": speaker.d_model, "max_positions": speaker.max_positions}
    if isinstance(speaker, Adapter):
        heads = {"heads": speaker.n_heads, "head_width": speaker.head_width}
        parts = {"layers": speaker.n_layers, **heads, **parts}
    else:
        parts["mask_token_id"] = speaker.mask_id
    return {
        "model": session.model_record(),
        "parts": parts,
        "proofs": _rows(speaker.proofs),
        "notes": template_notes(speaker),
    }


def refused(session: Session, error: AdapterError) -> dict[str, Any]:
    """Return what was proved about a model that does not fit, and what was not.

    Args:
        session: Which model.
        error: What `run` raised.

    Returns:
        The model's name, its proofs (none if a part of it is missing) and the error.
    """
    return {
        "model": {"id": session.name},
        "proofs": _rows(error.proofs),
        "error": str(error),
    }


def _rows(proofs: Sequence[Proof]) -> list[dict[str, Any]]:
    """Return proofs as JSON holds them, which has no NaN and no infinity."""
    rows = []
    for proof in proofs:
        row = proof._asdict()
        if proof.value is not None and not math.isfinite(proof.value):
            row |= {"value": None, "detail": f"{proof.detail} It was {proof.value}."}
        rows.append(row)
    return rows
