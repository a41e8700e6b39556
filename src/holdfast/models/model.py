"""The one vocabulary for the parts of a model, whatever its family."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from holdfast.data.chat.thinking import ThinkingFormat
from holdfast.errors import AdapterError, SettingsError
from holdfast.models.batching import Batch
from holdfast.models.loading.checkpoint import Checkpoint
from holdfast.models.stops import find_stops

Tier = Literal["text", "states", "heads"]
USES: Mapping[Tier, str] = {
    "text": "rollout, evaluate, judge, compare, finetune, select --by judge, length "
    "or random",
    "states": "probe, trace, select --by cliff, signal, guard, probe-transfer, and the "
    "verdict of audit",
    "heads": "heads, ablate, bake, sinks, and the line `sparse` of audit",
}
"""What each tier is for. A model that has heads has states, and one that has states has
text, but for its chat template."""


class Proof(NamedTuple):
    """One thing that was shown to hold on a dummy batch when a model was loaded."""

    name: str  # What was proved, as a short sentence.
    passed: bool  # Whether it held.
    value: float | None  # The deviation that was measured, if it is a number.
    limit: float | None  # The largest deviation that passes.
    detail: str  # How it was measured, and why the limit is what it is.
    tier: Tier = "text"  # What the model is good for where it holds.

    def failure(self) -> str:
        """Return a proof that did not hold, in a few words."""
        if self.value is None or self.limit is None:
            return f"“{self.name}” does not hold: {self.detail}"
        measured = f"measured {self.value:.3g}, limit {self.limit:.3g}"
        return f"“{self.name}” does not hold ({measured})"


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
    final_norm: nn.Module  # The norm after the last layer.
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

    def lacks(self, tier: Tier) -> str | None:
        """Return why the model is not good for a tier; None if it is."""
        # What text rests on is proved on load; a missing template takes no states away.
        tiers = (tier,) if tier == "text" else ("states", tier)
        failed = [p for p in self.proofs if not p.passed and p.tier in tiers]
        return "; ".join(proof.failure() for proof in failed) or None

    def require(self, tier: Tier) -> None:
        """Refuse what the model is not good for.

        Raises:
            AdapterError: Says which proof did not hold, and what can be done still.
        """
        found = self.lacks(tier)
        if found is None:
            return
        left = [uses for name, uses in USES.items() if self.lacks(name) is None]
        raise AdapterError(
            f"a model whose {tier} can be read rightly ({self.identity.model_id})",
            found,
            f"What it is good for still: {'; '.join(left) or 'nothing'}. If it was "
            "edited, or runs in 16 bits, load it as published, in float32.",
            self.proofs,
        )

    def states(self, batch: Batch) -> Float[Tensor, "example position d_model"]:
        """Return the states after the final norm, from one pass without a cache."""
        inputs = batch.inputs(two_way=self.two_way)
        if not self.two_way:
            inputs["use_cache"] = False
        states: Tensor = self.base(**inputs).last_hidden_state
        # The last layer of a model over several devices is elsewhere.
        return states.to(self.device)

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


@dataclass(frozen=True, eq=False)
class Block:
    """A layer of a model, and how what its heads write gets into the residual stream.

    With `x` the stream before the layer, `a` the output of its attention and `N` the
    norm after that (nothing where it has none), the stream after the attention is
    `z = x + attention_scale * N(a)` (and what a mixer beside it adds), and the stream
    after the layer is `stream_scale * (z + what the MLP adds)`.
    """

    module: nn.Module  # The layer.
    # Its softmax attention, and the output projection of that, whose input is the heads
    # side by side; None in a layer without.
    attention: nn.Module | None = None
    projection: Any = None
    head_width: int = 0  # Columns of the projection that belong to one head.
    norm_after: nn.Module | None = None  # Norm between attention and residual stream.
    # Part of the layer whose input is the stream after the attention; None where that
    # is the layer's output.
    joint: nn.Module | None = None
    attention_scale: float = 1.0
    stream_scale: float = 1.0
    # Whether something beside heads is added in front of the joint: linear attention, a
    # convolution, a state-space model.
    has_mixer: bool = False
    # Whether the MLP is added to the stream beside the attention, and not behind it.
    parallel: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapter(LanguageModel):
    """A causal language model whose parts have one vocabulary, as far as is proved.

    Get one from `holdfast.models.loading.causal.load` or `adapt`; both run the proofs.
    What those did not show is refused by `require`, tier by tier.
    """

    blocks: tuple[Block, ...]  # The layers, first to last.
    n_heads: int  # Number of query heads in each layer with attention.
    source: Checkpoint | None = None  # Files it was read from; None in memory.

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The modules of the layers."""
        return tuple(block.module for block in self.blocks)

    @property
    def n_layers(self) -> int:
        """Number of layers, with and without attention."""
        return len(self.blocks)

    @property
    def layers_with_heads(self) -> tuple[int, ...]:
        """Layers that have softmax attention, counted from 0."""
        return tuple(
            layer
            for layer, block in enumerate(self.blocks)
            if block.projection is not None
        )

    @property
    def head_widths(self) -> tuple[int, ...]:
        """Columns of one head in each layer; 0 in a layer without heads."""
        return tuple(block.head_width for block in self.blocks)

    @property
    def total_heads(self) -> int:
        """Number of heads in all layers."""
        return self.n_heads * len(self.layers_with_heads)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer, as configurations and template say."""
        return find_stops(self.model, self.tokenizer, self.thinking).ids

    def output_projection(self, layer: int) -> Any:
        """Return the output projection of a layer, counted from 0.

        Raises:
            SettingsError: If the layer has no attention.
        """
        projection = self.blocks[layer].projection
        if projection is None:
            raise SettingsError(
                "a layer with attention, of "
                f"{', '.join(map(str, self.layers_with_heads)) or 'none'}",
                f"layer {layer} of {self.identity.model_id}, which has none",
                "Name heads of another layer; layers count from 0.",
            )
        return projection


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
