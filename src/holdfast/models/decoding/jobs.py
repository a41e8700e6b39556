"""What is to be written: prompts with their limits and drafts, checked beforehand."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from transformers import DynamicCache

from holdfast.errors import InputError, SettingsError
from holdfast.models.decoding.edits import Edit
from holdfast.models.decoding.kv_cache import keeps_all_tokens
from holdfast.models.decoding.row_state import GenerationState, Sampling, StoppingRules
from holdfast.models.model import Adapter, LanguageModel

Prompts = Sequence[tuple[str | Sequence[int], int]]
"""Rendered prompts, as text or tokens, each with the seed of its row."""


class Job(NamedTuple):
    """A row that is to be written."""

    place: int  # Which prompt it follows.
    prompt: tuple[int, ...]  # Tokens of the prompt.
    seed: int  # Seed of the row's random numbers.
    draft: tuple[int, ...]  # What it will probably say; may be empty.
    rules: StoppingRules  # When its thinking closes and it ends.

    @property
    def read(self) -> tuple[int, ...]:
        """What the first pass reads; the last token of a draft is only compared."""
        return (*self.prompt, *self.draft[:-1])


def prepare(
    adapter: Adapter,
    prompts: Prompts,
    sampling: Sampling,
    stop_ids: Collection[int] | None,
    edit: Edit | None,
    drafts: Sequence[Sequence[int]] | None = None,
    *,
    thinking_done: bool,
) -> tuple[StoppingRules, list[Job]]:
    """Check what `generate` is given; return the rules of all rows, and their jobs."""
    stops = adapter.stop_ids if stop_ids is None else frozenset(stop_ids)
    rules = _rules(adapter, sampling, stops, thinking_done=thinking_done)
    if not stops:
        raise InputError(
            "a token that ends an answer",
            "none in the model's generation_config or tokenizer",
            "Add `eos_token_id` to the model's generation_config.json.",
        )
    _check_rows(edit, drafts, len(prompts))
    known = drafts if drafts is not None and fits_drafts(adapter, edit) else ()
    jobs = [
        _job(adapter, rules, index, prompt, seed, known[index] if known else ())
        for index, (prompt, seed) in enumerate(prompts)
    ]
    return rules, jobs


def row_states(
    adapter: Adapter, prompts: Prompts, sampling: Sampling, *, thinking_done: bool
) -> list[GenerationState]:
    """Return the rows that `generate` would begin with, in the order of the prompts.

    Arguments and errors are those of `generate`.
    """
    _, jobs = prepare(
        adapter, prompts, sampling, None, None, thinking_done=thinking_done
    )
    return [GenerationState(job.place, job.prompt, job.rules) for job in jobs]


def longest_prompt(
    adapter: LanguageModel, sampling: Sampling, *, thinking_done: bool = False
) -> int:
    """Return how many tokens a prompt may have, for an answer to fit behind it.

    Behind it there is room for the whole answer, the end of the thinking, and at
    least one token of thinking where thinking is asked for.

    Returns:
        Tokens; not above 0 where no prompt fits.

    Raises:
        InputError: If there is no tokenizer.
    """
    rules = _rules(adapter, sampling, frozenset(), thinking_done=thinking_done)
    return adapter.max_positions - rules.least


def _rules(
    adapter: LanguageModel,
    sampling: Sampling,
    stops: frozenset[int],
    *,
    thinking_done: bool,
) -> StoppingRules:
    if adapter.tokenizer is None:
        raise InputError(
            "a tokenizer to read prompts and write answers",
            f"none with {adapter.identity.model_id}",
            "Give `adapt` the tokenizer of the model.",
        )
    thinking = adapter.thinking
    ends = "" if thinking is None else thinking.answer_end
    thinking = None if thinking_done else thinking
    return StoppingRules(adapter.tokenizer, thinking, sampling, stops, ends)


def _job(
    adapter: Adapter,
    rules: StoppingRules,
    index: int,
    prompt: str | Sequence[int],
    seed: int,
    draft: Sequence[int],
) -> Job:
    token_ids = adapter.encode(prompt)
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
    return Job(index, token_ids, seed, tuple(draft[: own.budget]), own)


def fits_drafts(adapter: Adapter, edit: Edit | None) -> bool:
    """Return whether a draft leaves its row as it is.

    All layers must keep all tokens, so that those of a wrong draft can be forgotten,
    no norm may be restored over a whole pass, which would be another pass, and logits
    must be known to come from states.
    """
    whole = edit is not None and edit.renormalise == "tensor"
    kept = keeps_all_tokens(DynamicCache(config=adapter.model.config))
    return kept and not whole and adapter.lacks("states") is None


def _check_rows(
    edit: Edit | None, drafts: Sequence[Sequence[int]] | None, n_prompts: int
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
