"""Write an edit of heads as weights or as an adapter, with a model card beside.

A head that is scaled at every position is a head whose columns of the output
projection are scaled. For a factor of 0 both give the same numbers, bit for bit.
The same change of weights is a LoRA adapter: A selects those columns, and B is what
is added to them. Merged, a factor of 0 leaves exact zeros; beside the base, sums are
taken in another order and agree to rounding.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from holdfast.errors import ModelError, SettingsError
from holdfast.models.containers.quantised import is_packed
from holdfast.models.folds import is_plain
from holdfast.models.interventions import HeadEdit, check_table
from holdfast.models.library import quietly
from holdfast.models.loading.checkpoint import name_base
from holdfast.models.loading.files import ADAPTER_CONFIG, ADAPTER_STEM, BAKE_RECORD
from holdfast.models.model import Adapter, ModelIdentity
from holdfast.study import atomic_write_json
from holdfast.study.files import staging, writing

FORMAT = "holdfast-bake/1"
MAX_SHARD_SIZE = "5GB"
Form = Literal["checkpoint", "adapter"]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` of vLLM may be, up to version 0.33."""


@contextmanager
def baking(
    adapter: Adapter,
    edit: HeadEdit,
    directory: Path,
    *,
    provenance: Mapping[str, Any],
    form: Form = "checkpoint",
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> Iterator[Path]:
    """Bake a model into a directory beside its final place, to be tried out first.

    When the context ends well, the directory appears under its own name, whole. When
    it ends with an error, nothing is left. The model in memory is never touched.

    `directory`: Where the checkpoint shall lie; it must not exist, or be empty.
    `provenance`: What else to record: the study, seeds, figures.
    `form`: A whole checkpoint, or a LoRA adapter of PEFT over the model as it was read.

    Yields:
        The directory in its temporary place, complete: `holdfast_bake.json` beside
        weights, tokenizer and generation config, or beside the two files of an
        adapter. A model card may be added.

    Raises:
        SettingsError: If weights cannot hold the edit, or it changes nothing.
        InputError: If the directory has something in it.
        ModelError: If weights are packed, an adapter would lie over another, or
            transformers will not write the model's own settings.
        StorageError: If the disk is full or not ours to write.
    """
    _check_edit(adapter, edit)
    _check_form(adapter, edit, form)
    with staging(directory) as staged:
        with writing(directory):
            if form == "adapter":
                _write_adapter(adapter, edit, staged)
            else:
                _write(adapter, edit, staged, max_shard_size)
            record = _record(adapter, edit, form) | {"provenance": dict(provenance)}
            atomic_write_json(staged / BAKE_RECORD, record)
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


def _check_form(adapter: Adapter, edit: HeadEdit, form: Form) -> None:
    """Refuse packed weights, and an adapter over a base that no name leads to."""
    source = adapter.source
    changed = [layer.projection for layer in _edited(adapter, edit)]
    unread = [each for each in changed if not is_plain(each)]
    method = None if source is None else source.quantised
    whole = form == "checkpoint" and (method is not None or is_packed(adapter.model))
    if unread or whole:
        found = f"weights packed by {method}" if method else "packed weights"
        if unread:
            weight: Any = getattr(unread[0], "weight", None)
            kind = str(getattr(weight, "dtype", None)).removeprefix("torch.")
            found += f": a {type(unread[0]).__name__} of {kind}"
        also = "" if unread else ", or write an adapter over this one (`--as adapter`)"
        raise ModelError(
            "weights that can be written as the numbers that the model multiplies with",
            found,
            f"Bake the unquantised model{also}. `holdfast ablate` takes this one.",
        )
    if form == "adapter" and source is not None and source.adapter is not None:
        raise ModelError(
            "a whole model under the adapter that is written",
            f"another adapter, {source.adapter}",
            "Bake a whole checkpoint (`--as checkpoint`): it holds both.",
        )


class _Layer(NamedTuple):
    """A layer in which heads are scaled."""

    name: str  # Path of its output projection in the model.
    projection: nn.Linear
    # By what each column of its weight is multiplied.
    columns: Float[Tensor, "heads"]


def _edited(adapter: Adapter, edit: HeadEdit) -> Iterator[_Layer]:
    names = {id(module): name for name, module in adapter.model.named_modules()}
    for layer in torch.argwhere((edit.factors != 1).any(-1))[:, 0].tolist():
        projection, factors = adapter.output_projection(layer), edit.factors[layer]
        columns = factors.repeat_interleave(projection.in_features // len(factors))
        yield _Layer(names[id(projection)], projection, columns)


def _write_adapter(adapter: Adapter, edit: HeadEdit, directory: Path) -> None:
    # PEFT takes a second to import, and most runs do without it.
    from peft import LoraConfig

    layers, rank = list(_edited(adapter, edit)), adapter_rank(adapter, edit)
    # One rank for all layers, and patterns for none: of servers, some read the scaling
    # of the whole adapter from the file, some divide by the rank of each tensor.
    config = LoraConfig(
        r=rank, lora_alpha=rank, task_type="CAUSAL_LM", inference_mode=True
    ).to_dict()
    # A set would be written in another order by every process.
    config["target_modules"] = [layer.name for layer in layers]
    atomic_write_json(directory / ADAPTER_CONFIG, config)
    name_base(directory, adapter.source)
    weights: dict[str, Tensor] = {}
    for layer in layers:
        weight = layer.projection.weight.detach().cpu()
        found = _changed(layer)
        selection = weight.new_zeros((rank, weight.shape[1]))
        selection[torch.arange(len(found)), found] = 1
        change = weight.new_zeros((weight.shape[0], rank))
        added = weight[:, found].float() * (layer.columns[found] - 1)
        change[:, : len(found)] = added.to(weight.dtype)
        for letter, tensor in (("A", selection), ("B", change)):
            weights[f"base_model.model.{layer.name}.lora_{letter}.weight"] = tensor
    file = directory / f"{ADAPTER_STEM}.safetensors"
    save_file(weights, file, metadata={"format": "pt"})


def adapter_rank(adapter: Adapter, edit: HeadEdit) -> int:
    """Return the rank of an edit: the most columns that it changes in a layer."""
    return max(1, *(len(_changed(layer)) for layer in _edited(adapter, edit)))


def _changed(layer: _Layer) -> Int[Tensor, "_"]:
    """Return the columns that an edit changes; one of zeros stays what it is."""
    changed = layer.columns != 1
    if is_plain(layer.projection):
        changed &= layer.projection.weight.detach().cpu().any(0)
    return torch.argwhere(changed)[:, 0]


def serving(rank: int) -> str:
    """Return what a server must allow for an adapter of a rank, as a sentence."""
    allowed = next((each for each in VLLM_RANKS if each >= rank), None)
    if allowed is None:
        return (
            f"Its rank of {rank} is more than the {VLLM_RANKS[-1]} that vLLM takes: "
            "for such a server, take a whole checkpoint, or fewer heads of one layer."
        )
    return (
        f"A server has to allow its rank of {rank}: for vLLM, `--enable-lora "
        f"--max-lora-rank {allowed}`."
    )


def _write(
    adapter: Adapter, edit: HeadEdit, directory: Path, max_shard_size: str | int
) -> None:
    state = adapter.model.state_dict()
    for name, projection, columns in _edited(adapter, edit):
        state[f"{name}.weight"] = _scaled(projection.weight, columns)
    with quietly():
        adapter.model.save_pretrained(
            directory, state_dict=state, max_shard_size=max_shard_size
        )
    if adapter.tokenizer is not None:
        adapter.tokenizer.save_pretrained(directory)


def _scaled(
    weight: Float[Tensor, "d_model heads"], columns: Float[Tensor, "heads"]
) -> Float[Tensor, "d_model heads"]:
    scaled = weight.detach() * columns.to(weight)
    # A product with 0 has a sign, and a sum of negative zeros is negative.
    return torch.where(columns.to(weight.device) == 0, torch.zeros_like(scaled), scaled)


def _record(adapter: Adapter, edit: HeadEdit, form: Form) -> dict[str, Any]:
    heads = edited_heads(edit)
    return {
        "format": FORMAT,
        "form": form,
        "rank": adapter_rank(adapter, edit) if form == "adapter" else None,
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
    identity: ModelIdentity,
    edit: HeadEdit,
    measured: Sequence[Measured],
    rank: int | None = None,
) -> str:
    """Return the README of a baked checkpoint or adapter.

    `measured`: Figures of base and baked model on the same held-out prompts.
    `rank`: Rank of the adapter; None for a whole checkpoint.
    """
    heads = edited_heads(edit)
    whole = rank is None
    return _card(
        "bake",
        head=_head(
            identity,
            "finetune" if whole else "adapter",
            "transformers" if whole else "peft",
            "head-ablation",
        ),
        base=_base(identity),
        use=[] if rank is None else ["", f"{_ADAPTER} {serving(rank)}", ""],
        what="checkpoint" if whole else "adapter",
        count="1 head was" if len(heads) == 1 else f"{len(heads)} heads were",
        record=BAKE_RECORD,
        heads=[f"| {h['layer']} | {h['head']} | {h['factor']:g} |" for h in heads],
        figures=[f"| {m.name} | {m.before} | {m.after} | {m.n} |" for m in measured],
    )


_ADAPTER = (
    "A LoRA adapter over that base, which a server can switch on for each request. It "
    "changes those columns alone, at a scaling of 1: scaled otherwise, it is another "
    "edit."
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
