"""No defense, safe rows mixed in, and the cross-entropy on them beside the loss."""

from torch import Tensor

from holdfast.finetune.defenses.base import (
    DefenseContext,
    Hooks,
    TrainingPass,
    reference_batches,
)
from holdfast.finetune.defenses.forward import states_of, target_log_probabilities
from holdfast.finetune.defenses.options import (
    Options,
    ReferenceLossOptions,
    SafeInstrOptions,
)


def none(context: DefenseContext, options: Options) -> Hooks:
    """Add nothing: plain supervised fine-tuning, f(w)."""
    return Hooks()


def safeinstr(context: DefenseContext, options: SafeInstrOptions) -> Hooks:
    """Train on safe rows among those of the task: `ratio` of them for each.

        f(w) over the rows of the task and round(ratio n) safe rows

    The rows were mixed in before (`safe_rows` says how many), drawn at random by the
    seed; nothing is left to do at a step.

    Source:
        SafeInstr, "Safety-Tuned LLaMAs", https://arxiv.org/abs/2309.07875. There the
        safe rows are part of the first instruction tuning; here they go into the
        tuning of a model that is aligned already, as other papers compare it.
    """
    return Hooks()


def safe_rows(task: int, options: SafeInstrOptions) -> int:
    """Return how many safe rows are mixed into those of the task, at least one."""
    return max(1, round(options.ratio * task)) if options.ratio else 0


def reference_loss(context: DefenseContext, options: ReferenceLossOptions) -> Hooks:
    """Add the cross-entropy on safe rows, a control for defenses that see them.

        f(w) + weight CE(safe rows; w)

    What a defense with safe rows gains over this it owes to more than the rows. Every
    pass has `batch` safe rows, as many as `surgery` sees.

    Source:
        Control of our own. The Surgery paper (https://arxiv.org/abs/2602.05228) does
        not have it, as far as could be read.
    """
    draw = reference_batches(context, options.batch)

    def term(current: TrainingPass) -> Tensor:
        batch = draw(current.number)
        states = states_of(context.adapter, batch, "last")
        log_probabilities = target_log_probabilities(context.adapter, states, batch)
        return -options.weight * log_probabilities.mean()

    return Hooks(term=term)
