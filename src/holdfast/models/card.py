"""Model cards: what was changed in a checkpoint, and what that changed."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from holdfast.models.bake import PROVENANCE, edited_heads
from holdfast.models.edits import HeadEdit
from holdfast.models.parts import ModelIdentity


class Measured(NamedTuple):
    """One line of the table, as text that a reader needs no key for.

    Attributes:
        name: What was measured, such as "attack success, wrapped harmful requests".
        before: Its value with the interval, on the base model.
        after: The same on the baked checkpoint.
        n: Prompts it was measured on.
    """

    name: str
    before: str
    after: str
    n: int


def model_card(
    identity: ModelIdentity, edit: HeadEdit, measured: Sequence[Measured]
) -> str:
    """Return the README of a baked checkpoint.

    Args:
        identity: The model that was edited. Its name goes into the card's metadata
            if it is on the Hub; the path of a directory does not.
        edit: The heads that were scaled.
        measured: Figures of base and baked model on the same held-out prompts.

    Returns:
        Markdown with a header of metadata.
    """
    heads = edited_heads(edit)
    return "\n".join(
        [
            *_head(identity, "finetune", "transformers", "head-ablation"),
            "# A model that keeps its refusal",
            "",
            _base(identity),
            "",
            f"{_count(len(heads))} scaled in the output projections, and nothing "
            "else was changed. They were chosen because they pull the model from "
            "refusal to compliance at the end of its thinking. How they were found is "
            f"recorded in `{PROVENANCE}`.",
            "",
            "| layer | head | factor |",
            "|---|---|---|",
            *(f"| {h['layer']} | {h['head']} | {h['factor']:g} |" for h in heads),
            "",
            "## Before and after",
            "",
            "Both columns were measured on the same held-out prompts; the second on "
            "this checkpoint as it lies here. Intervals are 95 %.",
            "",
            "| | base | this checkpoint | prompts |",
            "|---|---|---|---|",
            *(f"| {m.name} | {m.before} | {m.after} | {m.n} |" for m in measured),
            "",
            "The edit weakens one way past the model's refusal. It does not make the "
            "model safe.",
            "",
        ]
    )


def _count(n: int) -> str:
    return "1 head was" if n == 1 else f"{n} heads were"


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

    Args:
        identity: The model that was trained; the path of a directory is not told.
        adapter: Whether this is a PEFT adapter over it, and no whole model.
        record: Name of the file beside it with everything that was done.
        rows: What it was trained on: a name and what to say of it.
        settings: How it was trained; only what was used.
        thinks: Whether the model has a thinking format.
        defense: Options of the defense that was trained in; None for none.

    Returns:
        Markdown with a header of metadata.
    """
    kind = "adapter" if adapter else "finetune"
    library = "peft" if adapter else "transformers"
    what = "An adapter" if adapter else "A model"
    return "\n".join(
        [
            *_head(identity, kind, library, "supervised-fine-tuning"),
            f"# {what} trained to keep its refusal",
            "",
            _base(identity),
            "",
            f"{_aim(thinks, defended=defense is not None)} Everything that "
            f"was done is recorded in `{record}`.",
            "",
            "| rows | |",
            "|---|---|",
            *(f"| {name} | {said} |" for name, said in rows),
            "",
            "| setting | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in settings.items()),
            *(
                f"| defense: {name} | {value} |"
                for name, value in (defense or {}).items()
            ),
            "",
            "Nothing was measured on this checkpoint: evaluate and audit it before "
            "it is used. Training on refusals does not make a model safe.",
            "",
        ]
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


def _head(
    identity: ModelIdentity, relation: str, library: str, tag: str
) -> tuple[str, ...]:
    public = identity.revision is not None
    return (
        "---",
        *([f"base_model: {identity.model_id}"] if public else []),
        *([f"base_model_relation: {relation}"] if public else []),
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags:",
        "- holdfast",
        f"- {tag}",
        "- safety",
        "---",
        "",
    )


def _base(identity: ModelIdentity) -> str:
    public = identity.revision is not None
    base = identity.model_id if public else "a model that is not on the Hub"
    return (
        f"Base: {base}"
        + (f", revision `{identity.revision}`." if public else ".")
        + f" Fingerprint of its weights: `{identity.weights_sha256}`."
    )
