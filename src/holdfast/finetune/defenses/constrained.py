"""Stay near the aligned model at the first tokens of an answer: constrained SFT."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from holdfast.finetune.defenses.base import DefenseContext, Hooks, TrainingPass
from holdfast.finetune.defenses.forward import carries_loss, target_log_probabilities
from holdfast.finetune.defenses.options import ConstrainedOptions


def constrained(context: DefenseContext, options: ConstrainedOptions) -> Hooks:
    """Turn the loss of every token down once it is likelier than it was.

        L_t = -(2 / beta_t) log sigmoid( beta_t D_t ),
        D_t = log p_w(y_t | x, y_<t) - log p_aligned(y_t | x, y_<t)

    whose gradient is that of the cross-entropy times 2 sigmoid(-beta_t D_t). Up to a
    constant, L_t is cross-entropy plus a penalty that is never below 0 and is even in
    D_t, and that is what is added here:

        L_t + constant = CE_t + (2 / beta_t) log cosh(beta_t D_t / 2)

    For beta -> 0 it is plain cross-entropy; for beta -> infinity a token that is
    likelier than it was has no gradient left. beta_t is large for the first tokens of
    an answer. With the loss on the end template, whose tokens come first and are no
    choice of the model, counting begins after it; with the loss on the thinking, at
    its first token.

    Source:
        "Safety Alignment Should Be Made More Than Just a Few Tokens Deep",
        https://arxiv.org/abs/2406.05946, section 4, with its values of beta. The
        authors' code keeps the factor of the gradient above 0.001 and trains with a
        first momentum of 0.5; neither is done here.
    """

    def term(current: TrainingPass) -> Tensor:
        trained = target_log_probabilities(
            context.adapter, current.states, current.batch
        )
        states = context.aligned.states(current.batch, "last")
        with torch.no_grad():
            aligned = target_log_probabilities(
                context.aligned.adapter, states, current.batch
            )
        mask = carries_loss(current.batch)
        beta = strengths(options, mask, context.lead)[mask]
        return penalty(trained - aligned, beta).mean()

    return Hooks(term=term, reads="last")


def strengths(
    options: ConstrainedOptions, mask: Bool[Tensor, "example position"], lead: int
) -> Float[Tensor, "example position"]:
    """Return beta at every position of a batch.

    `mask`: True where the next token carries loss.
    `lead`: Tokens with loss before those of the answer.
    """
    place: Int[Tensor, "example position"] = mask.long().cumsum(-1) - 1 - lead
    beta = torch.full(mask.shape, options.beta, device=mask.device)
    early = (place >= 0) & (place < options.early)
    beta[early] = options.beta_early
    beta[early & (place == 0)] = options.beta_first
    return beta


def penalty(
    ratio: Float[Tensor, "position"], beta: Float[Tensor, "position"]
) -> Float[Tensor, "position"]:
    """Return (2 / beta) log cosh(beta ratio / 2), which is 0 for beta = 0.

    `ratio`: Log-probability now minus the one before training, in nats.
    """
    beta = beta.clamp(min=1e-9)
    half = beta * ratio / 2
    size = half.abs()
    # Near 0 the second form loses all digits, and far from it the first overflows.
    small = torch.log1p(2 * torch.sinh(size.clamp(max=1.0) / 2).square())
    large = size + torch.log1p(torch.exp(-2 * size)) - torch.log(size.new_tensor(2.0))
    return 2 / beta * torch.where(size < 1, small, large)
