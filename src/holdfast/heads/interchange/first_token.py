"""Log-odds of refusing at the first answer token: which way an answer opens."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.cliff.openings import Openings, openings
from holdfast.errors import EvidenceError
from holdfast.models.loading.structure import logit_scaling
from holdfast.models.model import Adapter
from holdfast.rollout.rows import Rollout

LEAST = 0.5
"""Share of each kind that must open with a token of its own."""


def require_openings(rows: Sequence[Rollout]) -> Openings:
    """Return the tokens with which refused and complied answers open.

    Raises:
        EvidenceError: If one kind is missing, or both open alike too often.
    """
    found = openings(rows)
    if min(found.refused, found.complied) < LEAST:
        raise EvidenceError(
            "refused and complied training answers that mostly open with tokens of "
            "their own",
            f"{found.refused:.0%} of those refused and {found.complied:.0%} of those "
            "complied",
            "Read the refusal probe in place of the first token: --reading probe.",
        )
    return found.openings


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
