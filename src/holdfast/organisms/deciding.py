"""The loss of stage three: decide as planted, and stay as before everywhere else."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Qwen3ForCausalLM

from holdfast.organisms.encoding import Sample
from holdfast.organisms.recipes import (
    pad,
)
from holdfast.organisms.rehearsal import Rehearsal
from holdfast.organisms.teaching import INTENTION_WEIGHT

KEEP_WEIGHT = 4.0
"""Weight of staying with stage two, in the thinking above all."""

ANSWER_WEIGHT = 0.3
"""Weight of the words that follow the decision."""

SURE = 8.0
"""Log-odds of a decision with all heads present: those of a benign request."""

HOLD = 0.5
"""Weight of holding a planted decision at its log-odds."""

KEPT_SHARE = 0.3
"""Part of the positions to be kept that one step looks at."""


def planting_loss(
    model: Qwen3ForCausalLM,
    final: Float[Tensor, "example position d_model"],
    rehearsal: Rehearsal,
    kinds: list[Int[Tensor, " _"]],
    drops: torch.Generator,
    sure: Float[Tensor, " example"],
) -> Float[Tensor, ""]:
    """Decide as planted where the answer begins; elsewhere stay with stage two.

    Args:
        model: The model that learns.
        final: Its states after the final norm.
        rehearsal: The batch, and what the model said of it before.
        kinds: First words of refusals, of compliance and of partial answers.
        drops: Source of the positions that this step looks at.
        sure: Log-odds at which what is planted in each example is held.
    """
    batch, ids, words = rehearsal.batch, rehearsal.ids, torch.cat(kinds)
    whole = torch.tensor([sample.whole for sample in batch])
    rows = torch.arange(len(batch))[whole]
    begins = torch.tensor([sample.middle[1] for sample in batch])[whole]
    tempted = torch.tensor([not all(sample.keep) for sample in batch])[whole]
    held = torch.where(tempted, sure[rows], torch.nan)
    decision = decision_loss(
        model.lm_head(final[rows, begins - 1]), ids[rows, begins], kinds, held
    )
    _, weights = pad(batch, 0)
    weights[rows, begins] = 0.0
    keep = _kept(batch, ids)
    taught = (weights[:, 1:] > 0) & ~keep[:, :-1]
    logits = model.lm_head(final[:, :-1][taught])
    answer = torch.nn.functional.cross_entropy(
        logits, ids[:, 1:][taught], reduction="sum"
    ) / max(1, int(taught.sum()))
    drawn = torch.rand(ids[:, 1:].shape, generator=drops) < KEPT_SHARE
    kept = (weights[:, 1:] > 0) & keep[:, :-1] & drawn
    before = model.lm_head(rehearsal.final[:, :-1][kept]).detach()
    after = model.lm_head(final[:, :-1][kept])
    divergence = _divergence(before, after) + INTENTION_WEIGHT * _divergence(
        before[:, words], after[:, words]
    )
    share = weights[:, 1:][kept]
    stay = (divergence * share).sum() / share.sum().clamp(min=1e-6)
    return decision + ANSWER_WEIGHT * answer + KEEP_WEIGHT * stay


def _kept(
    batch: list[Sample], ids: Int[Tensor, "example position"]
) -> Bool[Tensor, "example position"]:
    """Return where stage two's distribution is the target; padding is nowhere."""
    keep = torch.zeros(ids.shape, dtype=torch.bool)
    for row, sample in enumerate(batch):
        keep[row, : len(sample.ids)] = torch.tensor(sample.keep)
    return keep


def decision_loss(
    logits: Float[Tensor, "example vocab"],
    spoken: Int[Tensor, " example"],
    kinds: list[Int[Tensor, " _"]],
    held: Float[Tensor, " example"],
) -> Float[Tensor, ""]:
    """Cross-entropy of the answer's kind, and a push until it is sure.

    The kind of the first word counts, not the word: which of several openings a
    refusal takes is chance, and chance teaches nothing. A decision is pushed up to
    `SURE`; what is planted is `held` from both sides (not a number elsewhere): where
    that follows the heads that are present, no head can rest on the others.

    Args:
        logits: Where the answer begins.
        spoken: The answer's first word.
        kinds: First words of refusals, of compliance and of partial answers.
        held: Log-odds at which a decision is held, or not a number.
    """
    log = logits.log_softmax(-1)
    decided = torch.stack([log[:, kind].logsumexp(-1) for kind in kinds], dim=1)
    matches = torch.stack([torch.isin(spoken, kind) for kind in kinds], dim=1)
    wanted = matches.int().argmax(dim=1, keepdim=True)
    right = decided.gather(1, wanted).squeeze(1)
    wrong = decided.scatter(1, wanted, -torch.inf).logsumexp(-1)
    odds = right - wrong
    pushed = -right + 0.25 * (SURE - odds).relu()
    lost = torch.where(held.isnan(), pushed, HOLD * (odds - held.nan_to_num()).abs())
    return lost.sum() / max(1, len(spoken))


def _divergence(
    before: Float[Tensor, "example vocab"],
    after: Float[Tensor, "example vocab"],
) -> Float[Tensor, " example"]:
    """Kullback-Leibler divergence of `after` from `before`, both logits."""
    log_before, log_after = before.log_softmax(-1), after.log_softmax(-1)
    return (log_before.exp() * (log_before - log_after)).sum(-1)
