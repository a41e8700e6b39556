"""Take out of the task's gradient what works against alignment: SafeGrad."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from holdfast.finetune.defenses.base import DefenseContext, Hooks, reference_batches
from holdfast.finetune.defenses.forward import divergence, logits_at_loss, states_of
from holdfast.finetune.defenses.options import SafeGradOptions

NEGLIGIBLE: Final = 1e-5
"""Length of the alignment gradient, over that of the task's, below which it is the
rounding of a divergence of 0 and points nowhere."""


def safegrad(context: DefenseContext, options: SafeGradOptions) -> Hooks:
    """Project the task's gradient where it conflicts with the alignment gradient.

        g_a = grad KL( p_aligned || p_w ) on safe rows
        g_u' = g_u - (g_u . g_a / |g_a|^2) g_a   if g_u . g_a < 0, else g_u
        step along g_u' + rho g_a

    One product over all trained weights decides. The divergence is the mean over
    tokens with loss of the safe rows. At the first step the model is the aligned one,
    g_a is 0 but for rounding, and nothing is projected.

    Source:
        SafeGrad, https://arxiv.org/abs/2508.07172, Eq. 3 to 6. The projection is done
        once an optimiser step, on the gradient summed over its passes, before
        clipping; re-implementations do it pass by pass and average the divergence over
        prompts as well. With one pass a step the former is the same.
    """
    draw = reference_batches(context, options.batch)
    logged: dict[str, float] = {}

    def gradient(step: int, steps: int) -> Tensor:
        batch = draw(step)
        weights = list(context.trained().values())
        trained = states_of(context.adapter, batch, "last")
        aligned = context.aligned.states(batch, "last")
        loss = divergence(
            logits_at_loss(context.aligned.adapter, aligned, batch).detach(),
            logits_at_loss(context.adapter, trained, batch),
        )
        pulls = torch.autograd.grad(loss, weights, materialize_grads=True)
        pushes = [_or_zero(each) for each in weights]
        share = conflict(pushes, pulls)
        for weight, push, pull in zip(weights, pushes, pulls, strict=True):
            weight.grad = push + (options.rho - share) * pull
        logged["conflict"] = float(share < 0)
        return loss.detach()

    return Hooks(gradient=gradient, logged=logged)


def conflict(pushes: Sequence[Tensor], pulls: Sequence[Tensor]) -> float:
    """Return g_u . g_a / |g_a|^2 where the two gradients conflict, else 0.

    Returns: The share of g_a that is to be taken from g_u; never above 0. Sums are made
    in float64.
    """
    product = _product(pushes, pulls)
    length = _product(pulls, pulls)
    least = NEGLIGIBLE**2 * _product(pushes, pushes)
    return product / length if product < 0 and length > least else 0.0


def _product(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return sum(
        float((one.double() * other.double()).sum())
        for one, other in zip(ones, others, strict=True)
    )


def _or_zero(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
