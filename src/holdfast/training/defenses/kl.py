"""Stay near the aligned model in what is said: KL divergence from it."""

from torch import Tensor

from holdfast.training.defenses.contract import Hooks, Pass, Scene
from holdfast.training.defenses.options import KLOptions
from holdfast.training.defenses.passing import divergence, logits_at_loss
from holdfast.training.defenses.reading import both


def kl(scene: Scene, options: KLOptions) -> Hooks:
    """Add the divergence of the next-token distribution from the aligned model's.

        f(w) + weight mean_t KL( p_aligned(. | x_<t) || p_w(. | x_<t) )

    over the tokens with loss: of the task's rows (`on=task`), or of safe rows
    (`on=reference`). The aligned model is the one that training began with.

    Source:
        Plain distillation, as the term that SafeGrad (https://arxiv.org/abs/2508.07172,
        Eq. 6) starts from; there it is measured on safe rows alone. On the task's rows
        it needs no further data.
    """
    read = both(scene, options.on, options.batch, "last")

    def term(each: Pass) -> Tensor:
        found = read(each)
        trained = logits_at_loss(scene.parts, found.trained, found.batch)
        aligned = logits_at_loss(scene.aligned.parts, found.aligned, found.batch)
        return options.weight * divergence(aligned, trained)

    return Hooks(term=term, reads="last" if options.on == "task" else "nothing")
