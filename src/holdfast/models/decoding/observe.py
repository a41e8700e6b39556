"""Left-to-right decoding, one observable step per token.

The rows, the cache and the draws are those of `generation`: this only looks on.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.models.batching import halving_batches, longest_first
from holdfast.models.decoding.decoder import Decoder, Drawn, Job
from holdfast.models.decoding.generate import prepare
from holdfast.models.decoding.row_state import Completion, Row, Rules, Sampling
from holdfast.models.decoding.steps import (
    NOTHING,
    Collected,
    Look,
    Observe,
    Step,
    Trace,
)
from holdfast.models.interventions import HeadEdit, scale_heads
from holdfast.models.model import Adapter

Prompts = Sequence[tuple[str | Sequence[int], int]]


def decode(
    adapter: Adapter,
    prompts: Prompts,
    sampling: Sampling,
    *,
    batch_size: int = 32,
    stop_ids: Collection[int] | None = None,
    edit: HeadEdit | None = None,
    thinking_done: bool = False,
    observe: Observe | None = None,
) -> Iterator[list[Trace]]:
    """Answer prompts as `generate` does, and keep what was seen at every step.

    Args:
        adapter: The model.
        prompts: As in `generate`.
        sampling: How tokens are drawn, and how many.
        batch_size: Rows decoded together; halved whenever memory runs out.
        stop_ids: Tokens that end a row; those of the model by default.
        edit: Heads to scale while decoding.
        thinking_done: Whether the prompts hold their thinking and its end.
        observe: Shown every step; what it returns is kept in the traces.

    Returns:
        An iterator over batches of traces; `completion` is what `generate` returns.
        A row has one step per token, its stop token included, and no step after it.

    Raises:
        InputError: As `generate` does.
        SettingsError: As `generate` does.
        EnvironmentProblem: As `generate` does.
    """
    rules, jobs = prepare(
        adapter, prompts, sampling, stop_ids, edit, thinking_done=thinking_done
    )
    ordered = [jobs[i] for i in longest_first([job.prompt for job in jobs])]
    batches = halving_batches(
        lambda batch: _traces(adapter, rules, batch, edit, observe), ordered, batch_size
    )
    return (traces for traces, _ in batches)


def decoding_steps(
    adapter: Adapter,
    prompts: Prompts,
    sampling: Sampling,
    *,
    stop_ids: Collection[int] | None = None,
    edit: HeadEdit | None = None,
    thinking_done: bool = False,
    observe: Observe | None = None,
) -> Iterator[Step]:
    """Answer prompts as one batch, and yield every step when it has been taken.

    Args:
        adapter: The model.
        prompts: As in `generate`.
        sampling: How tokens are drawn, and how many.
        stop_ids: As in `decode`.
        edit: As in `decode`.
        thinking_done: As in `decode`.
        observe: As in `decode`.

    Returns:
        An iterator over steps; whoever stops it early saves the rest.

    Raises:
        InputError: As `generate` does.
        SettingsError: As `generate` does.
    """
    rules, jobs = prepare(
        adapter, prompts, sampling, stop_ids, edit, thinking_done=thinking_done
    )
    return _steps(adapter, rules, jobs, edit, observe)


def _steps(
    adapter: Adapter,
    rules: Rules,
    jobs: Sequence[Job],
    edit: HeadEdit | None,
    observe: Observe | None,
    finished: list[Row] | None = None,
) -> Iterator[Step]:
    """Yield every step of a batch, and put its finished rows into the list."""
    if not jobs:
        return
    finished = [] if finished is None else finished
    number_of = {job.place: number for number, job in enumerate(jobs)}
    with scale_heads(adapter, edit) as live:
        decoder = Decoder(adapter, rules, jobs, live)
        said: dict[int, list[int]] = {job.place: [] for job in jobs}
        while decoder.rows:
            rows, number = tuple(decoder.rows), decoder.step
            # Not around the loop: whoever reads the steps would be in it as well.
            with torch.inference_mode():
                drawn = decoder.advance()
                seen = None
                if observe is not None:
                    numbers = [number_of[row.index] for row in rows]
                    seen = observe(_look(number, numbers, rows, drawn))
                finished += decoder.drop_finished()
            for row, token, going in zip(
                rows, drawn.tokens[:, 0].tolist(), drawn.going, strict=True
            ):
                said[row.index].append(token if going else NOTHING)
            yield _step(number, [said[row.index] for row in rows], rows, drawn, seen)


def _look(
    number: int, numbers: Sequence[int], rows: Sequence[Row], drawn: Drawn
) -> Look:
    states = drawn.states[:, None]
    device = states.device
    fresh = torch.tensor(drawn.going, device=device)[:, None]
    answering = [row.answering for row in rows]
    return Look(
        kind="autoregressive",
        step=number,
        rows=torch.tensor(numbers, device=device),
        states=states,
        producing=states,
        real=torch.ones_like(fresh),
        committed=torch.ones_like(fresh),
        fresh=fresh,
        answering=torch.tensor(answering, device=device),
    )


def _step(
    number: int,
    said: Sequence[Sequence[int]],
    rows: Sequence[Row],
    drawn: Drawn,
    seen: Tensor | None,
) -> Step:
    predicted: Int[Tensor, "example position"] = torch.tensor(said)
    committed = predicted != NOTHING
    fresh = torch.zeros_like(committed)
    fresh[:, -1] = torch.tensor(drawn.going)
    confidence = torch.full(predicted.shape, torch.nan)
    confidence[:, -1] = _probability(drawn).masked_fill(~fresh[:, -1], torch.nan)
    places = tuple(row.index for row in rows)
    return Step(number, places, predicted, confidence, committed, fresh, seen)


def _probability(drawn: Drawn) -> Float[Tensor, "example"]:
    logits = drawn.logits.float()
    taken = logits.gather(-1, drawn.tokens)[:, 0]
    return (taken - logits.logsumexp(-1)).exp().cpu()


def _traces(
    adapter: Adapter,
    rules: Rules,
    jobs: Sequence[Job],
    edit: HeadEdit | None,
    observe: Observe | None,
) -> list[Trace]:
    observed, confidence = Collected(), Collected()
    finished: list[Row] = []
    for step in _steps(adapter, rules, jobs, edit, observe, finished):
        confidence.add(step.places, step.confidence[:, -1])
        if step.observed is not None:
            observed.add(step.places, step.observed)
    by_place, sure = observed.rows(), confidence.rows()
    completions = {row.index: row.complete() for row in finished}
    return [
        _trace(completions[job.place], sure[job.place], by_place.get(job.place))
        for job in jobs
    ]


def _trace(
    completion: Completion, confidence: Float[Tensor, "step"], observed: Tensor | None
) -> Trace:
    written = completion.token_ids[completion.spans.prompt[1] :]
    n_steps = len(written)
    return Trace(
        completion=completion,
        kind="autoregressive",
        token_ids=torch.tensor(written),
        committed_at=torch.arange(n_steps),
        confidence=confidence[:n_steps].clone(),
        predictions=None,
        confidences=None,
        observed=None if observed is None else observed[:n_steps].clone(),
    )
