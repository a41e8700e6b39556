"""DiffusionGemma, observed while its own loop decodes.

It has no mask token: a canvas of random tokens is denoised, at each step tokens of
little entropy are accepted, and all others are drawn anew, so an accepted token may be
given up again. The loop of transformers runs as it is. A hook on the decoder's final
norm sees the states, one on the head how sure each prediction is.

Its draws come from one stream for a whole batch, so prompts are decoded one by one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from holdfast.data.chat.thinking import thinking_format
from holdfast.errors import SettingsError, UnsupportedFamilyError
from holdfast.models.batching import require_room
from holdfast.models.decoding.row_state import Completion
from holdfast.models.decoding.steps import NOTHING, Observe, StepView, Trace
from holdfast.models.diffusion.denoise import ResponseFormat, as_completion
from holdfast.models.finite import check_numbers
from holdfast.models.loading.checkpoint import find_checkpoint
from holdfast.models.loading.families import Family, check_precision
from holdfast.models.loading.parts import (
    DtypeName,
    check_tokenizer,
    choose_device,
    open_model,
)
from holdfast.models.loading.weights import read_tokenizer
from holdfast.models.model import ModelIdentity, encode
from holdfast.models.stops import find_stops

MODEL_TYPE, MODEL_CLASS = "diffusion_gemma", "DiffusionGemmaForBlockDiffusion"


@dataclass(frozen=True, kw_only=True)
class CanvasSampling:
    """How the loop of transformers decodes; its own names are in parentheses."""

    gen_length: int = 256  # Tokens of the response, whole canvases (`max_new_tokens`).
    steps: int = 48  # Most steps per canvas (`max_denoising_steps`).
    # How much entropy the accepted tokens of a step may share.
    entropy_bound: float = 0.1
    t_min: float = 0.4  # Temperature of the last step.
    t_max: float = 0.8  # Temperature of the first.
    # Whether a canvas ends once its predictions are stable and sure.
    stops_early: bool = True


@dataclass(frozen=True, eq=False)
class DiffusionGemma:
    """A DiffusionGemma model, its decoder's norm named."""

    model: Any  # The model of transformers, in evaluation mode.
    # The norm after the decoder's last block. The encoder has one of its own, which
    # shares its weight and is not this module.
    final_norm: nn.Module
    reading: ResponseFormat  # How its responses are read.
    canvas_length: int  # Tokens of a canvas.
    max_positions: int  # Longest sequence the model is sound for.
    identity: ModelIdentity  # What a study records about the model.


def load_diffusion_gemma(
    id_or_path: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: DtypeName = "auto",
) -> DiffusionGemma:
    """Load a DiffusionGemma checkpoint.

    Raises:
        InputError: If it names no model, or the model has no tokenizer.
        SettingsError: If the device or the dtype is not to be had.
        ModelError: If weights are missing, damaged or do not fit, or there is no
            chat template.
        UnsupportedFamilyError: If it is another model, or this version of
            transformers does not have the class.
    """
    target = choose_device(device)
    checkpoint = find_checkpoint(id_or_path, revision, _family, whole=True)
    model, tokenizer, identity = open_model(checkpoint, target, dtype, read_tokenizer)
    check_numbers(model, checkpoint.model_id)
    config = model.config.get_text_config()
    check_tokenizer(tokenizer, config.vocab_size, checkpoint.model_id)
    thinking = thinking_format(tokenizer)
    stops = find_stops(model, tokenizer, thinking).ids
    return DiffusionGemma(
        model=model,
        final_norm=model.model.decoder.norm,
        reading=ResponseFormat(tokenizer, thinking, stops),
        canvas_length=int(model.config.canvas_length),
        max_positions=int(config.max_position_embeddings),
        identity=identity,
    )


def denoise_canvases(
    gemma: DiffusionGemma,
    prompts: Sequence[tuple[str | Sequence[int], int]],
    sampling: CanvasSampling,
    *,
    observe: Observe | None = None,
) -> Iterator[Completion]:
    """Answer prompts one by one, in their order.

    `observe`: Shown every step of the decoder. `states` are those of the canvas that is
    worked on, `committed` what is accepted at the step, `fresh` what was never accepted
    before; what is accepted may be given up again.

    Returns:
        An iterator over completions; steps of a trace count through all canvases.
        `committed_at` is the step from which a token stayed accepted, at the latest
        the last one of its canvas.

    Raises:
        InputError: If a prompt is empty or leaves no room. Raised before anything
            is decoded, as the next.
        SettingsError: If the response is not a number of whole canvases.
    """
    canvas = gemma.canvas_length
    if sampling.gen_length < 1 or sampling.gen_length % canvas:
        raise SettingsError(
            f"a response of whole canvases of {canvas} tokens",
            f"{sampling.gen_length} tokens",
            f"Take {max(1, sampling.gen_length // canvas) * canvas}.",
        )
    jobs = []
    for place, (prompt, seed) in enumerate(prompts):
        ids = encode(gemma.reading.tokenizer, prompt)
        require_room(len(ids), place, gemma.max_positions, sampling.gen_length)
        jobs.append((place, ids, seed))
    return (_answer(gemma, *job, sampling, observe) for job in jobs)


def _family(config: Mapping[str, Any], source: str) -> Family:
    if config.get("model_type") != MODEL_TYPE:
        raise UnsupportedFamilyError(
            f"a model of type `{MODEL_TYPE}`",
            f"`{config.get('model_type')}` in {source}",
            "Load it with `holdfast.models.loading.masked.load_masked`.",
        )
    if not hasattr(transformers, MODEL_CLASS):
        raise UnsupportedFamilyError(
            f"a version of transformers that has {MODEL_CLASS}",
            f"transformers {transformers.__version__}, which does not",
            "Install transformers 5.23 or later.",
        )
    check_precision(config, source)
    return Family(MODEL_CLASS)


def _answer(
    gemma: DiffusionGemma,
    place: int,
    prompt: tuple[int, ...],
    seed: int,
    sampling: CanvasSampling,
    observe: Observe | None,
) -> Completion:
    device = gemma.model.device
    bound = transformers.EntropyBoundSamplerConfig(sampling.entropy_bound)
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(),
        watching(gemma.model, gemma.final_norm, observe) as watch,
    ):
        torch.manual_seed(seed)
        found = gemma.model.generate(
            torch.tensor([prompt], device=device),
            streamer=watch,
            max_new_tokens=sampling.gen_length,
            max_denoising_steps=sampling.steps,
            sampler_config=bound,
            t_min=sampling.t_min,
            t_max=sampling.t_max,
            # A canvas cannot be stable for as long as it is worked on.
            stability_threshold=1 if sampling.stops_early else sampling.steps,
        ).sequences
    response = found[0, len(prompt) :].tolist()
    # Choices are draws here, and how close they were is not known.
    return as_completion(
        gemma.reading, place, prompt, watch.trace(response), gap=0.0, margin=0.0
    )


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
            look = StepView(
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

    def trace(self, response: Sequence[int]) -> Trace:
        """Return what was seen as a trace, given the tokens of all canvases."""
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
            stack.enter_context(module.register_forward_hook(hook))
        model._prepare_sampler = prepared
        stack.callback(lambda: delattr(model, "_prepare_sampler"))
        yield watch
