"""Tokens that open refusals and compliances, and which of them a state leads to.

Refusals and answers mostly open with words of their own. Which tokens those are is read
off rows whose outcome is known; what both open with says nothing and is left out.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.models.loading.structure import logit_scaling
from holdfast.models.model import Adapter
from holdfast.rollout.rows import Rollout

APART = 9.0
"""How many times as often a token opens the one kind of answer as the other."""


class Openings(NamedTuple):
    """Tokens with which refused and complied answers open."""

    refused: tuple[int, ...]
    complied: tuple[int, ...]


class Known(NamedTuple):
    """Openings, and how much of the answers they were read off they open."""

    openings: Openings
    # Share of refused and of complied answers that open with a token of their own.
    refused: float
    complied: float

    @property
    def reason(self) -> str:
        """Why they tell nothing; empty where they do."""
        if self.openings.refused and self.openings.complied:
            return ""
        return "no first token opens refusals or compliances alone"


def openings(rows: Iterable[Rollout]) -> Known:
    """Return the tokens with which refused and complied answers open.

    Each kind weighs the same, however many rows it has.
    """
    counts: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
    for row in rows:
        if row.is_decided and row.answer:
            counts[row.is_refused][row.token_ids[row.spans.answer[0]]] += 1
    shares = {
        kind: {token: n / found.total() for token, n in found.items()}
        for kind, found in counts.items()
    }
    own = {
        kind: tuple(
            sorted(
                token
                for token, share in shares[kind].items()
                if share >= APART * shares[not kind].get(token, 0.0)
            )
        )
        for kind in counts
    }
    held = {kind: sum(shares[kind][token] for token in own[kind]) for kind in own}
    return Known(Openings(own[True], own[False]), held[True], held[False])


class FirstToken:
    """Reads the log-odds of opening a refusal off states after the final norm."""

    def __init__(self, adapter: Adapter, found: Openings) -> None:
        """Keep the rows of the unembedding that count, in float32."""
        self.adapter, self.n_refused = adapter, len(found.refused)
        self.tokens = torch.tensor([*found.refused, *found.complied])
        self.scale, self.cap = logit_scaling(adapter.model)
        head = adapter.model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        self.weight: Tensor | None = None
        # Packed weights are read by their own code, in its own precision.
        if isinstance(weight, Tensor) and weight.is_floating_point():
            self.weight = weight.detach()[self.tokens.to(weight.device)].float()
        bias = getattr(head, "bias", None)
        self.bias = None if bias is None else bias.detach()[self.tokens].float()

    def __call__(self, states: Float[Tensor, "*_ d_model"]) -> Float[Tensor, "*_"]:
        """Return log P(opens a refusal) - log P(opens an answer that complies)."""
        logits = self._logits(states)
        refused, complied = logits.tensor_split([self.n_refused], -1)
        return refused.logsumexp(-1) - complied.logsumexp(-1)

    def _logits(self, states: Tensor) -> Tensor:
        if self.weight is None:
            own = states.to(self.adapter.device, self.adapter.dtype)
            return self.adapter.lm_head(own).float()[..., self.tokens]  # type: ignore[no-any-return]
        logits = states.to(self.weight.device).float() @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        logits = logits * self.scale
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits
