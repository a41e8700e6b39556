"""What a logit does when heads are taken away at every token, many sets at a time.

One sequence is read once for all sets: its copies stand side by side as the rows of a
batch, each with its own heads scaled. Up to the first block in which any head is
scaled all rows would be the same, so that far one row is read, and then copied.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.models.batching import with_batch_halving
from holdfast.models.capture import check_lengths
from holdfast.models.causal import Effects
from holdfast.models.edits import (
    Head,
    HeadEdit,
    editing,
    first_layer,
    head_factors,
)
from holdfast.models.parts import Adapter
from holdfast.models.sharing import shared_rows


@torch.inference_mode()
def effects_everywhere(
    adapter: Adapter,
    sequences: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[Head]],
    direction: Float[Tensor, "d_model"],
    offset: int | float = 0.0,
    *,
    factor: int | float = 0.0,
    batch_size: int = 128,
) -> Effects:
    """Scale sets of heads at every token, and read the logit at the last one.

    The tokens stay as they are, so this is not what the model would say: a model
    without the heads may think something else.

    Args:
        adapter: The model.
        sequences: Token ids up to the token whose state is read.
        candidates: What is scaled together.
        direction: Direction in the space after the final norm.
        offset: The rest of the logit.
        factor: What heads are multiplied by.
        batch_size: Candidates in one pass; halved whenever memory runs out.

    Returns:
        Effects in float32 on the CPU, in the order of sequences and candidates.

    Raises:
        InputError: If a sequence has no tokens or too many.
        SettingsError: If the model has no such head.
        EnvironmentProblem: If one sequence alone does not fit in memory.
    """
    check_lengths(adapter, sequences)
    nothing: Sequence[Head] = ()
    tables = [head_factors(adapter, each, factor) for each in (nothing, *candidates)]
    unit = direction.to(adapter.device, torch.float32)
    size, lines = batch_size, []
    for sequence in sequences:
        ids = torch.tensor([list(sequence)], device=adapter.device)

        def run(part: Sequence[Tensor], ids: Tensor = ids) -> list[Tensor]:
            stacked = torch.stack(list(part))
            edit = HeadEdit(stacked)
            copies = torch.zeros(len(part), dtype=torch.long)
            first = first_layer(stacked)
            with editing(adapter, edit), shared_rows(adapter, first, copies):
                states = adapter.base(input_ids=ids, use_cache=False).last_hidden_state
            last = states[:, -1].float()
            return list((last @ unit.to(last.device) + offset).cpu())

        logits, size = with_batch_halving(run, tables, size)
        lines.append(torch.stack(logits))
    found = torch.stack(lines)
    return Effects(found[:, 0], found[:, 1:] - found[:, :1])
