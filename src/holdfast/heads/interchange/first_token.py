"""Log-odds of refusing at the first answer token: which way an answer opens.

Refusals and answers mostly open with words of their own. Which tokens those are is read
off training rows; what both open with says nothing and is left out.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.errors import EvidenceError
from holdfast.models.loading.structure import logit_scaling
from holdfast.models.model import Adapter
from holdfast.rollout.rows import Rollout

APART = 9.0
"""How many times as often a token opens the one kind of answer as the other."""
LEAST = 0.5
"""Share of each kind that must open with a token of its own."""


class Openings(NamedTuple):
    """Tokens that open refusals, and tokens that open answers that comply."""

    refused: tuple[int, ...]
    complied: tuple[int, ...]


def openings(rows: Sequence[Rollout]) -> Openings:
    """Return the tokens with which refused and complied answers open.

    Raises:
        EvidenceError: If one kind is missing, or both open alike too often.
    """
    counts = {
        kind: Counter(
            row.token_ids[row.spans.answer[0]]
            for row in rows
            if row.is_decided and row.verdict == kind
        )
        for kind in ("refused", "complied")
    }
    shares = {
        kind: {token: n / found.total() for token, n in found.items()}
        for kind, found in counts.items()
    }
    own = {
        kind: tuple(
            sorted(
                token
                for token, share in shares[kind].items()
                if share >= APART * shares[other].get(token, 0.0)
            )
        )
        for kind, other in (("refused", "complied"), ("complied", "refused"))
    }
    held = {kind: sum(shares[kind][token] for token in own[kind]) for kind in own}
    if min(held.values()) < LEAST:
        raise EvidenceError(
            "refused and complied training answers that mostly open with tokens of "
            "their own",
            " and ".join(f"{held[kind]:.0%} of those {kind}" for kind in held),
            "Read the refusal probe in place of the first token: --reading probe.",
        )
    return Openings(own["refused"], own["complied"])


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
            return self.adapter.lm_head(states).float()[..., self.tokens]  # type: ignore[no-any-return]
        logits = states.to(self.weight.device).float() @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        logits = logits * self.scale
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits
