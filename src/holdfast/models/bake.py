"""Write an edit of heads into the weights, as a checkpoint that needs no Holdfast.

A head that is scaled at every position is a head whose columns of the output
projection are scaled. For a factor of 0 both give the same numbers, bit for bit.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.errors import SettingsError
from holdfast.models.edits import HeadEdit, check_table
from holdfast.models.loading import quietly
from holdfast.models.parts import Adapter
from holdfast.models.staging import staging, writing
from holdfast.study import atomic_write_json

PROVENANCE = "holdfast_bake.json"
FORMAT = "holdfast-bake/1"
MAX_SHARD_SIZE = "5GB"


@contextmanager
def baking(
    adapter: Adapter,
    edit: HeadEdit,
    directory: Path,
    *,
    provenance: Mapping[str, Any],
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> Iterator[Path]:
    """Bake a model into a directory beside its final place, to be tried out first.

    When the context ends well, the directory appears under its own name, whole. When
    it ends with an error, nothing is left. The model in memory is never touched.

    Args:
        adapter: The model; its weights are written in the arithmetic it runs in.
        edit: Heads to scale, at every position and without renormalisation.
        directory: Where the checkpoint shall lie; it must not exist, or be empty.
        provenance: What else to record: the study, seeds, figures.
        max_shard_size: Largest file of weights, as transformers reads it.

    Yields:
        The directory in its temporary place, complete: weights, tokenizer,
        generation config and `holdfast_bake.json`. A model card may be added.

    Raises:
        SettingsError: If weights cannot hold the edit, or it changes nothing.
        InputError: If the directory has something in it.
        ModelError: If transformers will not write the model's own settings.
        StorageError: If the disk is full or not ours to write.
    """
    _check_edit(adapter, edit)
    with staging(directory) as staged:
        with writing(directory):
            _write(adapter, edit, staged, max_shard_size)
            record = _record(adapter, edit) | {"provenance": dict(provenance)}
            atomic_write_json(staged / PROVENANCE, record)
        yield staged


def bake(
    adapter: Adapter,
    edit: HeadEdit,
    directory: Path,
    *,
    provenance: Mapping[str, Any],
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> Path:
    """Bake a model without trying it out first (see `baking`).

    Args:
        adapter: The model.
        edit: Heads to scale, at every position and without renormalisation.
        directory: Where the checkpoint shall lie.
        provenance: What else to record.
        max_shard_size: Largest file of weights.

    Returns:
        The directory.

    Raises:
        HoldfastError: As `baking`.
    """
    with baking(
        adapter, edit, directory, provenance=provenance, max_shard_size=max_shard_size
    ):
        pass
    return directory


def edited_heads(edit: HeadEdit) -> list[dict[str, int | float]]:
    """Return layer, head and factor of each head that an edit scales."""
    return [
        {"layer": layer, "head": head, "factor": float(edit.factors[layer, head])}
        for layer, head in torch.argwhere(edit.factors != 1).tolist()
    ]


def _check_edit(adapter: Adapter, edit: HeadEdit) -> None:
    check_table(adapter, edit.factors)
    found = []
    if edit.ranges is not None:
        found.append("one at chosen positions")
    if edit.renormalise != "none":
        found.append(f"one with renormalisation by {edit.renormalise}")
    if not edited_heads(edit):
        found.append("one that scales no head")
    if found:
        raise SettingsError(
            "an edit that weights can hold: some head scaled, at every position, "
            "without renormalisation",
            ", ".join(found),
            "Evaluate that one with `holdfast ablate`; bake one that weights can hold.",
        )


def _write(
    adapter: Adapter, edit: HeadEdit, directory: Path, max_shard_size: str | int
) -> None:
    state = adapter.model.state_dict()
    names = {id(module): name for name, module in adapter.model.named_modules()}
    for layer in torch.argwhere((edit.factors != 1).any(-1))[:, 0].tolist():
        projection = adapter.output_projection(layer)
        key = f"{names[id(projection)]}.weight"
        state[key] = _scaled(projection.weight, edit.factors[layer])
    with quietly():
        adapter.model.save_pretrained(
            directory, state_dict=state, max_shard_size=max_shard_size
        )
    if adapter.tokenizer is not None:
        adapter.tokenizer.save_pretrained(directory)


def _scaled(
    weight: Float[Tensor, "d_model heads"], factors: Float[Tensor, "head"]
) -> Float[Tensor, "d_model heads"]:
    columns = factors.repeat_interleave(weight.shape[1] // len(factors))
    scaled = weight.detach() * columns.to(weight)
    # A product with 0 has a sign, and a sum of negative zeros is negative.
    return torch.where(columns.to(weight.device) == 0, torch.zeros_like(scaled), scaled)


def _record(adapter: Adapter, edit: HeadEdit) -> dict[str, Any]:
    heads = edited_heads(edit)
    return {
        "format": FORMAT,
        "base": asdict(adapter.identity),
        "heads": heads,
        "n_heads": len(heads),
        "n_heads_in_model": adapter.n_layers * adapter.n_heads,
        "positions": "every position",
        "renormalise": edit.renormalise,
        "versions": {
            name: version(name) for name in ("holdfast", "torch", "transformers")
        },
    }
