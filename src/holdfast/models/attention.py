"""Attention that also says how much each head looks at the first token, its sink.

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

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from holdfast.errors import InputError, UnsupportedFamilyError
from holdfast.models.sink_probe import ARGUMENT, SinkProbe

__all__ = ["ARGUMENT", "ATTENTION", "SinkProbe", "attend", "require_tappable", "tapped"]

ATTENTION: Final = "holdfast_sinks"
"""Name under which transformers finds the attention, and what makes its masks."""

STEP: Final = 8
"""Kernels of accelerators want head widths that are multiples of this."""

FITTING: Final = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers whose masks say which queries see the sink."""

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

    Args:
        model: A language model of transformers, or a PEFT model around one.

    Yields:
        Nothing; the attention the model had is set again at the end.

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

    Args:
        model: A language model of transformers, or a PEFT model around one.

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

    Args:
        module: The attention of a layer.
        query: `[example, head, position, d_head]`.
        key: The same with as many heads as there are keys and values.
        value: As the keys.
        attention_mask: True where a query sees a key; None for causal attention over
            rows without padding on the left.
        scaling: Factor of the scores; by default 1 / √d_head.
        dropout: Share of attention weights that are dropped.
        sink_probe: What takes the sink mass; None for plain attention.
        **others: What else the interface hands on.

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
