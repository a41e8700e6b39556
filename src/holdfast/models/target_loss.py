"""How unlikely a model finds given tokens: the mean loss on part of each sequence."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.models.batching import longest_first, pad, with_batch_halving
from holdfast.models.capture import check_lengths
from holdfast.models.finite import check_finite
from holdfast.models.parts import Adapter


def target_losses(
    adapter: Adapter,
    sequences: Sequence[Sequence[int]],
    targets: Sequence[tuple[int, int]],
    *,
    batch_size: int = 16,
) -> Float[Tensor, "example"]:
    """Return the mean negative log-likelihood of a range of tokens.

    One prefill a sequence. Logits are computed where they are needed alone, row by
    row, since those of a whole batch may be larger than the model.

    Args:
        adapter: The model.
        sequences: Token ids, in any order and of any lengths.
        targets: Half-open range of each sequence, after its first token; an empty
            one has no loss.
        batch_size: Sequences a pass; halved whenever memory runs out.

    Returns:
        Losses in nats a token, in the order given; not a number for an empty range.

    Raises:
        InputError: If a sequence is empty or longer than the model is sound for.
        SettingsError: If the batch size is not positive.
        ModelError: If a logit is not finite.
        EnvironmentProblem: If one sequence alone does not fit in memory.
    """
    check_lengths(adapter, sequences)

    def read_batch(rows: Sequence[int]) -> list[float]:
        batch = pad([sequences[row] for row in rows], "right", adapter.device)
        with torch.inference_mode():
            states = adapter.base(**batch.inputs(), use_cache=False).last_hidden_state
            return [
                _loss(adapter, states[place], sequences[row], targets[row])
                for place, row in enumerate(rows)
            ]

    order = longest_first(sequences)
    found, _ = with_batch_halving(read_batch, order, batch_size)
    losses = torch.empty(len(sequences), dtype=torch.float64)
    losses[order] = torch.tensor(found, dtype=torch.float64)
    return losses


def _loss(
    adapter: Adapter,
    states: Float[Tensor, "position d_model"],
    sequence: Sequence[int],
    target: tuple[int, int],
) -> float:
    start, end = target
    if start >= end:
        return float("nan")
    logits = adapter.lm_head(states[start - 1 : end - 1]).float()
    check_finite(logits.sum(), "the logits of a sequence")
    expected = torch.tensor(list(sequence[start:end]), device=logits.device)
    return float(torch.nn.functional.cross_entropy(logits, expected))
