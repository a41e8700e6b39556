"""The one vocabulary for the parts of a model, whatever its family."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from holdfast.data.chat.thinking import ThinkingFormat
from holdfast.models.loading.checkpoint import (
    Checkpoint,
)


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


@dataclass(frozen=True, eq=False)
class Adapter:
    """A language model whose parts have one vocabulary and have been proved.

    Get one from `holdfast.models.loading.causal.load` or `adapt`; both run the proofs.

    Attributes:
        model: The language model, in evaluation mode.
        tokenizer: Its tokenizer, or None for a model that is only measured.
        base: The model without its head; its last state is after the final norm.
        layers: The blocks, first to last.
        attentions: The attention of each block.
        output_projections: The output projection of each attention. Its input is
            the heads side by side, so work on one head happens there.
        mlp_norms: The norm in front of each block's MLP.
        final_norm: The norm after the last block.
        embedding: Token embedding.
        lm_head: Projection from states to logits.
        n_layers: Number of blocks.
        n_heads: Number of query heads in each block.
        head_width: Columns of the output projection that belong to one head.
        d_model: Width of the residual stream.
        max_positions: Longest sequence the model is sound for.
        identity: What a study records about the model.
        thinking: Format of its thinking; None if its template has none.
        proofs: What was shown on loading.
        source: Files it was read from; None for a model in memory.
    """

    model: Any
    tokenizer: Any
    base: Any
    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    output_projections: tuple[nn.Linear, ...]
    mlp_norms: tuple[nn.Module, ...]
    final_norm: nn.Module
    embedding: nn.Embedding
    lm_head: nn.Module
    n_layers: int
    n_heads: int
    head_width: int
    d_model: int
    max_positions: int
    identity: ModelIdentity
    thinking: ThinkingFormat | None
    proofs: tuple[Proof, ...] = field(default=())
    source: Checkpoint | None = None

    @property
    def device(self) -> torch.device:
        """Device of the token embedding, where inputs go."""
        weight: Tensor = self.embedding.weight
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic the model runs in."""
        weight: Tensor = self.embedding.weight
        return weight.dtype

    def attention(self, layer: int) -> nn.Module:
        """Return the attention of block `layer`, counted from 0."""
        return self.attentions[layer]

    def output_projection(self, layer: int) -> nn.Linear:
        """Return the output projection of block `layer`, counted from 0."""
        return self.output_projections[layer]


@dataclass(frozen=True, eq=False)
class MaskedModel:
    """A masked-diffusion model whose parts have one vocabulary and have been proved.

    Get one from `load_masked` or `adapt_masked`; both run the proofs.
    """

    model: Any  # The model of transformers, in evaluation mode.
    tokenizer: Any  # Its tokenizer.
    base: Any  # The model without its head; its last state is after the final norm.
    # The norm after the last block; a hook on it sees every step of any loop that
    # decodes with this model.
    final_norm: nn.Module
    embedding: nn.Embedding  # Token embedding.
    head: Callable[[Tensor], Tensor]  # From states after the final norm to logits.
    mask_id: int  # Token that stands where nothing has been decided.
    shift: bool  # Whether the state at one position predicts the token at the next.
    stop_ids: frozenset[int]  # Tokens that end an answer.
    d_model: int  # Width of the residual stream.
    max_positions: int  # Longest sequence the model is sound for.
    identity: ModelIdentity  # What a study records about the model.
    # Format of its thinking; None if its template has none.
    thinking: ThinkingFormat | None
    proofs: tuple[Proof, ...] = field(default=())  # What was shown on loading.

    @property
    def device(self) -> torch.device:
        """Device of the token embedding, where inputs go."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic the model runs in."""
        return self.embedding.weight.dtype
