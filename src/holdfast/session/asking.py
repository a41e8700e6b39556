"""From prompts to questions: rendered, seeded, within the model's context."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from holdfast.data.control_tokens import control_literals, prompt_token_ids
from holdfast.data.prompts import Prompt
from holdfast.errors import InputError, ThinkingFormatError
from holdfast.models.parts import Adapter
from holdfast.models.rows import Sampling
from holdfast.models.speaking import Speaker
from holdfast.session.prompts import Asked, row_seed
from holdfast.session.settings import ROLES, RolloutSettings

ROOM_FOR_TEMPLATE = 16


class Question(NamedTuple):
    """One answer to draw.

    Attributes:
        role: The role of the prompt.
        prompt: The prompt.
        sample: Which answer to this prompt, counted from 0.
        seed: Seed of the row.
        token_ids: The prompt under the chat template.
    """

    role: str
    prompt: Prompt
    sample: int
    seed: int
    token_ids: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.token_ids)

    @property
    def row_id(self) -> str:
        """Name of the row."""
        return f"{self.role}/{self.prompt.prompt_id}/{self.sample}"


def require_thinking(adapter: Speaker, settings: RolloutSettings) -> None:
    """Refuse a model without thinking where thinking is required.

    Raises:
        ThinkingFormatError: If it is required and there is none.
    """
    if settings.thinking == "required" and adapter.thinking is None:
        raise ThinkingFormatError(
            "a chat template with a thinking format",
            f"none in the template of {adapter.identity.model_id}",
            "Use a reasoning model, or --thinking auto for its outcomes alone.",
        )


def resolve_sampling(adapter: Adapter, settings: RolloutSettings) -> Sampling:
    """Return the sampling: what is asked for, else the model's own, else greedy.

    Args:
        adapter: The model; its `generation_config` says whether it samples.
        settings: What is asked for.

    Returns:
        Temperature (0 for greedy), nucleus and budgets.
    """
    own = adapter.model.generation_config
    temperature, top_p = settings.temperature, settings.top_p
    if temperature is None:
        temperature = float(own.temperature or 1.0) if own.do_sample else 0.0
    if top_p is None:
        top_p = float(own.top_p or 1.0) if own.do_sample else 1.0
    return Sampling(
        temperature=temperature,
        top_p=top_p,
        max_thinking=settings.max_thinking if adapter.thinking else 0,
        max_answer=settings.max_answer,
    )


def questions(
    adapter: Speaker, asked: Asked, settings: RolloutSettings
) -> list[Question]:
    """Render and tokenise every prompt, once for each sample.

    Args:
        adapter: The model.
        asked: Prompts of every role.
        settings: Samples, seed and system prompt.

    Returns:
        Questions, role by role.
    """
    made = []
    for role in ROLES:
        for prompt in asked.prompts[role]:
            ids = prompt_token_ids(
                adapter.tokenizer,
                prompt.text,
                system_prompt=settings.system_prompt,
                thinking=adapter.thinking,
            )
            for sample in range(settings.samples):
                seed = row_seed(settings.seed, prompt.prompt_id, sample)
                made.append(Question(role, prompt, sample, seed, ids))
    return made


def prompt_notes(adapter: Speaker, asked: Asked) -> list[str]:
    """Return what the user has to know of how the prompts were tokenised.

    Args:
        adapter: The model.
        asked: Prompts of every role.
    """
    texts = [prompt.text for role in ROLES for prompt in asked.prompts[role]]
    count, found = control_literals(adapter.tokenizer, texts)
    if not count:
        return []
    listed = ", ".join(f"`{name}`" for name in found)
    return [
        f"{count} of {len(texts)} prompts spell control tokens of the model "
        f"({listed}). These were given to the model as plain text, not as such tokens."
    ]


def fit_context(
    adapter: Adapter, asked: Sequence[Question], sampling: Sampling
) -> Sampling:
    """Cut the thinking budget to what the model's context leaves.

    Args:
        adapter: The model.
        asked: What it is asked.
        sampling: Budgets as they were asked for.

    Returns:
        Sampling that fits the longest prompt.

    Raises:
        InputError: If the longest prompt leaves no room for thinking and answer.
    """
    longest = max(question.n_tokens for question in asked)
    taken = longest + sampling.max_answer + ROOM_FOR_TEMPLATE
    left = adapter.max_positions - taken
    if left < 1:
        raise InputError(
            f"prompts that leave room for an answer in {adapter.max_positions} tokens",
            f"one of {longest} tokens, and --max-answer {sampling.max_answer}",
            "Leave the long prompts out, or lower --max-answer.",
        )
    return replace(sampling, max_thinking=min(sampling.max_thinking, left))
