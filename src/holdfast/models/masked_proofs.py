"""What is shown on a dummy batch before a masked-diffusion model is decoded with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from holdfast.models.batching import Side, pad
from holdfast.models.parts import Proof
from holdfast.models.proofs import DUMMY_LENGTHS, DUMMY_SEED, LIMITS

if TYPE_CHECKING:
    from holdfast.models.masked import MaskedModel


def prove_masked(masked: "MaskedModel") -> tuple[Proof, ...]:
    """Check what decoding rests on, with two short rows of random tokens.

    Nothing of the model is changed when this returns.

    Args:
        masked: The model.

    Returns:
        One proof for each part of the contract, passed or not.
    """
    generator = torch.Generator().manual_seed(DUMMY_SEED)
    vocab = masked.embedding.num_embeddings
    rows = [
        torch.randint(vocab, (length,), generator=generator).tolist()
        for length in DUMMY_LENGTHS
    ]
    with torch.no_grad():
        return (
            _two_way(masked, rows[0]),
            *(_padding(masked, rows, side) for side in ("left", "right")),
            _final_norm(masked, rows[0]),
            _logits(masked, rows[0]),
        )


def _states(
    masked: "MaskedModel", rows: Sequence[Sequence[int]], side: Side = "left"
) -> list[Float[Tensor, "position d_model"]]:
    batch = pad(rows, side, masked.device)
    padded = {}
    if not bool(batch.mask.all()):
        padded = {
            "attention_mask": batch.mask.long(),
            "position_ids": batch.positions(),
        }
    states = masked.base(input_ids=batch.token_ids, **padded).last_hidden_state
    return [states[row][batch.mask[row]].float() for row in range(len(rows))]


def _proof(name: str, value: float, limit: float, detail: str) -> Proof:
    # A comparison with NaN is false, so a model that returns NaN never passes.
    return Proof(name, value <= limit, value, limit, detail)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _two_way(masked: "MaskedModel", row: Sequence[int]) -> Proof:
    other = [*row[:-1], (row[-1] + 1) % masked.embedding.num_embeddings]
    [states] = _states(masked, [row])
    [changed] = _states(masked, [other])
    # Position by position, since one of a large norm may hardly move.
    moves = (changed - states).norm(dim=-1) / states.norm(dim=-1)
    moved = float(moves[:-1].max())
    limit = LIMITS[masked.dtype].one_step
    return _proof(
        "attention goes both ways",
        0.0 if moved > limit else float("inf"),
        0.0,
        "the state of a token moves with one that comes after it; infinite if none "
        "does",
    )


def _padding(masked: "MaskedModel", rows: Sequence[Sequence[int]], side: Side) -> Proof:
    alone = torch.cat([_states(masked, [row])[0] for row in rows])
    padded = torch.cat(_states(masked, rows, side))
    return _proof(
        f"{side}-padded and unpadded rows give the same states",
        _relative(padded, alone),
        LIMITS[masked.dtype].whole_pass,
        "norm of the difference over all positions, relative to that of the states",
    )


def _final_norm(masked: "MaskedModel", row: Sequence[int]) -> Proof:
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        seen.append((arguments[0], output))

    handle = masked.final_norm.register_forward_hook(hook)
    try:
        [states] = _states(masked, [row])
    finally:
        handle.remove()
    ((entering, leaving),) = seen
    same = torch.equal(leaving[0].float(), states)
    applied = not torch.equal(entering, leaving)
    return _proof(
        "states are read after the final norm",
        0.0 if same and applied else float("inf"),
        0.0,
        "the norm runs once, changes what it takes, and what it returns is the base "
        "model's last state; bit for bit",
    )


def _logits(masked: "MaskedModel", row: Sequence[int]) -> Proof:
    token_ids = torch.tensor([row], device=masked.device)
    logits = masked.model(input_ids=token_ids).logits
    states = masked.base(input_ids=token_ids).last_hidden_state
    return _proof(
        "logits are the head of the state after the final norm",
        _relative(masked.head(states), logits),
        LIMITS[masked.dtype].one_step,
        "all positions, norm of the difference relative to that of the logits",
    )
