"""One sequence that is read piece by piece, and whose end can be forgotten."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.errors import AdapterError
from holdfast.models.decoding.kv_cache import keeps_all_tokens, preallocated_cache
from holdfast.models.model import Adapter


class Reader:
    """The keys and values of a sequence that grows."""

    def __init__(self, adapter: Adapter) -> None:
        """Begin before the first token.

        Raises:
            AdapterError: If a token that some layer of the model has read cannot be
                forgotten.
        """
        self.adapter = adapter
        self._cache: Any = preallocated_cache(adapter.model.config)
        if not keeps_all_tokens(self._cache):
            raise AdapterError(
                "a model whose layers all keep all tokens, so that a stream can be "
                "read piece by piece",
                f"{adapter.identity.model_id}, which forgets some or mixes them",
                "Read along with a model that has full attention in every layer.",
            )

    @property
    def n_read(self) -> int:
        """Tokens that were read and not forgotten."""
        return int(self._cache.get_seq_length())

    def read(self, token_ids: Sequence[int]) -> Float[Tensor, "position d_model"]:
        """Read tokens that follow; return their states after the final norm."""
        start, device = self.n_read, self.adapter.device
        ids = torch.tensor([list(token_ids)], device=device)
        places = torch.arange(start, start + len(token_ids), device=device)
        states: Tensor = self.adapter.base(
            input_ids=ids,
            position_ids=places[None],
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return states[0].to(device)

    def forget_behind(self, count: int) -> None:
        """Forget all tokens but the first ones."""
        if count < self.n_read:
            for layer in self._cache.layers:
                layer.make_room(0)
                # Shown is less of the same room, so that nothing is copied.
                layer._show(1, count)
