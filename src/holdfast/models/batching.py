"""Batches of token sequences: padding, order by length, halving when memory ends."""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from holdfast.errors import EnvironmentProblem, InputError, SettingsError

T = TypeVar("T")
R = TypeVar("R")
Side = Literal["left", "right"]


class Batch(NamedTuple):
    """Token sequences side by side."""

    # Padded with id 0, whose states nobody reads.
    token_ids: Int[Tensor, "example position"]
    mask: Bool[Tensor, "example position"]  # True at real tokens.
    side: Side  # Where the padding is.

    def inputs(self, *, two_way: bool = False) -> dict[str, Any]:
        """Return the arguments for a forward pass over this batch.

        Causal attention never looks to the right, so padding on the right needs no
        mask, and attention without a mask is the fast path. Other padding, and any
        with `two_way` attention, needs the mask and positions of the real tokens.
        """
        unmasked = self.side == "right" and not two_way
        if unmasked or bool(self.mask.all()):
            return {"input_ids": self.token_ids}
        return {
            "input_ids": self.token_ids,
            "attention_mask": self.mask.long(),
            "position_ids": self.positions(),
        }

    def positions(self) -> Int[Tensor, "example position"]:
        """Return positions that count real tokens from 0; padding is at 0."""
        return (self.mask.long().cumsum(-1) - 1).clamp(min=0)


def pad(sequences: Sequence[Sequence[int]], side: Side, device: torch.device) -> Batch:
    """Put token sequences side by side."""
    width = max(len(sequence) for sequence in sequences)
    token_ids = torch.zeros((len(sequences), width), dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        real = slice(width - len(sequence), width)
        if side == "right":
            real = slice(0, len(sequence))
        token_ids[row, real] = torch.tensor(list(sequence), dtype=torch.long)
        mask[row, real] = True
    return Batch(token_ids.to(device), mask.to(device), side)


def longest_first(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return the order that puts the longest sequence first.

    Neighbours then have similar lengths, which keeps padding small, and a batch
    that does not fit in memory shows itself at once rather than at the end.
    """
    return sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))


def require_room(n_tokens: int, place: int, positions: int, written: int) -> None:
    """Refuse a prompt that is empty, or too long for what is to be written behind it.

    `written`: Tokens that may be written.

    Raises:
        InputError: Names the prompt, or the limit where no prompt would fit.
    """
    room = positions - written
    if room < 1:
        raise InputError(
            f"a response that fits in the model's {positions} tokens with a prompt",
            f"one of up to {written} tokens",
            "Ask for a shorter response.",
        )
    if not 0 < n_tokens <= room:
        raise InputError(
            f"prompts of 1 to {room} tokens, which leaves room for {written} more in "
            f"the model's {positions}",
            f"{n_tokens} tokens in prompt {place}",
            "Shorten the prompt or the response.",
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on any kind of device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(
        word in str(error).lower() for word in words
    )


def halving_batches(
    function: Callable[[Sequence[T]], list[R]], items: Sequence[T], batch_size: int
) -> Iterator[tuple[list[R], int]]:
    """Apply a function batch by batch, halving the batch when memory runs out.

    The function returns one result per item. Yields the results of a batch, in order,
    and the batch size that is in use.

    Raises:
        EnvironmentProblem: If a single item does not fit in memory.
    """
    if batch_size < 1:
        raise SettingsError(
            "a batch size of at least 1", str(batch_size), "Raise --batch-size."
        )
    start = 0
    while start < len(items):
        results = _try(function, items[start : start + batch_size])
        if results is not None:
            yield results, batch_size
            start += batch_size
            continue
        if batch_size == 1:
            raise EnvironmentProblem(
                "memory for a batch of one",
                "that memory ran out",
                "Use shorter sequences, a smaller model, a 16-bit --dtype, or a "
                "larger device.",
            )
        batch_size //= 2


def _try(
    function: Callable[[Sequence[T]], list[R]], batch: Sequence[T]
) -> list[R] | None:
    try:
        return function(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Out here the exception is gone, and with it the frames that held the tensors.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def longest_batches(
    function: Callable[[Sequence[T]], list[R]],
    items: Sequence[T],
    tokens: Callable[[T], Sequence[int]],
    batch_size: int,
) -> Iterator[list[R]]:
    """Yield the results of batches of items, those of the most tokens first.

    Raises:
        SettingsError: If the batch size is not positive.
        EnvironmentProblem: If a single item does not fit in memory.
    """
    ordered = [items[i] for i in longest_first([tokens(item) for item in items])]
    return (results for results, _ in halving_batches(function, ordered, batch_size))


def batched(
    function: Callable[[Sequence[int]], list[R]],
    sequences: Sequence[Sequence[int]],
    batch_size: int,
) -> list[R]:
    """Apply a function to batches of sequences, by their indices, longest first.

    Batches are halved when memory runs out; results are in the order of `sequences`.

    Raises:
        EnvironmentProblem: If a single sequence does not fit in memory.
    """
    order = longest_first(sequences)
    results, _ = with_batch_halving(function, order, batch_size)
    by_index = dict(zip(order, results, strict=True))
    return [by_index[index] for index in range(len(sequences))]


def with_batch_halving(
    function: Callable[[Sequence[T]], list[R]], items: Sequence[T], batch_size: int
) -> tuple[list[R], int]:
    """Apply a function to all items (see `halving_batches`).

    Returns the results in the order of the items, and the batch size at the end.
    """
    results: list[R] = []
    for batch, size in halving_batches(function, items, batch_size):
        results.extend(batch)
        batch_size = size
    return results, batch_size
