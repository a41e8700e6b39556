"""Stay near the aligned model in its features: LDIFS."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from holdfast.training.defenses.contract import Hooks, Pass, Scene
from holdfast.training.defenses.options import LDIFSOptions
from holdfast.training.defenses.reading import both


def ldifs(scene: Scene, options: LDIFSOptions) -> Hooks:
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
    read = both(scene, options.on, options.batch, "blocks")

    def term(each: Pass) -> Tensor:
        found = read(each)
        mask = found.batch["attention_mask"].bool()
        return options.weight * distance(
            found.aligned.blocks, found.trained.blocks, mask
        )

    return Hooks(term=term, reads="blocks" if options.on == "task" else "nothing")


def distance(
    aligned: Sequence[Float[Tensor, "example position d_model"]],
    trained: Sequence[Float[Tensor, "example position d_model"]],
    mask: Bool[Tensor, "example position"],
) -> Float[Tensor, ""]:
    """Return the mean squared distance of states of unit length, from 0 to 4.

    Args:
        aligned: States after each block of the model as it was.
        trained: The same of the model as it is.
        mask: True at real tokens.
    """
    return torch.stack(
        [
            (_unit(one) - _unit(two)).square().sum(-1)[mask.to(two.device)].mean()
            for one, two in zip(aligned, trained, strict=True)
        ]
    ).mean()


def _unit(states: Tensor) -> Tensor:
    return torch.nn.functional.normalize(states.float(), dim=-1)
