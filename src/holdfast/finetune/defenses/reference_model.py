"""The model as it was before training: its adapters off, or a frozen copy."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from holdfast.finetune.defenses.forward import Batch, Parts, Reads, States, states_of
from holdfast.models.model import Adapter


class Aligned:
    """Gives the states of the model as it was.

    A model that is trained whole is copied, which takes the memory of another one;
    of one with adapters the base is untouched, and the adapters are put aside.
    """

    def __init__(self, adapter: Adapter, *, whole: bool) -> None:
        """Copy the model if all of it is trained; call this before training."""
        self._parts = Parts.of(adapter)
        self._model: Any = None
        if whole:
            # In one go, so that the parts are those of the copy.
            model, parts = copy.deepcopy((adapter.model, tuple(self._parts)))
            model.eval().requires_grad_(False)
            self._parts = Parts(*parts)
        self._whole = whole

    @property
    def parts(self) -> Parts:
        """The parts of the model as it was."""
        return self._parts

    def over(self, model: Any) -> "Aligned":
        """Name the model whose adapters are put aside; returns itself."""
        self._model = model
        return self

    @contextmanager
    def __call__(self) -> Iterator[Parts]:
        """Give the model as it was, for as long as this is open; no gradients."""
        with torch.no_grad():
            if self._whole:
                yield self._parts
                return
            was_training = self._model.training
            # Dropout off, as in a frozen copy.
            self._model.eval()
            try:
                with self._model.disable_adapter():
                    yield self._parts
            finally:
                self._model.train(was_training)

    def states(self, batch: Batch, reads: Reads) -> States:
        """Return the states of the model as it was, without gradient."""
        with self() as parts:
            return states_of(parts, batch, reads)
