"""Batched generation whose results do not depend on how rows share a batch.

Every row draws from its own random numbers, one per step, whatever stands beside it.
Rows are padded on the left, share one cache, and leave it when they are done. What a
model's `generation_config` says about sampling is not used, only its stop tokens.

Where it is known what a row will probably say, that draft is read in one pass and
kept as far as the row would have drawn it itself: the same rows, in fewer passes.
"""

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.models.batching import halving_batches, longest_first
from holdfast.models.decoding.branching import Trunk, Trunks, read_branches
from holdfast.models.decoding.decoder import Control, Decoder, Drawn
from holdfast.models.decoding.edits import Edit, editing
from holdfast.models.decoding.jobs import Job, Prompts, fits_drafts, prepare
from holdfast.models.decoding.kv_cache import Opening, read_opening
from holdfast.models.decoding.row_state import (
    Completion,
    GenerationState,
    Sampling,
    StoppingRules,
)
from holdfast.models.decoding.step_attention import attending
from holdfast.models.decoding.steps import (
    NOTHING,
    Collected,
    Observe,
    Step,
    StepView,
    Trace,
)
from holdfast.models.interventions import HeadEdit, first_layer
from holdfast.models.model import Adapter
from holdfast.report.progress import Tick


def generate(
    adapter: Adapter,
    prompts: Prompts,
    sampling: Sampling,
    *,
    batch_size: int = 32,
    stop_ids: Collection[int] | None = None,
    edit: Edit | None = None,
    thinking_done: bool = False,
    drafts: Sequence[Sequence[int]] | None = None,
    trunks: Sequence[Trunk] | None = None,
    observe: Observe | None = None,
    control: Control | None = None,
    told: Callable[[Tick], None] | None = None,
) -> Iterator[list[Completion]]:
    """Complete prompts, batch by batch, the longest prompts first.

    Args:
        adapter: The model.
        prompts: Rendered prompts, as text or tokens, each with the seed of its row.
        sampling: How tokens are drawn, and how many.
        batch_size: Rows decoded together; halved whenever memory runs out.
        stop_ids: Tokens that end a row; those of the model by default.
        edit: Heads to scale or states to move while decoding; its ranges, if it has
            any, are one for each prompt and count the tokens of that row from 0, and
            so are its tables of factors, if it has several.
        thinking_done: Whether the prompts hold their thinking and its end, so that
            the answer begins at once. Spans count all of it as prompt then.
        drafts: Tokens that probably follow each prompt, such as those that followed
            it without the edit. They make rows faster and change none; where
            they could not be kept from it they are not used (see `fits_drafts`).
        trunks: A sequence for each prompt whose first tokens are also those of the
            prompt; prompts with one trunk, up to their own places, have it read once.
            It makes rows faster and changes none; where it cannot be used it is not:
            with drafts or an edit, and where a layer keeps not all tokens.
        observe: Shown every step; what it returns is kept in the traces of the
            completions. A row has one step per token, its stop token included. Drafts,
            which would skip steps, are not used then.
        control: May end rows and force tokens at every step. Drafts are not used then.
        told: Called after every pass; where memory runs out, passes are told again.

    Returns:
        An iterator over batches of completions; `index` gives the order of the
        prompts. A row depends on its prompt, its seed and `sampling` alone, except
        where a choice was closer than rounding (`min_top2_gap`, `min_margin`). Where
        its own prompt leaves less room than `max_thinking` and `max_answer` take,
        its thinking has what is left.

    Raises:
        InputError: If a prompt is empty or leaves no room for thinking and answer
            (see `longest_prompt`), if there is no tokenizer, or if nothing is known
            to stop a row. Raised before anything is decoded.
        SettingsError: If the batch size is not positive, or the edit does not fit.
        EnvironmentProblem: If one row alone does not fit in memory.
    """
    rules, jobs = prepare(
        adapter, prompts, sampling, stop_ids, edit, drafts, thinking_done=thinking_done
    )
    seen = observe is not None or control is not None
    if seen:
        jobs = [job._replace(draft=()) for job in jobs]
    width = batch_size
    # Where rows can join others that are under way, they do as these end.
    more = not seen and len(jobs) > width and fits_drafts(adapter, edit)
    at_once = TAKEN * width if more else width
    plain = edit is None and drafts is None and not seen
    shared = trunks if plain and fits_drafts(adapter, edit) else None
    if shared is not None:
        jobs = sorted(jobs, key=lambda job: _along(shared[job.place], job))
    elif any(job.draft for job in jobs):
        jobs = _like_by_like(jobs, edit)
    else:
        jobs = [jobs[i] for i in longest_first([job.prompt for job in jobs])]

    def decode(batch: Sequence[Job]) -> list[Completion]:
        nonlocal width
        try:
            return _decode(
                adapter, rules, batch, edit, told, observe, control, width, shared
            )
        except (RuntimeError, MemoryError):
            # If memory ran out, the batch is halved, and so are the rows in the cache.
            width = max(1, width // 2)
            raise

    batches = halving_batches(decode, jobs, at_once)
    return (completions for completions, _ in batches)


def decoding_steps(
    adapter: Adapter,
    prompts: Prompts,
    sampling: Sampling,
    *,
    stop_ids: Collection[int] | None = None,
    edit: Edit | None = None,
    thinking_done: bool = False,
    observe: Observe | None = None,
    control: Control | None = None,
) -> Iterator[Step]:
    """Answer prompts as one batch, and yield every step when it has been taken.

    Arguments and errors are those of `generate`. Whoever stops the iterator early saves
    the rest.
    """
    rules, jobs = prepare(
        adapter, prompts, sampling, stop_ids, edit, thinking_done=thinking_done
    )
    passes = _passes(adapter, rules, jobs, edit, observe=observe, control=control)
    return _steps(jobs, passes)


def _along(trunk: Trunk, job: Job) -> tuple[Any, ...]:
    """Return where a prompt stands among others: by its trunk, then by its place."""
    return -len(trunk), trunk, -len(job.prompt), job.prompt, job.place


TAKEN = 8
"""How many times as many rows as decode side by side are taken together; the others
wait for room, and most of those with a draft end within it and need none."""


def _like_by_like(jobs: Sequence[Job], edit: Edit | None) -> list[Job]:
    """Return jobs in an order in which neighbours share most of their first pass."""
    layers = {}
    if isinstance(edit, HeadEdit) and edit.by_row:
        layers = {job.place: first_layer(edit.factors[job.place]) for job in jobs}
    return sorted(
        jobs,
        key=lambda job: (layers.get(job.place, 0), -len(job.read), job.read, job.place),
    )


class DecodingPass(NamedTuple):
    """One pass of a batch: a token for each of its rows."""

    number: int  # Number of the step, from 0.
    rows: Sequence[
        GenerationState
    ]  # The rows that were in the batch, which may have ended.
    drawn: Drawn  # What each of them drew.
    seen: Tensor | None  # What the observer returned; None without one.


def _passes(
    adapter: Adapter,
    rules: StoppingRules,
    jobs: Sequence[Job],
    edit: Edit | None,
    told: Callable[[Tick], None] | None = None,
    observe: Observe | None = None,
    finished: list[GenerationState] | None = None,
    width: int | None = None,
    *,
    control: Control | None = None,
    whole: bool = True,
    trunks: Sequence[Trunk] | None = None,
) -> Generator[DecodingPass, None, None]:
    """Yield every pass of rows, and put those that have ended into a list.

    At most `width` of them, or all, are in the cache at a time.

    `whole`: Whether prompts are read side by side as a first pass of all rows, as who
    looks at steps wants it; else those of a length are, with their drafts.
    """
    finished = [] if finished is None else finished
    number_of = {job.place: number for number, job in enumerate(jobs)}
    waiting, width = list(jobs), width or len(jobs)
    drafted = any(job.draft for job in jobs)
    apart = not whole and fits_drafts(adapter, edit)
    # Attention is tried first, on a model as it is.
    with attending(adapter) as ours, editing(adapter, edit) as live:
        decoder: Decoder | None = None
        alike = apart and live.mask is None and not live.by_row
        known = None if trunks is None else Trunks(adapter, trunks, jobs)
        alike = alike and known is None
        opening = read_opening(adapter, [j.prompt for j in jobs]) if alike else None

        def begin(chunk: Sequence[Job]) -> Decoder:
            more = Decoder(
                adapter, rules, chunk, live, step_attention=ours, control=control
            )
            if apart:
                finished.extend(_read_prompts(more, chunk, opening, known, told))
            return more

        while waiting or decoder is not None:
            if waiting:
                decoder = _fill(
                    decoder, waiting, width, begin, drafted, apart, known is not None
                )
            if decoder is None:
                continue
            rows, number, read = decoder.rows, decoder.step, decoder.token_ids.numel()
            drawn, seen = decoder.advance(), None
            if observe is not None:
                numbers = [number_of[row.index] for row in rows]
                seen = observe(_look(number, numbers, rows, drawn))
            if told is not None:
                going = sum(drawn.going)
                # A list, since a generator costs a call for each row and step.
                left = sum([row.finish is None for row in rows])
                first = number == 0 and read > going
                told(Tick(going - left, going, read, is_prompt=first))
            finished += decoder.drop_finished()
            decoder = decoder if decoder.rows else None
            yield DecodingPass(number, rows, drawn, seen)


def _fill(
    decoder: Decoder | None,
    waiting: list[Job],
    width: int,
    begin: Callable[[Sequence[Job]], Decoder],
    drafted: bool,
    apart: bool,
    branching: bool,
) -> Decoder | None:
    """Let rows that wait join, and take them off the list, once there is room."""
    # Rows that must be missing before others join, and before no more of them do: a
    # pass over few prompts costs what one over many does, and drafts leave few rows.
    enough, least = (width - width // 2,) * 2 if drafted else (max(1, width // 4), 1)
    filling = decoder is None or len(decoder.rows) <= width - enough
    while waiting and filling:
        room = width - len(decoder.rows if decoder else ())
        room = _alike(waiting, room) if apart else room
        more = begin(waiting[:room])
        del waiting[:room]
        if decoder is not None:
            decoder.join(more)
        elif more.rows:
            decoder = more
        filling = decoder is None or len(decoder.rows) <= width - least
        if decoder is not None:
            # How many rows drafts leave is not known, and rooms for nobody would be
            # copied along.
            most = min(width, len(decoder.rows) + len(waiting))
            decoder.expect(most if waiting and not drafted else 0)
    return decoder


def _alike(jobs: Sequence[Job], most: int) -> int:
    """Return how many jobs, from the first on, are read together without much padding.

    Where none has a draft they come longest first, and a longer row costs each other
    one as much.
    """
    if any(job.draft for job in jobs[:most]):
        return most
    longest = len(jobs[0].prompt)
    least = longest - max(8, longest // 8)
    short = (n for n, job in enumerate(jobs[:most]) if len(job.prompt) < least)
    return next(short, most)


def _read_prompts(
    decoder: Decoder,
    jobs: Sequence[Job],
    opening: Opening | None,
    trunks: Trunks | None,
    told: Callable[[Tick], None] | None,
) -> list[GenerationState]:
    """Read prompts and drafts, and return the rows that end within them."""
    if trunks is None:
        ended = decoder.read_prompts(opening)
    else:
        ended = read_branches(decoder, jobs, trunks)
    if told is not None:
        read = sum(len(job.read) for job in jobs)
        written = sum(not job.draft for job in jobs)
        told(Tick(len(ended), written, read, is_prompt=True))
    return ended


def _decode(
    adapter: Adapter,
    rules: StoppingRules,
    jobs: Sequence[Job],
    edit: Edit | None,
    told: Callable[[Tick], None] | None,
    observe: Observe | None,
    control: Control | None,
    width: int,
    trunks: Sequence[Trunk] | None,
) -> list[Completion]:
    finished: list[GenerationState] = []
    observed, confidence = Collected(), Collected()
    passes = _passes(
        adapter,
        rules,
        jobs,
        edit,
        told,
        observe,
        finished,
        width,
        control=control,
        whole=observe is not None or control is not None,
        trunks=trunks,
    )
    with torch.inference_mode(), closing(passes):
        for _, rows, drawn, seen in passes:
            if seen is not None:
                places = [row.index for row in rows]
                observed.add(places, seen)
                confidence.add(places, _probability(drawn))
    completions = {row.index: row.complete() for row in finished}
    # Outside inference mode: what is kept are ordinary tensors.
    seen_of, sure_of = observed.rows(), confidence.rows()
    return [
        _traced(completions[job.place], sure_of[job.place], seen_of[job.place])
        if observe is not None
        else completions[job.place]
        for job in jobs
    ]


def _traced(
    completion: Completion, confidence: Float[Tensor, "_"], observed: Tensor
) -> Completion:
    written = completion.token_ids[completion.spans.prompt[1] :]
    n_steps = len(written)
    trace = Trace(
        kind="autoregressive",
        token_ids=torch.tensor(written),
        committed_at=torch.arange(n_steps),
        confidence=confidence[:n_steps].clone(),
        observed=observed[:n_steps].clone(),
    )
    return replace(completion, trace=trace)


def _steps(jobs: Sequence[Job], passes: Iterator[DecodingPass]) -> Iterator[Step]:
    said: dict[int, list[int]] = {job.place: [] for job in jobs}
    while True:
        # Not around the loop: whoever reads the steps would be in it as well.
        with torch.inference_mode():
            done = next(passes, None)
        if done is None:
            return
        tokens = done.drawn.tokens[:, 0].tolist()
        for row, token, going in zip(done.rows, tokens, done.drawn.going, strict=True):
            said[row.index].append(token if going else NOTHING)
        yield _step(done, [said[row.index] for row in done.rows])


def _look(
    number: int, numbers: Sequence[int], rows: Sequence[GenerationState], drawn: Drawn
) -> StepView:
    states = drawn.states[:, None]
    device = states.device
    fresh = torch.tensor(drawn.going, device=device)[:, None]
    answering = [row.answering for row in rows]
    return StepView(
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


def _step(done: DecodingPass, said: Sequence[Sequence[int]]) -> Step:
    predicted: Int[Tensor, "example position"] = torch.tensor(said)
    committed = predicted != NOTHING
    fresh = torch.zeros_like(committed)
    fresh[:, -1] = torch.tensor(done.drawn.going)
    confidence = torch.full(predicted.shape, torch.nan)
    confidence[:, -1] = _probability(done.drawn)
    places = tuple(row.index for row in done.rows)
    return Step(done.number, places, predicted, confidence, committed, fresh, done.seen)


def _probability(drawn: Drawn) -> Float[Tensor, "example"]:
    """Return how likely each token was that was taken; NaN of rows that had ended."""
    logits = drawn.logits.float()
    taken = logits.gather(-1, drawn.tokens)[:, 0]
    shares = (taken - logits.logsumexp(-1)).exp().cpu()
    return shares.masked_fill(~torch.tensor(drawn.going), torch.nan)
