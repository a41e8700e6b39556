"""Two states in turn, safe rows and the task's, each pulled to where it set out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.finetune.defenses.base import (
    DefenseContext,
    Hooks,
    TrainingPass,
    seeded_order,
)
from holdfast.finetune.defenses.options import LisaOptions
from holdfast.finetune.targets import Example


def lisa(context: DefenseContext, options: LisaOptions) -> Hooks:
    """Train on safe rows for some steps, then on the task's, and so on.

        safe rows:  min_w h(w) + rho/2 || w - w_task ||^2
        the task's: min_w f(w) + rho/2 || w - w_safe ||^2

    w_task and w_safe are the weights at the end of the last turn of that state; before
    the first turn, those that training began with. Only weights that are trained
    count. As in the authors' code a step on safe rows takes the place of one on the
    task's, whose rows are passed over, and there is no pull in the first `begin` of all
    steps. With align_steps=0 there is one state, pulled to the aligned model; with
    rho=0 as well it is plain fine-tuning.

    Source:
        Lisa, https://arxiv.org/abs/2405.18641. Its cycle is 100 and 900 steps over 20
        epochs of 1000; ours has the same proportion and is ten times shorter. Fit it
        to the length of the run.
    """
    draw = seeded_order(context.data.reference, context.seed)
    state = {name: each.detach().clone() for name, each in context.trained().items()}
    logged: dict[str, float] = {}

    def swap(step: int, number: int) -> Sequence[Example] | None:
        if step and in_safe_state(step, options) != in_safe_state(step - 1, options):
            # Asked again in the same step, this finds the same weights.
            for name, each in context.trained().items():
                state[name] = each.detach().clone()
        if not in_safe_state(step, options):
            return None
        return draw(number, options.batch)

    def term(current: TrainingPass) -> Tensor:
        logged["safe_state"] = float(in_safe_state(current.step, options))
        if current.step <= options.begin * current.steps:
            return torch.zeros(())
        return options.rho / 2 * drift(context.trained(), state)

    return Hooks(swap=swap, term=term, state=state, logged=logged)


def in_safe_state(step: int, options: LisaOptions) -> bool:
    """Return whether a step, counted from 0, is one on safe rows."""
    cycle = options.align_steps + options.task_steps
    return step % cycle < options.align_steps


def drift(weights: dict[str, Tensor], anchor: dict[str, Tensor]) -> Tensor:
    """Return the squared distance of weights from an anchor, in float32."""
    parts = [
        (each.float() - anchor[name].float()).square().sum()
        for name, each in weights.items()
    ]
    return torch.stack(parts).sum()
