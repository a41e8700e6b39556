"""The one vocabulary for the parts of a model, whatever its family."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from holdfast.data.chat.thinking import ThinkingFormat
from holdfast.models.batching import Batch
from holdfast.models.loading.checkpoint import Checkpoint
from holdfast.models.stops import find_stops


class Proof(NamedTuple):
    """One thing that was shown to hold on a dummy batch when a model was loaded."""

    name: str  # What was proved, as a short sentence.
    passed: bool  # Whether it held.
    value: float | None  # The deviation that was measured, if it is a number.
    limit: float | None  # The largest deviation that passes.
    detail: str  # How it was measured, and why the limit is what it is.


@dataclass(frozen=True)
class ModelIdentity:
    """What a study records about the model it measured."""

    model_id: str  # Hub id, directory, or "in-memory".
    revision: str | None  # Commit on the Hub; None for a directory.
    template_sha256: str  # Hash of the chat template; empty without a tokenizer.
    weights_sha256: str  # Fingerprint of the configuration and the weights.
    dtype: str  # Arithmetic the model runs in, such as "float32".
    model_type: str  # Family, as in `config.json`.
    tokenizer_class: str = ""  # Class that reads the vocabulary.
    # Its file in the model's directory; "in-memory" without one.
    tokenizer_source: str = "in-memory"
    tokenizer_sha256: str = ""  # Hash of that file; empty without one.
    gguf_sha256: str = ""  # Hash of the GGUF file it was expanded from; empty if none.


@dataclass(frozen=True, eq=False, kw_only=True)
class LanguageModel:
    """A model that answers: left to right, or by filling in masks."""

    model: Any  # The model of transformers, in evaluation mode.
    tokenizer: Any  # Its tokenizer, or None for a model that is only measured.
    base: Any  # The model without its head; its last state is after the final norm.
    final_norm: nn.Module  # The norm after the last block.
    embedding: nn.Embedding  # Token embedding.
    lm_head: Any  # From states after the final norm to logits.
    d_model: int  # Width of the residual stream.
    max_positions: int  # Longest sequence the model is sound for.
    identity: ModelIdentity  # What a study records about the model.
    # Format of its thinking; None if its template has none.
    thinking: ThinkingFormat | None
    proofs: tuple[Proof, ...] = field(default=())  # What was shown on loading.
    # Whether a token attends to those that come after it as well.
    two_way = False

    @property
    def device(self) -> torch.device:
        """Device of the token embedding, where inputs go."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic the model runs in."""
        return self.embedding.weight.dtype

    def states(self, batch: Batch) -> Float[Tensor, "example position d_model"]:
        """Return the states after the final norm, from one pass without a cache."""
        inputs = batch.inputs(two_way=self.two_way)
        if not self.two_way:
            inputs["use_cache"] = False
        states: Tensor = self.base(**inputs).last_hidden_state
        return states

    def encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Return the tokens of a rendered prompt."""
        return encode(self.tokenizer, prompt)


def encode(tokenizer: Any, prompt: str | Sequence[int]) -> tuple[int, ...]:
    """Return the tokens of a rendered prompt.

    Text is tokenised without special tokens, since templates write them.
    """
    if not isinstance(prompt, str):
        return tuple(prompt)
    return tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapter(LanguageModel):
    """A language model whose parts have one vocabulary and have been proved.

    Get one from `holdfast.models.loading.causal.load` or `adapt`; both run the proofs.
    """

    layers: tuple[nn.Module, ...]  # The blocks, first to last.
    attentions: tuple[nn.Module, ...]  # The attention of each block.
    # The output projection of each attention. Its input is the heads side by side, so
    # work on one head happens there.
    output_projections: tuple[nn.Linear, ...]
    mlp_norms: tuple[nn.Module, ...]  # The norm in front of each block's MLP.
    n_layers: int  # Number of blocks.
    n_heads: int  # Number of query heads in each block.
    head_width: int  # Columns of the output projection that belong to one head.
    source: Checkpoint | None = None  # Files it was read from; None in memory.

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer, as configurations and template say."""
        return find_stops(self.model, self.tokenizer, self.thinking).ids

    def attention(self, layer: int) -> nn.Module:
        """Return the attention of block `layer`, counted from 0."""
        return self.attentions[layer]

    def output_projection(self, layer: int) -> nn.Linear:
        """Return the output projection of block `layer`, counted from 0."""
        return self.output_projections[layer]


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskedModel(LanguageModel):
    """A masked-diffusion model whose parts have one vocabulary and have been proved.

    Get one from `load_masked` or `adapt_masked`; both run the proofs. A hook on its
    final norm sees every step of any loop that decodes with it.
    """

    mask_id: int  # Token that stands where nothing has been decided.
    shift: bool  # Whether the state at one position predicts the token at the next.
    stop_ids: frozenset[int]  # Tokens that end an answer.
    two_way = True
