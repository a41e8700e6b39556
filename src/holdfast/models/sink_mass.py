"""The sink mass of every head on given texts, one prefill each."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.errors import InputError
from holdfast.models.attention import ARGUMENT, SinkProbe, tapped
from holdfast.models.batching import Side, batched, pad
from holdfast.models.finite import check_finite
from holdfast.models.hidden_states import check_lengths
from holdfast.models.model import Adapter


class SinkReading(NamedTuple):
    """What was read of each text."""

    # Mean sink mass of each head; 0 where `seen` is.
    mass: Float[Tensor, "example layer head"]
    # Queries that each mean is over; 0 in a layer without attention.
    seen: Int[Tensor, "example layer"]


def read_sinks(
    adapter: Adapter,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int] | None = None,
    *,
    batch_size: int = 16,
    padding_side: Side = "right",
) -> SinkReading:
    """Run the base model over texts and average how much heads look at the first token.

    `starts`: Position of each text from which on queries are averaged; by default all
    but the first, which can look at nothing else.

    Returns:
        Means in float32 on the CPU, in the order of the texts.

    Raises:
        AdapterError: If heads of this model cannot be read.
        UnsupportedFamilyError: If the model's attention cannot be tapped.
        InputError: If a text is empty or longer than the model is sound for, or there
            is not one start for each.
    """
    adapter.require("heads")
    check_lengths(adapter, sequences)
    layers, heads, own = adapter.n_layers, adapter.n_heads, adapter.layers_with_heads
    begin = [1] * len(sequences) if starts is None else list(starts)
    if len(begin) != len(sequences):
        raise InputError(
            f"a start for each of {len(sequences)} texts",
            f"{len(begin)} starts",
            "Give one for each, or none.",
        )

    def read(rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        batch = pad([sequences[row] for row in rows], padding_side, adapter.device)
        first = torch.tensor([begin[row] for row in rows], device=adapter.device)
        counted = batch.positions() >= first[:, None]
        with torch.inference_mode():
            probe = SinkProbe(batch.mask, counted=counted, layers=own)
            adapter.base(**batch.inputs(), use_cache=False, **{ARGUMENT: probe})
            mass = torch.zeros((len(rows), layers, heads))
            seen = torch.zeros((len(rows), layers), dtype=torch.long)
            mass[:, own], seen[:, own] = probe.mass().cpu(), probe.seen().cpu()
        check_finite(mass, "the attention of a text")
        # Copied outside inference mode, so that what is returned is ordinary.
        return list(zip(mass.clone(), seen.clone(), strict=True))

    with tapped(adapter.model):
        found = batched(read, sequences, batch_size)
    if not found:
        return SinkReading(
            torch.zeros((0, layers, heads)), torch.zeros((0, layers), dtype=torch.long)
        )
    return SinkReading(*(torch.stack(values) for values in zip(*found, strict=True)))
