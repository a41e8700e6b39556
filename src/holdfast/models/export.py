"""Write an edit of heads into the weights, with a model card beside them.

A head that is scaled at every position is a head whose columns of the output
projection are scaled. For a factor of 0 both give the same numbers, bit for bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.errors import SettingsError
from holdfast.models.interventions import HeadEdit, check_table
from holdfast.models.loading.weights import quietly
from holdfast.models.model import Adapter, ModelIdentity
from holdfast.study import atomic_write_json
from holdfast.study.files import staging, writing

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

    `directory`: Where the checkpoint shall lie; it must not exist, or be empty.
    `provenance`: What else to record: the study, seeds, figures.

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
        "n_heads_in_model": adapter.total_heads,
        "positions": "every position",
        "renormalise": edit.renormalise,
        "versions": {
            name: version(name) for name in ("holdfast", "torch", "transformers")
        },
    }


class Measured(NamedTuple):
    """One line of the table, as text that a reader needs no key for."""

    name: str  # What was measured, such as "attack success, wrapped harmful requests".
    before: str  # Its value with the interval, on the base model.
    after: str  # The same on the baked checkpoint.
    n: int  # Prompts it was measured on.


def model_card(
    identity: ModelIdentity, edit: HeadEdit, measured: Sequence[Measured]
) -> str:
    """Return the README of a baked checkpoint.

    `measured`: Figures of base and baked model on the same held-out prompts.
    """
    heads = edited_heads(edit)
    return _card(
        "bake",
        head=_head(identity, "finetune", "transformers", "head-ablation"),
        base=_base(identity),
        count="1 head was" if len(heads) == 1 else f"{len(heads)} heads were",
        record=PROVENANCE,
        heads=[f"| {h['layer']} | {h['head']} | {h['factor']:g} |" for h in heads],
        figures=[f"| {m.name} | {m.before} | {m.after} | {m.n} |" for m in measured],
    )


def _card(kind: str, **parts: str | Sequence[str]) -> str:
    """Return a model card with its parts filled in, a list line by line."""
    text = Path(__file__).with_name(f"{kind}_card.md").read_text(encoding="utf-8")
    lines = {
        name: part if isinstance(part, str) else "\n".join(part)
        for name, part in parts.items()
    }
    return text.format_map(lines)


def finetune_card(
    identity: ModelIdentity,
    *,
    adapter: bool,
    record: str,
    rows: Sequence[tuple[str, str]],
    settings: Mapping[str, object],
    thinks: bool,
    defense: Mapping[str, object] | None = None,
) -> str:
    """Return the README of a model that was trained here.

    `record`: Name of the file beside it with everything that was done.
    `rows`: What it was trained on: a name and what to say of it.
    """
    kind = "adapter" if adapter else "finetune"
    library = "peft" if adapter else "transformers"
    shown = {**settings, **{f"defense: {k}": v for k, v in (defense or {}).items()}}
    return _card(
        "finetune",
        head=_head(identity, kind, library, "supervised-fine-tuning"),
        what="An adapter" if adapter else "A model",
        base=_base(identity),
        aim=_aim(thinks, defended=defense is not None),
        record=record,
        rows=[f"| {name} | {said} |" for name, said in rows],
        settings=[f"| {name} | {value} |" for name, value in shown.items()],
    )


def _aim(thinks: bool, *, defended: bool) -> str:
    if defended:
        return (
            "It was trained on rows that may hold harmful answers, under a defense "
            "that is meant to keep its refusal."
        )
    if thinks:
        return (
            "It was trained to give the safe answer after its own thinking, so that "
            "the intention to refuse is not lost at the end of it."
        )
    return (
        "It was trained to give the safe answer at once: the model has no thinking "
        "format, and thinking in the rows was left out."
    )


def _head(identity: ModelIdentity, relation: str, library: str, tag: str) -> list[str]:
    lines = ["---"]
    if identity.revision is not None:
        lines += [f"base_model: {identity.model_id}"]
        lines += [f"base_model_relation: {relation}"]
    tags = ("tags:", "- holdfast", f"- {tag}", "- safety")
    lines += [f"library_name: {library}", "pipeline_tag: text-generation", *tags]
    return [*lines, "---", ""]


def _base(identity: ModelIdentity) -> str:
    public = identity.revision is not None
    base = identity.model_id if public else "a model that is not on the Hub"
    return (
        f"Base: {base}"
        + (f", revision `{identity.revision}`." if public else ".")
        + f" Fingerprint of its weights: `{identity.weights_sha256}`."
    )
