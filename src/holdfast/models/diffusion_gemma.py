"""DiffusionGemma, watched while it decodes by its own loop in transformers.

It has no mask token: a canvas of random tokens is denoised, at each step tokens of
little entropy are accepted, and all others are drawn anew, so an accepted token may be
given up again. The loop of transformers runs as it is. A hook on the decoder's final
norm sees the states, one on the head how sure each prediction is.

Its draws come from one stream for a whole batch, so prompts are decoded one by one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from holdfast.data.thinking import thinking_format
from holdfast.errors import SettingsError, UnsupportedFamilyError
from holdfast.models.adapter import DtypeName, _check_tokenizer, _device, _dtype
from holdfast.models.batching import require_room
from holdfast.models.checkpoints import find_whole
from holdfast.models.families import Family, _check_precision
from holdfast.models.finite import check_numbers
from holdfast.models.gemma_watch import watching
from holdfast.models.identity import identify
from holdfast.models.loading import read_model, read_tokenizer
from holdfast.models.parts import ModelIdentity
from holdfast.models.responses import Reading, as_completion
from holdfast.models.stepping import Observe, Trace
from holdfast.models.stops import find_stops

MODEL_TYPE, MODEL_CLASS = "diffusion_gemma", "DiffusionGemmaForBlockDiffusion"


@dataclass(frozen=True, kw_only=True)
class CanvasSampling:
    """How the loop of transformers decodes; its own names are in parentheses.

    Attributes:
        gen_length: Tokens of the response, whole canvases (`max_new_tokens`).
        steps: Most steps a canvas (`max_denoising_steps`).
        entropy_bound: How much entropy the accepted tokens of a step may share.
        t_min: Temperature of the last step.
        t_max: Temperature of the first.
        stops_early: Whether a canvas ends once its predictions are stable and sure.
    """

    gen_length: int = 256
    steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stops_early: bool = True


@dataclass(frozen=True, eq=False)
class DiffusionGemma:
    """A DiffusionGemma model, its decoder's norm named.

    Attributes:
        model: The model of transformers, in evaluation mode.
        final_norm: The norm after the decoder's last block. The encoder has one of
            its own, which shares its weight and is not this module.
        reading: How its responses are read.
        canvas_length: Tokens of a canvas.
        max_positions: Longest sequence the model is sound for.
        identity: What a study records about the model.
    """

    model: Any
    final_norm: nn.Module
    reading: Reading
    canvas_length: int
    max_positions: int
    identity: ModelIdentity


def load_diffusion_gemma(
    id_or_path: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: DtypeName = "auto",
) -> DiffusionGemma:
    """Load a DiffusionGemma checkpoint.

    Args:
        id_or_path: Directory of a model, or a Hub id.
        revision: Branch, tag or commit on the Hub.
        device: As in `holdfast.models.adapter.load`.
        dtype: As in `holdfast.models.adapter.load`.

    Raises:
        InputError: If it names no model, or the model has no tokenizer.
        SettingsError: If the device or the dtype is not to be had.
        ModelError: If weights are missing, damaged or do not fit, or there is no
            chat template.
        UnsupportedFamilyError: If it is another model, or this version of
            transformers does not have the class.
        OfflineError: If it is on the Hub, and the Hub cannot be reached.
    """
    place = _device(device)
    checkpoint = find_whole(id_or_path, revision, _family)
    arithmetic = _dtype(dtype, place, checkpoint.config)
    tokenizer = read_tokenizer(checkpoint)
    model = read_model(checkpoint, arithmetic, place).eval()
    check_numbers(model, checkpoint.model_id)
    config = model.config.get_text_config()
    _check_tokenizer(tokenizer, config.vocab_size, checkpoint.model_id)
    identity = identify(checkpoint, tokenizer, arithmetic)
    thinking = thinking_format(tokenizer)
    stops = find_stops(model, tokenizer, thinking).ids
    return DiffusionGemma(
        model=model,
        final_norm=model.model.decoder.norm,
        reading=Reading(tokenizer, thinking, stops),
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
) -> Iterator[Trace]:
    """Answer prompts one by one, in their order.

    Args:
        gemma: The model.
        prompts: Rendered prompts, as text or tokens, each with the seed of its row.
        sampling: How the loop decodes.
        observe: Shown every step of the decoder. `states` are those of the canvas
            that is worked on, `committed` what is accepted at the step, `fresh` what
            was never accepted before; what is accepted may be given up again.

    Returns:
        An iterator over traces, with steps counted through all canvases.
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
        ids = prompt
        if isinstance(prompt, str):
            tokenizer = gemma.reading.tokenizer
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        require_room(len(ids), place, gemma.max_positions, sampling.gen_length)
        jobs.append((place, tuple(int(token) for token in ids), seed))
    return (_answer(gemma, *job, sampling, observe) for job in jobs)


def _family(config: Mapping[str, Any], source: str) -> Family:
    if config.get("model_type") != MODEL_TYPE:
        raise UnsupportedFamilyError(
            f"a model of type `{MODEL_TYPE}`",
            f"`{config.get('model_type')}` in {source}",
            "Load it with `holdfast.models.masked.load_masked`.",
        )
    if not hasattr(transformers, MODEL_CLASS):
        raise UnsupportedFamilyError(
            f"a version of transformers that has {MODEL_CLASS}",
            f"transformers {transformers.__version__}, which does not",
            "Install transformers 5.23 or later.",
        )
    _check_precision(config, source)
    return Family(MODEL_CLASS)


def _answer(
    gemma: DiffusionGemma,
    place: int,
    prompt: tuple[int, ...],
    seed: int,
    sampling: CanvasSampling,
    observe: Observe | None,
) -> Trace:
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
    completion = as_completion(
        gemma.reading, place, prompt, response, gap=0.0, margin=0.0
    )
    return watch.trace(completion, response)
