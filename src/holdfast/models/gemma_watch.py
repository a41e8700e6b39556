"""What is seen of DiffusionGemma while the loop of transformers decodes."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.models.rows import Completion
from holdfast.models.stepping import NOTHING, Look, Observe, Trace


class Watch:
    """What is seen of one prompt; the loop of transformers takes it for a streamer."""

    def __init__(self, model: Any, observe: Observe | None) -> None:
        """Start with nothing seen."""
        self.observe = observe
        self.cap = model.final_logit_softcapping
        self.sampler: Any = None
        self.states = self.sure = torch.empty(0)
        self.canvases = 0
        self.canvas_of: list[int] = []
        self.drafts: list[Tensor] = []
        self.confidences: list[Tensor] = []
        self.accepted: list[Tensor] = []
        self.observed: list[Tensor] = []

    def see_states(self, _: nn.Module, __: Any, states: Tensor) -> None:
        """Take the states of a pass; the next pass replaces them."""
        self.states = states

    def see_logits(self, _: nn.Module, __: Any, logits: Tensor) -> None:
        """Take how sure the likeliest token is, before any temperature."""
        capped = (logits.float() / self.cap).tanh() * self.cap
        self.sure = (capped.amax(-1) - capped.logsumexp(-1)).exp()

    def put(self, _: Tensor) -> None:
        """Begin the next canvas; the loop shows prompts and finished canvases."""
        self.canvases += 1

    def end(self) -> None:
        """Nothing is left to do."""

    def put_draft(self, value: Tensor) -> None:
        """Record a step; the loop shows its predictions."""
        number, accepted = len(self.drafts), self.sampler.accepted_token_mask
        here = [
            mask
            for mask, canvas in zip(self.accepted, self.canvas_of, strict=True)
            if canvas == self.canvases
        ]
        before = torch.stack(here).any(0) if here else torch.zeros_like(accepted)
        if self.observe is not None:
            look = Look(
                kind="diffusion",
                step=number,
                rows=torch.zeros(1, dtype=torch.long, device=self.states.device),
                states=self.states,
                producing=self.states,
                real=torch.ones_like(accepted),
                committed=accepted,
                fresh=accepted & ~before,
                answering=torch.ones_like(accepted[:, 0]),
            )
            self.observed.append(self.observe(look)[0])
        self.canvas_of.append(self.canvases)
        self.drafts.append(value[0])
        self.confidences.append(self.sure[0])
        self.accepted.append(accepted)

    def trace(self, completion: Completion, response: Sequence[int]) -> Trace:
        """Return what was seen as a trace.

        Args:
            completion: The finished row.
            response: Tokens of all canvases.
        """
        n_steps, width = len(self.drafts), len(self.drafts[0])
        predictions = torch.full((n_steps, len(response)), NOTHING)
        confidences = torch.full((n_steps, len(response)), torch.nan)
        settled = torch.empty(len(response), dtype=torch.long)
        tokens = torch.tensor(list(response))
        for step, canvas in enumerate(self.canvas_of):
            here = slice((canvas - 1) * width, canvas * width)
            predictions[step, : here.start] = tokens[: here.start]
            predictions[step, here] = self.drafts[step]
            confidences[step, here] = self.confidences[step].cpu()
        for canvas in range(1, len(response) // width + 1):
            steps = [s for s, number in enumerate(self.canvas_of) if number == canvas]
            accepted = torch.cat([self.accepted[step] for step in steps]).cpu()
            # Steps of the last run of acceptance; at the end all is taken as it is.
            run = accepted.flip(0).cummin(0).values.sum(0).clamp(min=1)
            settled[(canvas - 1) * width : canvas * width] = steps[-1] + 1 - run
        return Trace(
            completion=completion,
            kind="diffusion",
            token_ids=tokens,
            committed_at=settled,
            confidence=confidences.gather(0, settled[None])[0],
            predictions=predictions,
            confidences=confidences,
            observed=torch.stack(self.observed).cpu() if self.observed else None,
        )


@contextmanager
def watching(
    model: Any, final_norm: nn.Module, observe: Observe | None
) -> Iterator[Watch]:
    """Watch a model while the context lasts, and leave it as it was.

    Args:
        model: The model of transformers.
        final_norm: The norm of its decoder.
        observe: Shown every step.

    Yields:
        The watch, which `generate` must be given as its streamer.
    """
    watch, prepare = Watch(model, observe), model._prepare_sampler

    def prepared(config: Any) -> Any:
        # Nothing else says which of its predictions the loop has accepted.
        watch.sampler = prepare(config)
        return watch.sampler

    with ExitStack() as stack:
        for module, hook in (
            (final_norm, watch.see_states),
            (model.lm_head, watch.see_logits),
        ):
            stack.callback(module.register_forward_hook(hook).remove)
        model._prepare_sampler = prepared
        stack.callback(lambda: delattr(model, "_prepare_sampler"))
        yield watch
