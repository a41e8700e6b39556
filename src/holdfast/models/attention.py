"""Attention that also sums how much each head attends to the first token.

Heads are widened by a few channels: queries and keys by zeros, which change no score,
and values by the indicator of the sink. One call of scaled dot-product attention then
returns beside the output the attention weight of the sink at every query, exactly and
with ordinary gradients. No matrix of positions by positions is kept.

It is registered with transformers under a name of its own, and is plain attention for
a forward pass that hands it no probe:

    with tapped(model):
        probe = SinkProbe(mask)
        model(input_ids=token_ids, attention_mask=mask, sink_probe=probe)
        probe.mass()

The context has to last through the backward pass where activations are checkpointed.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from holdfast.errors import InputError, ModelError, UnsupportedFamilyError

ARGUMENT: Final = "sink_probe"
"""Argument of a forward pass that takes the probe."""


class SinkProbe:
    """Takes the sink mass of one forward pass (see `holdfast.models.attention`).

    The sink is the first real token of each row. A query that cannot see it (padding,
    and late queries of a sliding window) has no part in a mean. Means are taken in
    float32, whatever the model runs in.

    Attributes:
        sink: Place of the sink in each row, `[example]`.
        counted: Queries that are averaged where they see the sink,
            `[example, position]`.
    """

    def __init__(
        self,
        mask: Bool[Tensor, "example position"],
        *,
        counted: Bool[Tensor, "example position"] | None = None,
        layers: Collection[int] | None = None,
        by_position: bool = False,
    ) -> None:
        """Find the sinks.

        `mask`: True at real tokens; padding may be on either side.
        `counted`: Queries to average. Default: all real ones. The sink, which can look
        at nothing but itself, is never counted.
        `layers`: Blocks to look at, from 0; the others run plain attention. Default:
        all.
        `by_position`: Keep the mass of every query as well, for `positions`.

        Raises:
            InputError: If a row has no real token.
        """
        if not bool(mask.any(-1).all()):
            raise InputError(
                "a real token in every row", "a row of padding", "Leave that row out."
            )
        self.sink = mask.long().argmax(-1)
        place = torch.arange(mask.shape[1], device=mask.device)
        chosen = mask if counted is None else mask & counted
        self.counted = chosen & (place != self.sink[:, None])
        self._mask, self._by_position = mask, by_position
        self._layers = None if layers is None else frozenset(layers)
        self._with_gradient = torch.is_grad_enabled()
        self._means: dict[int, Tensor] = {}
        self._seen: dict[int, Tensor] = {}
        self._positions: dict[int, Tensor] = {}
        self._markers: dict[tuple[Any, ...], Tensor] = {}

    def mass(self) -> Float[Tensor, "example layer head"]:
        """Return the mean sink mass of every head, with its gradient.

        A row none of whose counted queries sees the sink of a layer has mass 0 there;
        `seen` tells it from a head that looks elsewhere.

        Raises:
            ModelError: If a layer has not handed in its mass.
        """
        return self._stacked(self._means)

    def seen(self) -> Int[Tensor, "example layer"]:
        """Return how many queries the mean of each row and layer is over.

        Raises:
            ModelError: As `mass`.
        """
        return self._stacked(self._seen)

    def positions(self) -> Float[Tensor, "example layer head position"]:
        """Return the sink mass of every query; 0 where it does not see the sink.

        What stands at padding means nothing.

        Raises:
            InputError: If the probe was made without `by_position`.
            ModelError: As `mass`.
        """
        if not self._by_position:
            raise InputError(
                "a probe that keeps positions",
                "one that keeps means alone",
                "Make it with by_position=True.",
            )
        return self._stacked(self._positions)

    def wants(self, layer: int) -> bool:
        """Return whether a block, counted from 0, is looked at."""
        return self._layers is None or layer in self._layers

    def check(
        self, query: Tensor, key: Tensor, layer: int, places: Tensor | None
    ) -> None:
        """Refuse a pass that is not one whole pass over the rows of the mask.

        `places`: Positions of the tokens, where the model hands them on.

        Raises:
            InputError: If shapes differ, rows hold several sequences, or the probe
                has been through a pass.
            ModelError: If no gradient will reach the mass, though it was asked for.
        """
        rows, length = self._mask.shape
        if (query.shape[0], query.shape[2], key.shape[2]) != (rows, length, length):
            raise InputError(
                f"one pass over all {length} positions of {rows} rows",
                f"{query.shape[2]} queries and {key.shape[2]} keys in "
                f"{query.shape[0]} rows",
                "Run the rows of the mask whole, with use_cache=False.",
            )
        if layer in self._means and not _in_backward():
            raise InputError(
                "a probe for each forward pass",
                "one that has taken a pass already",
                "Make another SinkProbe.",
            )
        if self._with_gradient and not torch.is_grad_enabled():
            raise ModelError(
                "a forward pass that records gradients, as where the probe was made",
                "one that does not",
                "Checkpoint activations with use_reentrant=False; or make the probe "
                "under no_grad as well.",
            )
        if not self._means and places is not None and self._are_packed(places):
            raise InputError(
                "one sequence a row, with positions that count its tokens",
                "rows in which positions start anew",
                "Give each sequence a row of its own, padded.",
            )

    def marker(self, value: Tensor, width: int) -> Tensor:
        """Return channels to put beside the values, the first marking the sink.

        `value`: Values of a layer, `[example, head, position, d_head]`.
        """
        key = (value.device, value.dtype, width)
        if key not in self._markers:
            rows, _, length, _ = value.shape
            made = value.new_zeros((rows, 1, length, width))
            at = torch.arange(rows, device=value.device)
            made[at, 0, self.sink.to(value.device), 0] = 1
            self._markers[key] = made
        return self._markers[key].expand(-1, value.shape[1], -1, -1)

    def take(self, layer: int, mass: Tensor, visible: Tensor | None) -> None:
        """Take the attention weight of the sink in one layer.

        `mass`: The weight at every query, `[example, position, head]`.
        `visible`: Queries that see the sink, `[example, position]`; None if all real
        ones do.
        """
        counted = self.counted.to(mass.device)
        if visible is not None:
            counted = counted & visible
        seen = counted.sum(-1)
        exact = mass.float()
        mean = (exact * (counted / seen.clamp(min=1)[:, None])[:, :, None]).sum(1)
        # Gradient checkpointing runs a layer again, and what comes then is no news.
        if layer in self._means:
            return
        self._means[layer], self._seen[layer] = mean, seen
        if self._by_position:
            self._positions[layer] = exact.transpose(1, 2)

    def _are_packed(self, places: Tensor) -> bool:
        both = self._mask[:, 1:] & self._mask[:, :-1]
        return bool(((places.diff(dim=-1) != 1) & both.to(places.device)).any())

    def _stacked(self, found: Mapping[int, Tensor]) -> Tensor:
        expected = self._layers
        if expected is None:
            expected = frozenset(range(max(found, default=0) + 1))
        missing = sorted(expected - set(found))
        if missing:
            raise ModelError(
                f"the sink mass of layer {', '.join(map(str, missing))}",
                "none: its attention was not handed the probe",
                f"Run the model inside `tapped`, with {ARGUMENT}=probe. A model that "
                "keeps such arguments from its attention, or has layers without "
                "attention, cannot be tapped.",
            )
        place = self.sink.device
        return torch.stack([found[layer].to(place) for layer in sorted(found)], 1)


def _in_backward() -> bool:
    """Return whether a backward pass is running, which may compute layers again."""
    return int(torch._C._current_graph_task_id()) >= 0


ATTENTION: Final = "holdfast_sinks"
"""Name under which transformers finds the attention, and what makes its masks."""
STEP: Final = 8
"""Kernels of accelerators want head widths that are multiples of this."""
FITTING: Final = frozenset(
    {
        *("full_attention", "sliding_attention", "chunked_attention", "hybrid"),
        *("linear_attention", "conv", "mlp", "moe"),
    }
)
"""Kinds of layers whose masks say which queries see the sink, or that have none."""
_REASONS: Final = {
    "softcap": "its attention caps the scores, which no fused attention does",
    "s_aux": "a learned sink takes part of every attention row, so that the first "
    "token is not the sink",
    "position_bias": "its attention adds a bias to the scores, which was not proved",
}


@contextmanager
def tapped(model: Any) -> Iterator[None]:
    """Let a model answer to probes, for as long as the context lasts.

    Nothing of the model's arithmetic changes, but that a model that ran another
    attention runs scaled dot-product attention meanwhile.

    Raises:
        UnsupportedFamilyError: If its attention cannot be tapped; says why.
    """
    own = _unwrapped(model)
    require_tappable(own)
    before = own.config._attn_implementation
    own.set_attn_implementation(ATTENTION)
    try:
        if own.config._attn_implementation != ATTENTION:
            raise _refusal(own, "it does not take its attention from transformers")
        yield
    finally:
        own.set_attn_implementation(before)


def require_tappable(model: Any) -> None:
    """Refuse a model whose attention cannot be tapped, by name and with the reason.

    What shows only in a forward pass is refused there.

    Raises:
        UnsupportedFamilyError: Names the architecture and the reason.
    """
    own = _unwrapped(model)
    if not hasattr(own, "set_attn_implementation"):
        raise _refusal(own, "it is no model of transformers")
    config = own.config.get_text_config()
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - FITTING)
    if odd:
        raise _refusal(own, f"it has layers of type {', '.join(odd)}")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise _refusal(own, _REASONS["softcap"])
    if any(name.endswith(".sinks") for name, _ in own.named_parameters()):
        raise _refusal(own, _REASONS["s_aux"])
    if not getattr(own, "_supports_sdpa", False):
        raise _refusal(own, "it has no scaled dot-product attention in transformers")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sink_probe: SinkProbe | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run the attention of one layer, as transformers' attention interface asks.

    `attention_mask`: True where a query sees a key; None for causal attention over rows
    without padding on the left.
    `scaling`: Factor of the scores; by default 1 / √d_head.

    Returns:
        The output, `[example, position, head, d_head]`, and None.

    Raises:
        UnsupportedFamilyError: If the layer's attention is of a kind that has no sink
            mass here.
        InputError: If the pass is not one over whole rows (see `SinkProbe.check`).
        ModelError: If no gradient will reach the mass, though it was asked for.
    """
    layer = _layer(module)
    if sink_probe is None or (layer is not None and not sink_probe.wants(layer)):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **others,
        )
    if layer is None:
        raise _refusal(module, "its attention does not know its layer")
    _check_kind(module, attention_mask, dropout, others)
    sink_probe.check(query, key, layer, others.get("position_ids"))
    others.pop("output_attentions", None)
    width = value.shape[-1]
    # Values narrower than the keys have room for the mark already.
    wide = max(query.shape[-1], -(-(width + 1) // STEP) * STEP)
    marked = torch.cat([value, sink_probe.marker(value, wide - width)], -1)
    found, _ = sdpa_attention_forward(
        module,
        pad(query, (0, wide - query.shape[-1])),
        pad(key, (0, wide - key.shape[-1])),
        marked,
        attention_mask,
        dropout=dropout,
        # By default it would come from the width, which is not the head's own now.
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        **others,
    )
    sink_probe.take(layer, found[..., width], _visible(attention_mask, sink_probe))
    return found[..., :width], None


def _layer(module: nn.Module) -> int | None:
    found: Any = getattr(module, "layer_idx", None)
    return None if found is None else int(found)


def _visible(mask: Tensor | None, probe: SinkProbe) -> Tensor | None:
    """Return which queries see the sink, by the mask that the model itself made."""
    if mask is None:
        return None
    rows, _, length, _ = mask.shape
    column = probe.sink.to(mask.device)[:, None, None].expand(rows, length, 1)
    return mask[:, 0].gather(-1, column)[..., 0]


def _check_kind(
    module: nn.Module,
    mask: Tensor | None,
    dropout: float,
    others: dict[str, Any],
) -> None:
    for name, reason in _REASONS.items():
        if others.get(name) is not None:
            raise _refusal(module, reason)
    if mask is not None and mask.dtype is not torch.bool:
        raise _refusal(module, "its mask does not say which queries see which keys")
    if dropout:
        raise InputError(
            "attention without dropout, which would fall on the sink mass as well",
            f"dropout of {dropout}",
            "Set attention_dropout to 0 in the model's configuration.",
        )


def _refusal(model: Any, reason: str) -> UnsupportedFamilyError:
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None) or type(model).__name__
    return UnsupportedFamilyError(
        "a model whose attention can be tapped for its sink mass",
        f"`{kind}`, which cannot be because {reason}",
        "Use a model with plain softmax attention, such as Llama, Mistral or Qwen3.",
    )


def _unwrapped(model: Any) -> Any:
    """Return the model of transformers inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


AttentionInterface.register(ATTENTION, attend)
# Without it no mask is made for this name, and padding is silently attended to.
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
