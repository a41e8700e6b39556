"""Edits of heads as adapters of an engine: written, held side by side, and proved."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from holdfast.engines.port import Ask, Engine
from holdfast.engines.proof import NEAR_TIE, greedy_and_short, in_order, next_logits
from holdfast.errors import EngineError, ModelError, SettingsError
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Completion, Sampling
from holdfast.models.export import VLLM_RANKS, adapter_rank, baking
from holdfast.models.interventions import HeadEdit, scale_heads
from holdfast.models.model import Adapter

PROVED, TOLERANCE = 16, 0.25
"""Fewest rows that are drawn both ways, of each adapter one, and the share of them that
may differ elsewhere."""


def hold_edits(
    engine: Engine,
    adapter: Adapter,
    edits: Mapping[str, HeadEdit],
    directory: Path,
    provenance: Mapping[str, Any],
) -> dict[str, str]:
    """Write edits as adapters into a directory, and let the engine hold them.

    What lay in the directory goes.

    Returns:
        Why some edits are not held, by their names.
    """
    shutil.rmtree(directory, ignore_errors=True)
    left_out: dict[str, str] = {}
    places: dict[str, Path] = {}
    for name, edit in edits.items():
        rank = adapter_rank(adapter, edit)
        if rank > VLLM_RANKS[-1]:
            left_out[name] = f"a rank of {rank}, of {VLLM_RANKS[-1]} that vLLM takes"
            continue
        place = directory / name
        try:
            with baking(adapter, edit, place, provenance=provenance, form="adapter"):
                places[name] = place
        except ModelError as error:
            left_out[name] = error.found
    try:
        if places:
            engine.hold(places)
    except SettingsError as error:
        left_out |= dict.fromkeys(places, f"no place in the engine ({error.found})")
    return left_out


def prove_edits(
    engine: Engine,
    adapter: Adapter,
    asks: Sequence[Ask],
    edits: Mapping[str, HeadEdit],
    sampling: Sampling,
) -> dict[str, Any]:
    """Draw rows by the engine's adapters and by the hooked model, and compare them.

    `asks`: Rows of adapters; some of each are taken.

    Returns:
        How many rows are equal token for token, and where the others part.

    Raises:
        EngineError: If too many part where it was no near-tie.
    """
    tried = _some_of_each(asks)
    few = greedy_and_short(sampling)
    own = [edits[each.condition or ""] for each in tried]
    edit = HeadEdit(torch.stack([each.factors for each in own]))
    prompts = [(each.token_ids, each.seed) for each in tried]
    hooked = in_order(generate(adapter, prompts, few, edit=edit))
    drawn = in_order(engine.draw(tried, few))
    apart = [
        {"condition": ask.condition} | found
        for ask, one, a, b in zip(tried, own, hooked, drawn, strict=True)
        if (found := _parted(adapter, one, a, b)) is not None
    ]
    far = [each for each in apart if each["gap"] >= NEAR_TIE]
    if len(far) > TOLERANCE * len(tried):
        raise EngineError(
            f"adapters that answer as the model does without those heads, in all but "
            f"{TOLERANCE:.0%} of {len(tried)} rows",
            f"{len(far)} that differ where it was no near-tie, the first under "
            f"{far[0]['condition']} at token {far[0]['token']} with a gap of "
            f"{far[0]['gap']:.2f}",
            "Use --engine hf, or another version of the engine.",
        )
    return {
        "rows": len(tried),
        "equal": len(tried) - len(apart),
        "near_tie": NEAR_TIE,
        "apart": apart,
    }


def _some_of_each(asks: Sequence[Ask]) -> list[Ask]:
    """Return rows of every adapter, as many as are proved, by prompts far apart."""
    by_name: dict[str | None, list[Ask]] = {}
    for each in asks:
        by_name.setdefault(each.condition, []).append(each)
    turns = list(by_name.values())
    count = min(len(asks), max(PROVED, len(turns)))
    groups = [turns[place % len(turns)] for place in range(count)]
    return [own[place * len(own) // count] for place, own in enumerate(groups)]


def _parted(
    adapter: Adapter, edit: HeadEdit, ours: Completion, theirs: Completion
) -> dict[str, Any] | None:
    n_prompt = ours.spans.prompt[1]
    return parting(adapter, edit, n_prompt, ours.token_ids, theirs.token_ids)


def parting(
    adapter: Adapter,
    edit: HeadEdit,
    n_prompt: int,
    ours: Sequence[int],
    theirs: Sequence[int],
) -> dict[str, Any] | None:
    """Return the first token that differs, and what the hooked model gave its own.

    `ours`, `theirs`: Tokens of a row, its prompt of `n_prompt` tokens included.

    Returns:
        The place behind the prompt, and the difference of the two logits; None where
        one row begins with the other.
    """
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), None)
    if at is None:
        return None
    with scale_heads(adapter, edit):
        logits = next_logits(adapter, ours[:at])
    gap = float(logits[ours[at]] - logits[theirs[at]])
    return {"token": at - n_prompt, "gap": gap}
