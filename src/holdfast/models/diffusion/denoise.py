"""Masked-diffusion decoding, one observable step at a time.

The response starts as masks. Each step is one forward pass over prompt and response:
a token is predicted at every open position, and a part of them is committed to. Every
row has its own length, schedule and random numbers, and attends to no padding, so the
batch it stands in changes nothing.

A token that is committed to stays. "Remasking" means that the other predictions are
thrown away: both are in every `Step`.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holdfast.data.chat.conversation import completion_spans
from holdfast.data.chat.thinking import ThinkingFormat
from holdfast.errors import SettingsError
from holdfast.models.batching import longest_batches, require_room
from holdfast.models.decoding.row_state import Completion
from holdfast.models.decoding.steps import Collected, Observe, Step, Trace
from holdfast.models.diffusion.denoising_state import DenoisingState, Job
from holdfast.models.diffusion.unmasking import UnmaskingSchedule
from holdfast.models.model import MaskedModel


def denoise(
    masked: MaskedModel,
    prompts: Sequence[tuple[str | Sequence[int], int]],
    sampler: UnmaskingSchedule,
    *,
    batch_size: int = 16,
    gen_lengths: Sequence[int] | None = None,
    observe: Observe | None = None,
) -> Iterator[list[Completion]]:
    """Answer prompts, batch by batch, the longest first.

    Args:
        masked: The model.
        prompts: Rendered prompts, as text or tokens, each with the seed of its row.
            Text is tokenised without special tokens, since templates write them.
        sampler: How a step decides.
        batch_size: Rows decoded together; halved whenever memory runs out.
        gen_lengths: Length of each response; that of the sampler by default.
        observe: Shown every step; what it returns is kept in the traces.

    Returns:
        An iterator over batches of completions, each with its trace; `index` gives
        the order of the prompts. A row depends on its prompt, its seed, its length and
        `sampler` alone, except where a choice was closer than rounding (see `Trace`).

    Raises:
        InputError: If a prompt is empty or leaves no room for the response.
        SettingsError: If the batch size is not positive, or lengths do not fit the
            sampler. Raised before anything is decoded, as the first is.
        EnvironmentProblem: If one row alone does not fit in memory.
    """
    jobs = _jobs(masked, prompts, sampler, gen_lengths)

    def decode(batch: Sequence[Job]) -> list[Completion]:
        return _decode(masked, batch, sampler, observe)

    return longest_batches(decode, jobs, lambda job: job.prompt, batch_size)


def denoising_steps(
    masked: MaskedModel,
    prompts: Sequence[tuple[str | Sequence[int], int]],
    sampler: UnmaskingSchedule,
    *,
    gen_lengths: Sequence[int] | None = None,
    observe: Observe | None = None,
) -> Iterator[Step]:
    """Answer prompts as one batch, and yield every step when it has been taken.

    Returns:
        An iterator over steps; whoever stops it early saves the rest.
    """
    jobs = _jobs(masked, prompts, sampler, gen_lengths)
    return (step for step, _ in _steps(masked, jobs, sampler, observe))


def _jobs(
    masked: MaskedModel,
    prompts: Sequence[tuple[str | Sequence[int], int]],
    sampler: UnmaskingSchedule,
    gen_lengths: Sequence[int] | None,
) -> list[Job]:
    if gen_lengths is None:
        gen_lengths = [sampler.gen_length] * len(prompts)
    if len(gen_lengths) != len(prompts):
        raise SettingsError(
            f"one length for each of {len(prompts)} prompts",
            f"{len(gen_lengths)} lengths",
            "Give each response its own, or leave them to the sampler.",
        )
    jobs = []
    for place, ((prompt, seed), length) in enumerate(
        zip(prompts, gen_lengths, strict=True)
    ):
        sampler.plan(length)
        ids = masked.encode(prompt)
        require_room(len(ids), place, masked.max_positions, length)
        jobs.append(Job(place, ids, seed, length))
    return jobs


def _steps(
    masked: MaskedModel,
    jobs: Sequence[Job],
    sampler: UnmaskingSchedule,
    observe: Observe | None,
) -> Iterator[tuple[Step, Tensor]]:
    """Yield every step, observed, and how close its choices were."""
    if not jobs:
        return
    state = DenoisingState(masked, jobs, sampler)
    while not state.done:
        # Not around the loop: whoever reads the steps would be in that mode as well.
        with torch.inference_mode():
            look, step, close = state.advance()
            seen = None if observe is None else observe(look)
            del look
            if sampler.threshold is not None:
                state.drop_finished()
        yield step._replace(observed=seen), close


def _decode(
    masked: MaskedModel,
    jobs: Sequence[Job],
    sampler: UnmaskingSchedule,
    observe: Observe | None,
) -> list[Completion]:
    kept = [Collected() for _ in range(4)]
    observed = Collected()
    for step, close in _steps(masked, jobs, sampler, observe):
        parts = (close, step.predicted, step.confidence, step.fresh)
        for one, values in zip(kept, parts, strict=True):
            one.add(step.places, values)
        if step.observed is not None:
            observed.add(step.places, step.observed)
    by_place, seen = [one.rows() for one in kept], observed.rows()
    return [
        _completion(
            masked, job, [one[job.place] for one in by_place], seen.get(job.place)
        )
        for job in jobs
    ]


def _completion(
    masked: MaskedModel, job: Job, parts: Sequence[Tensor], observed: Tensor | None
) -> Completion:
    close, predicted, confidence, fresh = parts
    committed_at = fresh[:, : job.length].int().argmax(0)
    n_steps = int(committed_at.max()) + 1
    predicted = predicted[:n_steps, : job.length].clone()
    confidence = confidence[:n_steps, : job.length].clone()
    gap, margin = close.amin(0).tolist()
    reading = ResponseFormat(masked.tokenizer, masked.thinking, masked.stop_ids)
    trace = Trace(
        kind="diffusion",
        token_ids=predicted[-1],
        committed_at=committed_at,
        confidence=confidence.gather(0, committed_at[None])[0],
        predictions=predicted,
        confidences=confidence,
        observed=None if observed is None else observed[:n_steps].clone(),
    )
    return as_completion(reading, job.place, job.prompt, trace, gap=gap, margin=margin)


class ResponseFormat(NamedTuple):
    """How a response is read."""

    tokenizer: Any  # Tokenizer of the model.
    thinking: ThinkingFormat | None  # Its thinking format, or None.
    stop_ids: Collection[int]  # Tokens that end an answer.


def as_completion(
    reading: ResponseFormat,
    place: int,
    prompt: Sequence[int],
    trace: Trace,
    *,
    gap: float,
    margin: float,
) -> Completion:
    """Return a response as a completion, cut at its first stop token.

    `gap`: Least lead of a token over the second.
    `margin`: Least lead of a position over the first that was left open.
    """
    response = trace.token_ids.tolist()
    stops = [i for i, token in enumerate(response) if token in reading.stop_ids]
    end = stops[0] if stops else len(response)
    token_ids = (*prompt, *response[:end])
    spans = completion_spans(
        reading.tokenizer, token_ids, len(prompt), reading.thinking
    )

    def text(region: tuple[int, int]) -> str:
        return str(
            reading.tokenizer.decode(
                list(token_ids[slice(*region)]),
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        )

    start, template_end = spans.end_template
    return Completion(
        index=place,
        token_ids=(*token_ids, *response[end : end + 1]),
        spans=spans,
        thinking=text(spans.thinking),
        answer=text(spans.answer),
        # Marks that end an answer end it as a stop token does.
        finish="stop" if stops or spans.answer[1] < len(token_ids) else "length",
        forced_close=False,
        closed=reading.thinking is None or start < template_end,
        min_top2_gap=gap,
        min_margin=margin,
        trace=trace,
    )
