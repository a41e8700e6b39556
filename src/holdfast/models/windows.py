"""The last states of token sequences, reduced row by row on the device.

What a model reads at the end of each sequence is enough for the step-wise signal of a
text that is written from left to right: the state from which each token was predicted
is that of the token before it, whether the text was decoded with a cache or is read
again in one pass.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.errors import InputError
from holdfast.models.batching import longest_first, pad, with_batch_halving
from holdfast.models.capture import Site, check_lengths, watched
from holdfast.models.finite import check_finite
from holdfast.models.parts import Adapter

ReduceRow = Callable[[Float[Tensor, "position d_model"]], Tensor]


def read_windows(
    adapter: Adapter,
    sequences: Sequence[Sequence[int]],
    counts: Sequence[int],
    reduce: ReduceRow,
    *,
    site: Site = "final_norm",
    batch_size: int = 16,
) -> list[Tensor]:
    """Run the base model over sequences and reduce the last states of each.

    Args:
        adapter: The model.
        sequences: Token ids, in any order and of any lengths.
        counts: How many of the last states of each sequence are read, from 1.
        reduce: From those of one row, in float32 on the device, to a tensor. It must
            not keep the states.
        site: As in `read_states`.
        batch_size: Sequences a pass; halved whenever memory runs out.

    Returns:
        What `reduce` returned for each sequence, in the order given, on the CPU.

    Raises:
        InputError: If a sequence is empty or longer than the model is sound for, or
            has fewer tokens than are to be read.
        SettingsError: If the site or the batch size is out of range.
        EnvironmentProblem: If one sequence alone does not fit in memory.
    """
    check_lengths(adapter, sequences)
    for index, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        if not 1 <= count <= len(sequence):
            raise InputError(
                f"1 to {len(sequence)} states to read of sequence {index}",
                str(count),
                "Read no more than the sequence has.",
            )
    order = longest_first(sequences)

    def read_batch(rows: Sequence[int]) -> list[Tensor]:
        # Attention is causal, so what stands on the right of a row is never seen.
        batch = pad([sequences[row] for row in rows], "right", adapter.device)
        found: list[Tensor] = []

        def read(states: Tensor) -> None:
            for row, part in zip(rows, states, strict=True):
                end = len(sequences[row])
                found.append(reduce(part[end - counts[row] : end]))

        with torch.inference_mode(), watched(adapter, site, read):
            adapter.base(**batch.inputs(), use_cache=False)
        # Copied outside inference mode: the results are ordinary tensors.
        copies = [each.to("cpu").clone() for each in found]
        for row, copy in zip(rows, copies, strict=True):
            check_finite(copy, f"the states of sequence {row}")
        return copies

    results, _ = with_batch_halving(read_batch, order, batch_size)
    by_sequence = dict(zip(order, results, strict=True))
    return [by_sequence[row] for row in range(len(sequences))]
