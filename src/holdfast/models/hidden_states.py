"""Hidden states and target losses, reduced where they are computed.

A pass costs one prefill of the base model: no head over the vocabulary, no cache,
and no state that outlives the hook that reads it.

What a model reads at the end of each sequence is enough for the step-wise signal of a
text that is written from left to right: the state from which each token was predicted
is that of the token before it, whether the text was decoded with a cache or is read
again in one pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from holdfast.errors import InputError, SettingsError
from holdfast.models.batching import Batch, Side, batched, pad
from holdfast.models.finite import check_finite
from holdfast.models.model import Adapter

Site = Literal["final_norm"] | int
Reduced = Tensor | tuple[Tensor, ...]
Reduce = Callable[
    [Float[Tensor, "example position d_model"], Bool[Tensor, "example position"]],
    Reduced,
]


@contextmanager
def watched(
    adapter: Adapter,
    site: Site,
    read: Callable[[Float[Tensor, "example position d_model"]], None],
) -> Iterator[None]:
    """Show the states at a site to a function, for as long as the context lasts.

    `site`: "final_norm" for the state after the final norm, or a block counted from 0
    for the residual stream after that block.
    `read`: Called once a forward pass, with the states in float32.

    Raises:
        SettingsError: If the model has no such block.
        AdapterError: If states of this model cannot be read.
    """

    def hook(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        read((output[0] if isinstance(output, tuple) else output).float())

    with site_module(adapter, site).register_forward_hook(hook):
        yield


def site_module(adapter: Adapter, site: Site) -> nn.Module:
    """Return the part of a model whose output is the state at a site."""
    adapter.require("states")
    if site == "final_norm":
        return adapter.final_norm
    if not 0 <= site < adapter.n_layers:
        raise SettingsError(
            f"`final_norm` or a block from 0 to {adapter.n_layers - 1}",
            str(site),
            "Name a site that the model has.",
        )
    return adapter.blocks[site].module


def read_states(
    adapter: Adapter,
    sequences: Sequence[Sequence[int]],
    reduce: Reduce,
    *,
    site: Site = "final_norm",
    batch_size: int = 16,
    padding_side: Side = "right",
    per_position: bool = True,
) -> list[Reduced]:
    """Run the base model over sequences and reduce the states at one site.

    Args:
        adapter: The model.
        sequences: Token ids, in any order and of any lengths.
        reduce: From the states of a batch, in float32 on the device, and the mask
            of its real tokens, to a tensor or a tuple of tensors whose first axis
            is the example. It must not keep the states.
        site: "final_norm", or a block counted from 0 (see `watched`).
        batch_size: Sequences per pass; halved whenever memory runs out.
        padding_side: Side of the padding; it changes no result by more than
            rounding.
        per_position: Whether the second axis of what `reduce` returns is the
            position. If so, padding is cut from it.

    Returns:
        For each sequence, in the order given, its part of what `reduce` returned,
        on the CPU, without the axis of the example.

    Raises:
        InputError: If a sequence is empty or longer than the model is sound for.
        SettingsError: If the site or the batch size is out of range.
        ModelError: If what was read is not finite.
        EnvironmentProblem: If one sequence alone does not fit in memory.
    """

    def split(rows: Sequence[int], batch: Batch, states: Tensor) -> list[Reduced]:
        reduced = reduce(states, batch.mask.to(states.device))
        # A copy of the whole row where there is no position axis to cut.
        kept = batch.mask.to("cpu") if per_position else [...] * len(rows)
        if isinstance(reduced, Tensor):
            values = reduced.to("cpu")
            return [values[row][kept[row]] for row in range(len(rows))]
        parts = [part.to("cpu") for part in reduced]
        return [
            tuple(part[row][kept[row]] for part in parts) for row in range(len(rows))
        ]

    return _read(adapter, sequences, split, site, batch_size, padding_side)


def _read(
    adapter: Adapter,
    sequences: Sequence[Sequence[int]],
    split: Callable[[Sequence[int], Batch, Tensor], list[Reduced]],
    site: Site,
    batch_size: int,
    padding_side: Side = "right",
) -> list[Reduced]:
    """Read the states of every batch and split what is kept of them into its rows."""
    check_lengths(adapter, sequences)

    def read_batch(rows: Sequence[int]) -> list[Reduced]:
        batch = pad([sequences[row] for row in rows], padding_side, adapter.device)
        parts: list[Reduced] = []

        def read(states: Tensor) -> None:
            parts.extend(split(rows, batch, states))

        with torch.inference_mode(), watched(adapter, site, read):
            adapter.states(batch)
        # Copied outside inference mode: ordinary tensors, each of its own size.
        copies: list[Reduced] = [
            part.clone() if isinstance(part, Tensor) else tuple(x.clone() for x in part)
            for part in parts
        ]
        for index, part in zip(rows, copies, strict=True):
            for values in [part] if isinstance(part, Tensor) else part:
                check_finite(values, f"the states of sequence {index}")
        return copies

    return batched(read_batch, sequences, batch_size)


def project_states(
    adapter: Adapter,
    sequences: Sequence[Sequence[int]],
    directions: Float[Tensor, "label d_model"],
    offset: Float[Tensor, "label"] | None = None,
    *,
    site: Site = "final_norm",
    batch_size: int = 16,
    padding_side: Side = "right",
) -> list[Float[Tensor, "position label"]]:
    """Return the score of every position on each direction.

    Returns:
        For each sequence `states @ directions.T + offset`, in float32 on the CPU.
    """
    rows = directions.to(adapter.device, torch.float32)
    shift = torch.zeros(len(rows)) if offset is None else offset
    shift = shift.to(adapter.device, torch.float32)

    def project(states: Tensor, mask: Tensor) -> Tensor:
        return states @ rows.T.to(states.device) + shift.to(states.device)

    scores = read_states(
        adapter,
        sequences,
        project,
        site=site,
        batch_size=batch_size,
        padding_side=padding_side,
    )
    return [score for score in scores if isinstance(score, Tensor)]


def final_states(
    adapter: Adapter,
    sequences: Sequence[Sequence[int]],
    positions: int | Sequence[int] = -1,
    *,
    site: Site = "final_norm",
    batch_size: int = 16,
    padding_side: Side = "right",
) -> Float[Tensor, "example d_model"]:
    """Return the state of each sequence at one position.

    Attention is causal, so what follows the position is cut off before the pass.

    `positions`: One position for all sequences, or one for each; negative ones count
    from the end.

    Returns:
        States in float32 on the CPU, in the order of the sequences.

    Raises:
        InputError: If a position is outside its sequence, and as in `read_states`.
    """
    if isinstance(positions, int):
        positions = [positions] * len(sequences)
    prefixes = [
        _prefix(index, sequence, position)
        for index, (sequence, position) in enumerate(
            zip(sequences, positions, strict=True)
        )
    ]

    def last(states: Tensor, mask: Tensor) -> Tensor:
        index = torch.arange(mask.shape[1], device=mask.device)
        final = (index * mask).argmax(-1)
        return states[torch.arange(len(states), device=mask.device), final]

    states = read_states(
        adapter,
        prefixes,
        last,
        site=site,
        batch_size=batch_size,
        padding_side=padding_side,
        per_position=False,
    )
    if not states:
        return torch.zeros((0, adapter.d_model))
    return torch.stack([state for state in states if isinstance(state, Tensor)])


def _prefix(index: int, sequence: Sequence[int], position: int) -> Sequence[int]:
    length = len(sequence)
    if not -length <= position < length:
        raise InputError(
            f"a position inside sequence {index}, which has {length} tokens",
            f"position {position}",
            "Choose a position that every sequence has.",
        )
    return sequence[: position % length + 1]


def check_lengths(adapter: Adapter, sequences: Sequence[Sequence[int]]) -> None:
    """Refuse sequences that are empty or longer than the model is sound for.

    Raises:
        InputError: Names the first of them.
    """
    for index, sequence in enumerate(sequences):
        if not 0 < len(sequence) <= adapter.max_positions:
            raise InputError(
                f"sequences of 1 to {adapter.max_positions} tokens",
                f"{len(sequence)} tokens in sequence {index}",
                "Leave it out or shorten it; the model is not sound beyond that.",
            )


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

    `targets`: Half-open range of each sequence, after its first token; an empty one has
    no loss.

    Returns:
        Losses in nats per token, in the order given; not a number for an empty range.

    Raises:
        InputError: If a sequence is empty or longer than the model is sound for.
        ModelError: If a logit is not finite.
    """
    check_lengths(adapter, sequences)

    def read_batch(rows: Sequence[int]) -> list[float]:
        batch = pad([sequences[row] for row in rows], "right", adapter.device)
        with torch.inference_mode():
            states = adapter.states(batch)
            return [
                _loss(adapter, own, sequences[row], targets[row])
                for own, row in zip(states, rows, strict=True)
            ]

    losses = batched(read_batch, sequences, batch_size)
    return torch.tensor(losses, dtype=torch.float64)


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

    `counts`: How many of the last states of each sequence are read, from 1.
    `reduce`: From those of one row, in float32 on the device, to a tensor. It must not
    keep the states.

    Returns:
        What `reduce` returned for each sequence, in the order given, on the CPU.

    Raises:
        InputError: If a sequence is empty or longer than the model is sound for, or
            has fewer tokens than are to be read.
        SettingsError: If the site or the batch size is out of range.
    """
    check_lengths(adapter, sequences)
    for index, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        if not 1 <= count <= len(sequence):
            raise InputError(
                f"1 to {len(sequence)} states to read of sequence {index}",
                str(count),
                "Read no more than the sequence has.",
            )

    def split(rows: Sequence[int], _: Batch, states: Tensor) -> list[Reduced]:
        # Attention is causal, so what stands on the right of a row is never seen.
        ends = [len(sequences[row]) for row in rows]
        return [
            reduce(part[end - counts[row] : end]).to("cpu")
            for row, end, part in zip(rows, ends, states, strict=True)
        ]

    found = _read(adapter, sequences, split, site, batch_size)
    return [values for values in found if isinstance(values, Tensor)]


def states_at(
    adapter: Adapter,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
) -> list[Float[Tensor, "position d_model"]]:
    """Return the states of sequences at some of their places, after the final norm.

    One prefill per sequence; states are in float32 on the CPU.

    `positions`: Of each sequence, the tokens whose states are read.

    Raises:
        InputError: If a sequence is empty or longer than the model is sound for.
        ModelError: If a state is not finite.
    """
    check_lengths(adapter, sequences)
    adapter.require("states")

    def read_batch(rows: Sequence[int]) -> list[Tensor]:
        batch = pad([sequences[row] for row in rows], "right", adapter.device)
        with torch.inference_mode():
            states = adapter.states(batch)
            found = [
                own[list(positions[row])].float().cpu()
                for own, row in zip(states, rows, strict=True)
            ]
            check_finite(torch.cat(found), "the states of a sequence")
        # Copied outside inference mode: ordinary tensors.
        return [each.clone() for each in found]

    return batched(read_batch, sequences, batch_size)
