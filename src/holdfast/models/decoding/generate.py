"""Batched generation whose results do not depend on how rows share a batch.

Every row draws from its own random numbers, one per step, whatever stands beside it.
Rows are padded on the left, share one cache, and leave it when they are done. What a
model's `generation_config` says about sampling is not used, only its stop tokens.

Where it is known what a row will probably say, that draft is read in one pass and
kept as far as the row would have drawn it itself: the same rows, in fewer passes.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from holdfast.errors import InputError, SettingsError
from holdfast.models.batching import halving_batches, longest_first
from holdfast.models.decoding.decoder import Decoder, Job, fits_drafts
from holdfast.models.decoding.row_state import Completion, Row, Rules, Sampling
from holdfast.models.interventions import HeadEdit, first_layer, scale_heads
from holdfast.models.model import Adapter
from holdfast.models.stops import find_stops
from holdfast.report.progress import Tick


def generate(
    adapter: Adapter,
    prompts: Sequence[tuple[str | Sequence[int], int]],
    sampling: Sampling,
    *,
    batch_size: int = 32,
    stop_ids: Collection[int] | None = None,
    edit: HeadEdit | None = None,
    thinking_done: bool = False,
    drafts: Sequence[Sequence[int]] | None = None,
    told: Callable[[Tick], None] | None = None,
) -> Iterator[list[Completion]]:
    """Complete prompts, batch by batch, the longest prompts first.

    Args:
        adapter: The model.
        prompts: Rendered prompts, as text or tokens, each with the seed of its row.
            Text is tokenised without special tokens, since templates write them.
        sampling: How tokens are drawn, and how many.
        batch_size: Rows decoded together; halved whenever memory runs out.
        stop_ids: Tokens that end a row; those of the model by default.
        edit: Heads to scale while decoding; its ranges, if it has any, are one for
            each prompt and count the tokens of that row from 0, and so are its
            tables of factors, if it has several.
        thinking_done: Whether the prompts hold their thinking and its end, so that
            the answer begins at once. Spans count all of it as prompt then.
        drafts: Tokens that probably follow each prompt, such as those that followed
            it without the edit. They make rows faster and change none; where
            they could not be kept from it they are not used (see `fits_drafts`).
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
    at_once = batch_size
    if any(job.draft for job in jobs):
        # Rows that end within their drafts leave room for others.
        jobs, at_once = _like_by_like(jobs, edit), DRAFTED * batch_size
    else:
        jobs = [jobs[i] for i in longest_first([job.prompt for job in jobs])]
    batches = halving_batches(
        lambda batch: _decode(
            adapter, rules, batch, edit, told, min(batch_size, len(batch))
        ),
        jobs,
        at_once,
    )
    return (completions for completions, _ in batches)


def prepare(
    adapter: Adapter,
    prompts: Sequence[tuple[str | Sequence[int], int]],
    sampling: Sampling,
    stop_ids: Collection[int] | None = None,
    edit: HeadEdit | None = None,
    drafts: Sequence[Sequence[int]] | None = None,
    *,
    thinking_done: bool = False,
) -> tuple[Rules, list[Job]]:
    """Check what `generate` is given, and return the rows that are to be written.

    Args:
        adapter: The model.
        prompts: As in `generate`.
        sampling: As in `generate`.
        stop_ids: As in `generate`.
        edit: As in `generate`.
        drafts: As in `generate`.
        thinking_done: As in `generate`.

    Returns:
        The rules of all rows, and one job for each prompt, in their order.

    Raises:
        InputError: As `generate` does.
        SettingsError: As `generate` does.
    """
    _require_tokenizer(adapter)
    stops = stop_tokens(adapter) if stop_ids is None else frozenset(stop_ids)
    if not stops:
        raise InputError(
            "a token that ends an answer",
            "none in the model's generation_config or tokenizer",
            "Add `eos_token_id` to the model's generation_config.json.",
        )
    _check_rows(edit, drafts, len(prompts))
    rules = _rules(adapter, sampling, stops, thinking_done=thinking_done)
    known = drafts if drafts is not None and fits_drafts(adapter, edit) else ()
    jobs = [
        _job(adapter, rules, index, prompt, seed, known[index] if known else ())
        for index, (prompt, seed) in enumerate(prompts)
    ]
    return rules, jobs


def longest_prompt(
    adapter: Adapter, sampling: Sampling, *, thinking_done: bool = False
) -> int:
    """Return how many tokens a prompt may have, for an answer to fit behind it.

    Behind it there is room for the whole answer, the end of the thinking, and at
    least one token of thinking where thinking is asked for.

    Args:
        adapter: The model.
        sampling: Limits on thinking and answer.
        thinking_done: As in `generate`.

    Returns:
        Tokens; not above 0 where no prompt fits.

    Raises:
        InputError: If there is no tokenizer.
    """
    _require_tokenizer(adapter)
    rules = _rules(adapter, sampling, frozenset(), thinking_done=thinking_done)
    return adapter.max_positions - rules.least


def _rules(
    adapter: Adapter,
    sampling: Sampling,
    stops: frozenset[int],
    *,
    thinking_done: bool,
) -> Rules:
    thinking = None if thinking_done else adapter.thinking
    return Rules(adapter.tokenizer, thinking, sampling, stops)


def _require_tokenizer(adapter: Adapter) -> None:
    if adapter.tokenizer is None:
        raise InputError(
            "a tokenizer to read prompts and write answers",
            f"none with {adapter.identity.model_id}",
            "Give `adapt` the tokenizer of the model.",
        )


def stop_tokens(adapter: Adapter) -> frozenset[int]:
    """Return the tokens that end an answer, as configurations and template say."""
    return find_stops(adapter.model, adapter.tokenizer, adapter.thinking).ids


def _job(
    adapter: Adapter,
    rules: Rules,
    index: int,
    prompt: str | Sequence[int],
    seed: int,
    draft: Sequence[int],
) -> Job:
    token_ids: Sequence[int]
    if isinstance(prompt, str):
        token_ids = adapter.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        token_ids = prompt
    most, room = adapter.max_positions - rules.least, adapter.max_positions
    if not 0 < len(token_ids) <= most:
        raise InputError(
            f"prompts of 1 to {most} tokens, which leaves room for an answer of "
            f"{rules.sampling.max_answer} in the model's {room}"
            if most > 0
            else f"an answer that fits in the model's {room} tokens",
            f"{len(token_ids)} tokens in prompt {index}"
            if most > 0
            else f"a limit of {rules.sampling.max_answer} tokens on it",
            "Shorten the prompt, or lower the limit on the answer.",
        )
    own = rules.within(room - len(token_ids))
    return Job(index, tuple(token_ids), seed, tuple(draft[: own.budget]), own)


DRAFTED = 8
"""How many times as many rows with drafts are taken together: most need no step."""


def _like_by_like(jobs: Sequence[Job], edit: HeadEdit | None) -> list[Job]:
    """Return jobs in an order in which neighbours share most of their first pass."""
    layers = {}
    if edit is not None and edit.by_row:
        layers = {job.place: first_layer(edit.factors[job.place]) for job in jobs}
    return sorted(
        jobs,
        key=lambda job: (layers.get(job.place, 0), -len(job.read), job.read, job.place),
    )


@torch.inference_mode()
def _decode(
    adapter: Adapter,
    rules: Rules,
    jobs: Sequence[Job],
    edit: HeadEdit | None,
    told: Callable[[Tick], None] | None,
    width: int,
) -> list[Completion]:
    """Write rows, of which at most so many are in the cache at a time."""
    finished: list[Row] = []
    told = told or (lambda _: None)
    waiting = list(jobs)
    drafted = any(job.draft for job in jobs)
    with scale_heads(adapter, edit) as live:
        decoder: Decoder | None = None
        while waiting or decoder is not None:
            while waiting and (decoder is None or len(decoder.rows) <= width // 2):
                room = width - len(decoder.rows if decoder else ())
                chunk, waiting = waiting[:room], waiting[room:]
                more = Decoder(adapter, rules, chunk, live)
                if drafted:
                    ended = more.check_drafts()
                    read = sum(len(job.read) for job in chunk)
                    told(Tick(len(ended), 0, read, is_prompt=True))
                    finished += ended
                if decoder:
                    decoder.join(more)
                elif more.rows:
                    decoder = more
            if decoder is None:
                continue
            read, first = decoder.token_ids.numel(), not decoder.step
            going = sum(decoder.advance().going)
            left = sum(row.finish is None for row in decoder.rows)
            told(Tick(going - left, going, read, is_prompt=first and read > going))
            finished += decoder.drop_finished()
            decoder = decoder if decoder.rows else None
    completions = {row.index: row.complete() for row in finished}
    return [completions[job.place] for job in jobs]


def _check_rows(
    edit: HeadEdit | None, drafts: Sequence[Sequence[int]] | None, n_prompts: int
) -> None:
    n_rows = edit.n_rows() if edit is not None else None
    if n_rows not in (None, n_prompts):
        raise SettingsError(
            f"one range of positions, or table of factors, for each of {n_prompts} "
            "prompts",
            f"{n_rows} in the edit",
            "Give each prompt its own, or edit all alike.",
        )
    if drafts is not None and len(drafts) != n_prompts:
        raise SettingsError(
            f"one draft for each of {n_prompts} prompts",
            f"{len(drafts)} drafts",
            "Give an empty one where nothing is known.",
        )
