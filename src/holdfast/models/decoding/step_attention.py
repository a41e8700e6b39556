"""Attention of one decoding step: two matrix products over the room of the cache.

On a CPU the fused kernel takes one head after the other, and what it reads of a cache
with room for tokens to come lies in pieces. Here the whole room is read, in one batched
product for the scores and one for the values, and a mask hides what is empty or
padding. Query heads that share keys are rows of one product. The numbers are those of
the fused kernel but for rounding, which in bfloat16 falls on the scores as well, as it
does in the plain attention of transformers.

It is registered with transformers, whose layers stay as they are; it is used where a
trial on the model agrees with the model's own attention (`agrees`), and only for steps
whose mask was made here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from holdfast.models.batching import pad
from holdfast.models.decoding.kv_cache import (
    PreallocatedLayer,
    Room,
    keeps_all_tokens,
    preallocated_cache,
)
from holdfast.models.model import Adapter

ATTENTION: Final = "holdfast_steps"
"""Name under which transformers finds the attention, and what makes its masks."""
TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest deviation of a state in the trial, as a share of the largest state."""

_rooms: list[Room] = []
"""The room of the step that is being run; empty between steps."""
_agreed: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def stepping(cache: Any) -> Iterator[None]:
    """Let a pass over one token per row read the whole room of a cache."""
    layers: Sequence[PreallocatedLayer] = cache.layers
    room = Room(layers[0].make_room(1), layers[0].keys.shape[-2] + 1)
    for layer in layers:
        layer.make_room(1)
        layer.room = room
    _rooms.append(room)
    try:
        yield
    finally:
        _rooms.clear()
        for layer in layers:
            layer.room = None


@contextmanager
def attending(adapter: Adapter) -> Iterator[bool]:
    """Let steps of a model attend as is told above, if its own attention agrees.

    Yields: Whether they do; then each step has to be run inside `stepping`.
    """
    model, ours = adapter.model, agrees(adapter)
    if ours:
        model.set_attn_implementation(ATTENTION)
    try:
        yield ours
    finally:
        if ours:
            model.set_attn_implementation("sdpa")


def agrees(adapter: Adapter) -> bool:
    """Return whether steps of a model can attend so, and come to the same states."""
    if adapter.model not in _agreed:
        _agreed[adapter.model] = _fits(adapter) and _trial(adapter)
    return _agreed[adapter.model]


def _fits(adapter: Adapter) -> bool:
    """Return whether the model takes its attention from where this one is found."""
    config = adapter.model.config
    return (
        adapter.device.type == "cpu"
        and adapter.dtype in TOLERANCE
        and getattr(config, "_attn_implementation", None) == "sdpa"
        and keeps_all_tokens(preallocated_cache(config))
        and adapter.lacks("states") is None
        and bool(adapter.model._can_set_attn_implementation())
    )


def _trial(adapter: Adapter) -> bool:
    """Run a step of two rows, one of them padded, both ways."""
    vocab = adapter.embedding.num_embeddings
    rows = [[1 % vocab, 2 % vocab, 3 % vocab, 5 % vocab], [7 % vocab, 4 % vocab]]
    batch = pad(rows, "left", adapter.device)
    found = []
    with torch.inference_mode():
        for ours in (False, True):
            cache: Any = preallocated_cache(adapter.model.config)
            adapter.base(
                input_ids=batch.token_ids,
                attention_mask=batch.mask.long(),
                position_ids=batch.positions(),
                past_key_values=cache,
                use_cache=True,
            )
            mask = torch.cat([batch.mask, torch.ones_like(batch.mask[:, :1])], -1)
            inputs = {
                "input_ids": batch.token_ids[:, -1:],
                "attention_mask": mask.long(),
                "position_ids": batch.positions()[:, -1:] + 1,
                "past_key_values": cache,
                "use_cache": True,
            }
            if not ours:
                found.append(adapter.base(**inputs).last_hidden_state)
                continue
            adapter.model.set_attn_implementation(ATTENTION)
            try:
                with stepping(cache):
                    found.append(adapter.base(**inputs).last_hidden_state)
            finally:
                adapter.model.set_attn_implementation("sdpa")
    one, other = (each.float() for each in found)
    limit = TOLERANCE[adapter.dtype] * one.abs().max()
    return bool((one - other).abs().max() <= limit)


def step_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **named: Any,
) -> Tensor | None:
    """Return the mask of a pass: of a step, what is added to scores over its room."""
    room = _rooms[-1] if _rooms else None
    plain = mask_function is causal_mask_function and not named.get("use_vmap")
    step = room is not None and plain and (q_length, kv_offset) == (1, 0)
    if room is None or not step or attention_mask is None or kv_length != room.used:
        return sdpa_mask(  # type: ignore[no-any-return]
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            **named,
        )
    if room.mask is None:
        shape = (batch_size, 1, 1, room.columns)
        hidden = torch.full(shape, -torch.inf, dtype=named["dtype"])
        hidden[:, 0, 0, : room.used].masked_fill_(attention_mask.bool(), 0.0)
        room.mask = hidden
    return room.mask


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run the attention of one layer, as transformers' attention interface asks."""
    room = _rooms[-1] if _rooms else None
    odd = dropout or any(others.get(n) is not None for n in ("position_bias", "cache"))
    if room is None or room.mask is None or attention_mask is not room.mask or odd:
        if room is not None and room.mask is not None:
            # Something is added that knows of no room.
            key, value = key[..., : room.used, :], value[..., : room.used, :]
            if attention_mask is not None:
                attention_mask = attention_mask[..., : room.used]
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
    n_rows, n_heads, _, width = query.shape
    n_shared = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    queries = (query * scale).reshape(n_rows * n_shared, -1, width)
    scores = torch.bmm(queries, key.flatten(0, 1).transpose(1, 2))
    seen = scores.view(n_rows, n_shared, -1, room.columns).add_(room.mask)
    weights = seen.softmax(-1).view_as(scores)
    heads = torch.bmm(weights, value.flatten(0, 1))
    return heads.view(n_rows, 1, n_heads, -1), None


AttentionInterface.register(ATTENTION, attend)
# Without it no mask is made for this name, and padding is silently attended to.
AttentionMaskInterface.register(ATTENTION, step_mask)
