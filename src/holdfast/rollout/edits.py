"""An edit of heads from a file, and what is known of edits in the weights."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.errors import InputError
from holdfast.models.interventions import HeadEdit, check_heads, head_factors
from holdfast.models.loading.files import BAKE_RECORD
from holdfast.models.model import Adapter
from holdfast.study import fingerprint

_FORM = 'Write {"heads": [[layer, head], ...], "factor": 0}.'


class Edited(NamedTuple):
    """An edit that acts at every position, and its record."""

    edit: HeadEdit
    record: dict[str, Any]


def read_edit(source: str, adapter: Adapter) -> Edited:
    """Read which heads are scaled, and by how much.

    `source`: JSON file with `heads` as [layer, head] pairs, and `factor`, 0 unless
    said.
    """
    try:
        content = json.loads(Path(source).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"an edit at `{source}`", why, _FORM) from error
    heads = content.get("heads") if isinstance(content, dict) else None
    factor = content.get("factor", 0) if isinstance(content, dict) else 0
    if not isinstance(heads, list) or not heads or not all(map(_is_head, heads)):
        raise InputError(f"heads in `{source}`", repr(content)[:80], _FORM)
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        raise InputError(f"a number as factor in `{source}`", repr(content)[:80], _FORM)
    pairs = sorted({(layer, head) for layer, head in heads})
    check_heads(adapter, pairs)
    record = {"heads": [list(pair) for pair in pairs], "factor": float(factor)}
    record["sha256"] = fingerprint(record)
    return Edited(HeadEdit(head_factors(adapter, pairs, factor)), record)


def baked(name: str) -> dict[str, Any] | None:
    """Return what a checkpoint says of the edit that was baked into it, if any."""
    path = Path(name).expanduser() / BAKE_RECORD
    try:
        provenance: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return provenance


def _is_head(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(each, int) and not isinstance(each, bool) for each in value)
    )
