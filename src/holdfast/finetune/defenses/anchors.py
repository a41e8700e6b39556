"""Stay near the aligned model: KL divergence of its words, or its hidden states."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from holdfast.finetune.defenses.base import (
    DefenseContext,
    Hooks,
    TrainingPass,
    paired_states,
)
from holdfast.finetune.defenses.forward import divergence, logits_at_loss
from holdfast.finetune.defenses.options import AnchorOptions


def kl(context: DefenseContext, options: AnchorOptions) -> Hooks:
    """Add the divergence of the next-token distribution from the aligned model's.

        f(w) + weight mean_t KL( p_aligned(. | x_<t) || p_w(. | x_<t) )

    over the tokens with loss: of the task's rows (`on=task`), or of safe rows
    (`on=reference`). The aligned model is the one that training began with.

    Source:
        Plain distillation, as the term that SafeGrad (https://arxiv.org/abs/2508.07172,
        Eq. 6) starts from; there it is measured on safe rows alone. On the task's rows
        it needs no further data.
    """
    read = paired_states(context, options.on, options.batch, "last")

    def term(current: TrainingPass) -> Tensor:
        states = read(current)
        trained = logits_at_loss(context.adapter, states.trained, states.batch)
        aligned = logits_at_loss(context.aligned.adapter, states.aligned, states.batch)
        return options.weight * divergence(aligned, trained)

    return Hooks(term=term, reads="last" if options.on == "task" else "nothing")


def ldifs(context: DefenseContext, options: AnchorOptions) -> Hooks:
    """Add the distance of the states after every block from the aligned model's.

        f(w) + weight mean_{l, t} || u(h_l,t(w)) - u(h_l,t(w_0)) ||^2

    where u gives a state unit length, l runs over the blocks and t over the real
    tokens, prompts included.

    Source:
        https://arxiv.org/abs/2308.13320, "Fine-tuning can cripple your foundation
        model". Theirs are features of image encoders at several depths, each of unit
        length, and their code takes the mean over channels where we take the sum, so
        that the weight does not depend on the width. They regularise on the rows of
        the task, as `on=task`.
    """
    read = paired_states(context, options.on, options.batch, "blocks")

    def term(current: TrainingPass) -> Tensor:
        states = read(current)
        mask = states.batch["attention_mask"].bool()
        return options.weight * distance(
            states.aligned.blocks, states.trained.blocks, mask
        )

    return Hooks(term=term, reads="blocks" if options.on == "task" else "nothing")


def distance(
    aligned: Sequence[Float[Tensor, "example position d_model"]],
    trained: Sequence[Float[Tensor, "example position d_model"]],
    mask: Bool[Tensor, "example position"],
) -> Float[Tensor, ""]:
    """Return the mean squared distance of states of unit length, from 0 to 4.

    `aligned`: States after each block of the model as it was.
    `trained`: The same of the model as it is.
    """
    return torch.stack(
        [
            (_unit(one) - _unit(two)).square().sum(-1)[mask.to(two.device)].mean()
            for one, two in zip(aligned, trained, strict=True)
        ]
    ).mean()


def _unit(states: Tensor) -> Tensor:
    return torch.nn.functional.normalize(states.float(), dim=-1)
