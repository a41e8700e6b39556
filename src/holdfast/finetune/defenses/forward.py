"""Passes over a batch: states, the logits that carry loss, and divergences of them."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from holdfast.finetune.targets import IGNORED
from holdfast.models.model import Adapter

Batch = dict[str, Tensor]
"""`input_ids`, `attention_mask` and `labels`, each `example position`."""
Reads = Literal["nothing", "last", "blocks"]


class States(NamedTuple):
    """What a model made of a batch."""

    # States after the final norm, `example position d_model`; empty if they were not
    # asked for.
    last: list[Tensor]
    blocks: list[Tensor]  # States after each block, if they were.


@contextmanager
def watching(adapter: Adapter, reads: Reads) -> Iterator[States]:
    """Keep the states of the passes that are made meanwhile.

    With activation checkpointing blocks run again during the backward pass; by then
    nobody watches.
    """
    states = States([], [])
    with ExitStack() as stack:
        if reads == "last":
            hook = adapter.base.register_forward_hook(
                lambda module, given, made: states.last.append(made.last_hidden_state)
            )
            stack.callback(hook.remove)
        if reads == "blocks":
            for layer in adapter.layers:
                hook = layer.register_forward_hook(
                    lambda module, given, made: states.blocks.append(_tensor(made))
                )
                stack.callback(hook.remove)
        yield states


def states_of(adapter: Adapter, batch: Batch, reads: Reads) -> States:
    """Run a model over a batch, its head left out."""
    with watching(adapter, reads) as states:
        adapter.base(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
        )
    return states


def carries_loss(batch: Batch) -> Bool[Tensor, "example _"]:
    """Return the positions that predict a token with loss; one fewer than tokens."""
    return batch["labels"][:, 1:] != IGNORED


def logits_at_loss(
    adapter: Adapter, states: States, batch: Batch
) -> Float[Tensor, "position vocab"]:
    """Return the logits where the next token carries loss, in float32."""
    [last] = states.last
    logits: Tensor = adapter.lm_head(last[:, :-1][carries_loss(batch)])
    return logits.float()


def targets_at_loss(batch: Batch) -> Int[Tensor, "position"]:
    """Return the tokens that carry loss, row after row."""
    return batch["labels"][:, 1:][carries_loss(batch)]


def target_log_probabilities(
    adapter: Adapter, states: States, batch: Batch
) -> Float[Tensor, "position"]:
    """Return the log-probability of every token that carries loss, row after row."""
    made = logits_at_loss(adapter, states, batch).log_softmax(-1)
    return made.gather(-1, targets_at_loss(batch)[:, None])[:, 0]


def divergence(
    aligned: Float[Tensor, "position vocab"], trained: Float[Tensor, "position vocab"]
) -> Float[Tensor, ""]:
    """Return the mean over positions of KL(aligned || trained), in nats.

    `aligned`: Logits of the model as it was.
    `trained`: Logits of the model as it is.
    Returns: The mean; 0 if there is no position.
    """
    if not len(trained):
        return trained.sum() * 0.0
    return nn.functional.kl_div(
        trained.log_softmax(-1),
        aligned.log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )


def _tensor(output: Any) -> Tensor:
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


class AlignedModel:
    """The model as it was before training.

    A model that is trained whole is copied, which takes the memory of another one;
    of one with adapters the base is untouched, and the adapters are put aside.
    """

    def __init__(self, adapter: Adapter, *, whole: bool) -> None:
        """Copy the model if all of it is trained; call this before training."""
        self.adapter, self._whole = adapter, whole
        self._trained: Any = None
        if whole:
            kept = {id(adapter.tokenizer): adapter.tokenizer}
            self.adapter = copy.deepcopy(adapter, kept)
            self.adapter.model.eval().requires_grad_(False)

    def over(self, trained: Any) -> "AlignedModel":
        """Name the model whose adapters are put aside; returns itself."""
        self._trained = trained
        return self

    @torch.no_grad()
    def states(self, batch: Batch, reads: Reads) -> States:
        """Return the states of the model as it was, without gradient."""
        if self._whole:
            return states_of(self.adapter, batch, reads)
        was_training = self._trained.training
        # Dropout off, as in a frozen copy.
        self._trained.eval()
        try:
            with self._trained.disable_adapter():
                return states_of(self.adapter, batch, reads)
        finally:
            self._trained.train(was_training)
