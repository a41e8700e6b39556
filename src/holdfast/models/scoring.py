"""Models that judge: short greedy replies, and how likely other words were.

A judge is only read, never measured head by head, so any causal language model that
transformers knows will do, with or without a chat template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from holdfast.models.batching import (
    batched,
    pad,
    require_room,
)
from holdfast.models.finite import check_finite, check_numbers
from holdfast.models.loading.checkpoint import Checkpoint, find_checkpoint
from holdfast.models.loading.families import Family, generating_class
from holdfast.models.loading.parts import DtypeName, choose_device, open_model
from holdfast.models.loading.weights import read_tokenizer
from holdfast.models.model import ModelIdentity


@dataclass(frozen=True, eq=False)
class Scorer:
    """A causal language model that is asked for short replies."""

    model: Any  # The language model, in evaluation mode.
    tokenizer: Any  # Its tokenizer; a chat template is not needed.
    identity: ModelIdentity  # What a record says about it.
    max_positions: int  # Longest sequence it was made for.

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        weight: Tensor = next(self.model.parameters())
        return weight.device


@dataclass(frozen=True, eq=False)
class Reply:
    """What a model wrote after a prompt, greedily."""

    # Generated tokens, without the one that ended the reply.
    token_ids: tuple[int, ...]
    starts: tuple[int, ...]  # Where each token begins in `text`.
    text: str  # The tokens as text.
    # Log-probability of each watched token, at each step.
    watched: Float[Tensor, "step label"]

    def step_at(self, character: int) -> int:
        """Return the step whose token holds a character of `text`."""
        return max(step for step, at in enumerate(self.starts) if at <= character)


def check_scorer(id_or_path: str | Path, *, revision: str | None = None) -> None:
    """Find the files of a model and read its tokenizer, but load no weights.

    Raises:
        HoldfastError: As `load_scorer` does, before any weights are read.
    """
    read_tokenizer(_find(str(id_or_path), revision))


def load_scorer(
    id_or_path: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: DtypeName = "auto",
) -> Scorer:
    """Load a causal language model to ask it questions.

    Raises:
        InputError: If it names no whole model, or the model has no tokenizer.
        SettingsError: If the device or the dtype is not to be had.
        UnsupportedFamilyError: If transformers has no such causal language model.
        ModelError: If weights are missing, damaged or do not fit the configuration.
    """
    target = choose_device(device)
    checkpoint = _find(str(id_or_path), revision)
    model, tokenizer, identity = open_model(checkpoint, target, dtype, read_tokenizer)
    check_numbers(model, checkpoint.model_id)
    config = model.config.get_text_config()
    return Scorer(model, tokenizer, identity, int(config.max_position_embeddings))


def replies(
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    watch: Sequence[int],
    *,
    max_tokens: int,
    batch_size: int = 8,
) -> list[Reply]:
    """Let a model write short greedy replies, and watch some tokens on the way.

    `watch`: Tokens whose log-probability is kept at every step.

    Raises:
        InputError: If a prompt is empty or too long for the model.
        ModelError: If a logit is not finite.
    """
    for index, prompt in enumerate(prompts):
        require_room(len(prompt), index, scorer.max_positions, max_tokens)

    def run(rows: Sequence[int]) -> list[Reply]:
        return _decode(scorer, [prompts[row] for row in rows], watch, max_tokens)

    return batched(run, prompts, batch_size)


def _find(name: str, revision: str | None) -> Checkpoint:
    return find_checkpoint(name, revision, _family, whole=True)


def _family(config: Mapping[str, Any], source: str) -> Family:
    return Family(generating_class(config, str(config.get("model_type")), source))


@torch.inference_mode()
def _decode(
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    watch: Sequence[int],
    max_tokens: int,
) -> list[Reply]:
    batch = pad(prompts, "left", scorer.device)
    token_ids, positions = batch.token_ids, batch.positions()
    mask = batch.mask.long()
    stops = _stops(scorer)
    cache = DynamicCache(config=scorer.model.config)
    taken: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    kept = []
    for _ in range(max_tokens):
        logits = scorer.model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        check_finite(logits.float().sum(), "the logits of a judge")
        shares = logits.float().log_softmax(-1)
        kept.append(shares[:, list(watch)].to("cpu"))
        best = shares.argmax(-1)
        for row, token in enumerate(best.tolist()):
            going[row] = going[row] and token not in stops
            if going[row]:
                taken[row].append(token)
        if not any(going):
            break
        token_ids, positions = best[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
    watched = torch.stack(kept, 1).clone()
    return [
        _reply(scorer.tokenizer, tokens, watched[row])
        for row, tokens in enumerate(taken)
    ]


def _reply(tokenizer: Any, tokens: list[int], watched: Tensor) -> Reply:
    texts = [tokenizer.decode(tokens[:end]) for end in range(len(tokens) + 1)]
    starts = tuple(len(text) for text in texts[:-1])
    return Reply(tuple(tokens), starts, texts[-1], watched)


def _stops(scorer: Scorer) -> frozenset[int]:
    configured = scorer.model.generation_config.eos_token_id
    found = configured if isinstance(configured, list) else [configured]
    own = scorer.tokenizer.eos_token_id
    return frozenset(int(token) for token in [*found, own] if token is not None)
