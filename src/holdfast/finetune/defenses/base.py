"""What a defense is handed, and where in a training run it may act."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from holdfast.finetune.defenses.forward import (
    AlignedModel,
    Batch,
    Reads,
    States,
    states_of,
)
from holdfast.finetune.defenses.options import Where
from holdfast.finetune.targets import Example
from holdfast.models.model import Adapter


class DefenseData(NamedTuple):
    """Rows that a defense trains on or looks at, beside those of the task."""

    reference: tuple[Example, ...] = ()  # Prompts with a safe answer.
    harmful: tuple[Example, ...] = ()  # Prompts with a harmful answer.
    # Places in `harmful` and `reference` of answers to the same prompt.
    pairs: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class DefenseContext:
    """What a defense is handed before the first step."""

    adapter: Adapter  # The model's parts by name.
    model: Any  # The model as it is trained, with adapters if there are any.
    aligned: AlignedModel  # The model as it was before training.
    data: DefenseData  # Rows beside those of the task.
    # Puts rows side by side, on the device of the model.
    collate: Callable[[Sequence[Example]], Batch]
    seed: int  # Seed of everything that is drawn.
    lead: int  # Tokens with loss before the first token of an answer.

    def trained(self) -> dict[str, Tensor]:
        """Return the weights that are trained, by name."""
        named = self.model.named_parameters()
        return {name: weight for name, weight in named if weight.requires_grad}


class TrainingPass(NamedTuple):
    """One pass over rows of the task, its loss computed and nothing yet applied."""

    step: int  # Optimiser step, from 0.
    steps: int  # Optimiser steps of the run.
    number: int  # Passes before this one.
    batch: Batch  # Token ids, mask and labels.
    states: States  # What the model made of them, as `Hooks.reads` asks, with gradient.


@dataclass(frozen=True, eq=False)
class Hooks:
    """Where a defense acts; what is None is left alone."""

    # Handed step and pass, returns rows that are trained on in place of the task's, or
    # None. It is asked once a pass, before the step begins.
    swap: Callable[[int, int], Sequence[Example] | None] | None = None
    # Handed a pass, returns what is added to its loss, weight included. The terms of
    # the passes of one step are averaged.
    term: Callable[[TrainingPass], Tensor] | None = None
    # Handed step and steps, changes the gradients of the step before they are clipped,
    # and returns the loss it did that for.
    gradient: Callable[[int, int], Tensor] | None = None
    reads: Reads = "nothing"  # States of the task's rows that the term reads.
    # Held open while the run lasts.
    around: AbstractContextManager[Any] = field(default_factory=nullcontext)
    # Tensors that a checkpoint keeps and a resumed run gets back.
    state: dict[str, Tensor] = field(default_factory=dict)
    # Figures of the present step, written beside its loss.
    logged: dict[str, float] = field(default_factory=dict)


Build = Callable[[DefenseContext, Any], Hooks]
"""A defense: handed the context and its own options, returns its hooks."""
STRIDE: Final = 0x9E3779B97F4A7C15
T = TypeVar("T")


def seeded_order(rows: Sequence[T], seed: int) -> Callable[[int, int], list[T]]:
    """Return what draws rows, given the draws of this size before and the size.

    It goes through all rows again and again, each time in another order. What is drawn
    depends on seed and place alone: a run that was stopped draws on as if it had not
    been.
    """
    n = len(rows)

    @lru_cache(maxsize=4)
    def order(cycle: int) -> list[int]:
        generator = torch.Generator().manual_seed((seed * STRIDE + cycle) % 2**63)
        return torch.randperm(n, generator=generator).tolist()

    def draw(number: int, size: int) -> list[T]:
        places = range(number * size, (number + 1) * size)
        return [rows[order(place // n)[place % n]] for place in places]

    return draw


class PairedStates(NamedTuple):
    """Rows, and what the model as it is and as it was makes of them."""

    batch: Batch
    trained: States
    aligned: States


def reference_batches(context: DefenseContext, size: int) -> Callable[[int], Batch]:
    """Return what gives the safe rows of a pass, by the number of the pass."""
    draw = seeded_order(context.data.reference, context.seed)
    return lambda number: context.collate(draw(number, size))


def paired_states(
    context: DefenseContext, on: Where, size: int, reads: Literal["last", "blocks"]
) -> Callable[[TrainingPass], PairedStates]:
    """Return what gives both models' states of the rows of a pass."""
    draw = reference_batches(context, size) if on == "reference" else None

    def read(current: TrainingPass) -> PairedStates:
        batch, trained = current.batch, current.states
        if draw is not None:
            batch = draw(current.number)
            trained = states_of(context.adapter, batch, reads)
        return PairedStates(batch, trained, context.aligned.states(batch, reads))

    return read
