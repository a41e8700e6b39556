"""The steps of responses that a masked-diffusion model has written, run once more.

What stood where at a step is known from the step at which each token was committed
to, so nothing is chosen again: the states are those of the decoding, whatever the
batch, and no rounding can make another text of it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from holdfast.errors import InputError
from holdfast.models.batching import Batch, batched, pad
from holdfast.models.decoding.steps import Collected, Observe, StepView
from holdfast.models.model import MaskedModel

Scripts = Sequence["Script"]


class Script(NamedTuple):
    """A response that is there, and how it came about."""

    prompt: tuple[int, ...]  # Tokens of the prompt.
    response: tuple[int, ...]  # Tokens of the whole response.
    committed_at: tuple[int, ...]  # The step at which each of them was committed to.

    @property
    def n_steps(self) -> int:
        """Steps that it took."""
        return max(self.committed_at) + 1


class _Stage(NamedTuple):
    """A batch of scripts side by side; the first axis is the example."""

    start: int
    token_ids: Int[Tensor, "example _"]
    attended: Bool[Tensor, "example _"]
    response: Int[Tensor, "example position"]
    real: Bool[Tensor, "example position"]
    committed_at: Int[Tensor, "example position"]


def replay(
    masked: MaskedModel,
    scripts: Scripts,
    observe: Callable[[], Observe],
    *,
    batch_size: int = 16,
) -> list[Tensor]:
    """Show an observer every step of responses that have been written.

    The head is not run. With guidance the states of a step are those of the rows with
    the prompt, so that nothing of it is needed either.

    `observe`: Makes the observer of a batch.

    Returns:
        What the observer returned at every step of each response, in the order
        given, on the CPU.

    Raises:
        InputError: If a response is longer than the model is sound for, or parts of
            it do not fit together.
    """
    for place, script in enumerate(scripts):
        _check(masked, place, script)

    def batch(rows: Sequence[int]) -> list[Tensor]:
        return _replayed(masked, [scripts[row] for row in rows], observe())

    return batched(batch, [[*s.prompt, *s.response] for s in scripts], batch_size)


def _check(masked: MaskedModel, place: int, script: Script) -> None:
    length = len(script.prompt) + len(script.response)
    whole = 0 < len(script.response) == len(script.committed_at)
    if not script.prompt or not whole or length > masked.max_positions:
        raise InputError(
            f"a prompt, a response and a step for each of its tokens, within "
            f"{masked.max_positions} tokens",
            f"{len(script.prompt)}, {len(script.response)} and "
            f"{len(script.committed_at)} of them in response {place}",
            "Run `holdfast rollout` again.",
        )


def _replayed(masked: MaskedModel, scripts: Scripts, observe: Observe) -> list[Tensor]:
    stage, kept = _set(masked, scripts), Collected()
    places = range(len(scripts))
    with torch.inference_mode():
        for step in range(max(script.n_steps for script in scripts)):
            kept.add(tuple(places), observe(_look(masked, stage, step)))
    rows = kept.rows()
    return [rows[place][: scripts[place].n_steps].clone() for place in places]


def _set(masked: MaskedModel, scripts: Scripts) -> _Stage:
    prompts = pad([script.prompt for script in scripts], "left", masked.device)
    responses = pad([script.response for script in scripts], "right", masked.device)
    steps = pad([script.committed_at for script in scripts], "right", masked.device)
    return _Stage(
        start=prompts.token_ids.shape[1],
        token_ids=prompts.token_ids,
        attended=torch.cat([prompts.mask, responses.mask], 1),
        response=responses.token_ids,
        real=responses.mask,
        committed_at=steps.token_ids,
    )


def _look(masked: MaskedModel, stage: _Stage, step: int) -> StepView:
    """Run the pass of a step and return what an observer may see of it."""
    hidden_yet = stage.real & (stage.committed_at >= step)
    text = stage.response.masked_fill(hidden_yet, masked.mask_id)
    token_ids = torch.cat([stage.token_ids, text], 1)
    states = masked.states(Batch(token_ids, stage.attended, "left"))
    shift = int(masked.shift)
    n_rows = len(stage.real)
    rows = torch.arange(n_rows, device=stage.real.device)
    return StepView(
        kind="diffusion",
        step=step,
        rows=rows,
        states=states[:, stage.start :],
        producing=states[:, stage.start - shift : states.shape[1] - shift],
        real=stage.real,
        committed=stage.real & (stage.committed_at <= step),
        fresh=stage.real & (stage.committed_at == step),
        answering=torch.ones_like(rows, dtype=torch.bool),
    )
