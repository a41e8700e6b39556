"""What memory a batch can take at most, from the shape of the model alone."""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from holdfast.models.decoding.decoder import MAX_LOGITS
from holdfast.models.decoding.kv_cache import ROOM
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.model import Adapter

CHOOSING = {"greedy": 8, "drawn": 64, "nucleus": 112}
"""Bytes that a choice takes for each token of the vocabulary and row, its logits in
float32 and, where tokens are drawn, its sums in float64 (and sorted for a nucleus)."""
SLACK = 1.5
"""What a pass takes, over what its tensors have: allocators keep pieces of what was
freed, and kernels copy."""
WORKSPACE = 96 << 20
"""Bytes of kernels, their buffers, and code that is loaded when first used."""


def peak_bytes(
    adapter: Adapter,
    sampling: Sampling,
    *,
    width: int,
    prompt: int,
    budget: int,
    drafted: bool = False,
) -> int:
    """Bound the memory of a run that decodes batches, what is held now included.

    On an accelerator it is that of its tensors, elsewhere that of the process.
    """
    now, before = _held(adapter)
    more = batch_bytes(
        adapter, sampling, width=width, prompt=prompt, budget=budget, drafted=drafted
    )
    return max(before, now + more)


def batch_bytes(
    adapter: Adapter,
    sampling: Sampling,
    *,
    width: int,
    prompt: int,
    budget: int,
    drafted: bool = False,
) -> int:
    """Bound what decoding a batch takes beside what is held before it."""
    budget = min(budget, adapter.max_positions - prompt)
    length = prompt + budget + ROOM
    cache = cache_bytes(adapter)
    held = width * length * cache
    # A layer that grows, or loses rows, is held twice while it is copied.
    copied = held // adapter.n_layers
    read = prompt + budget if drafted else prompt
    passing = max(
        _passing(adapter, width, read, read), _passing(adapter, width, 1, length)
    )
    logits = width * _vocabulary(adapter)
    if drafted:
        logits = max(logits, min(MAX_LOGITS, logits * budget))
    choosing = logits * CHOOSING[_kind(sampling)]
    uniforms = 2 * width * adapter.max_positions * 8
    highest = max(int(SLACK * passing), choosing)
    return held + copied + highest + uniforms + WORKSPACE


def cache_bytes(adapter: Adapter) -> int:
    """Return the bytes that keys and values of one token take, over all layers."""
    config = adapter.model.config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", None) or adapter.n_heads
    per_token = 2 * adapter.n_layers * kv_heads * adapter.head_width
    return int(per_token * adapter.embedding.weight.element_size())


def _passing(adapter: Adapter, width: int, queries: int, context: int) -> int:
    """Return the bytes of what one block of one pass holds at once."""
    size = adapter.embedding.weight.element_size()
    heads = adapter.n_heads * adapter.head_width
    inner = _inner(adapter)
    # Residual and what is added to it; norms in float32; and then either queries,
    # keys, values, rotated, and their product, or the two branches of an MLP.
    token = 3 * size * adapter.d_model + 8 * adapter.d_model
    token += size * max(8 * heads, 4 * inner)
    # Keys and values are spread over all heads, once for the block.
    spread = 2 * context * heads * size
    # The mask, as truth values and as numbers; where scores are held, these too.
    mask = queries * context * (4 + size)
    config = adapter.model.config.get_text_config()
    if getattr(config, "_attn_implementation", "sdpa") == "eager":
        mask += adapter.n_heads * queries * context * (2 * size + 4)
    return width * (queries * token + spread + mask)


def _inner(adapter: Adapter) -> int:
    """Return the width of the widest layer of a block."""
    rows: Mapping[str, torch.nn.Parameter] = dict(adapter.base.named_parameters())
    widths = [p.shape[-2] for n, p in rows.items() if p.ndim >= 2 and "embed" not in n]
    return max(widths, default=4 * adapter.d_model)


def _vocabulary(adapter: Adapter) -> int:
    return int(adapter.model.config.get_text_config().vocab_size)


def _kind(sampling: Sampling) -> str:
    if sampling.temperature == 0:
        return "greedy"
    return "drawn" if sampling.top_p == 1 else "nucleus"


def _held(adapter: Adapter) -> tuple[int, int]:
    """Return the bytes that are held now, and were at the highest point until now."""
    if adapter.device.type == "cuda":
        now = torch.cuda.memory_allocated(adapter.device)
        return now, torch.cuda.max_memory_allocated(adapter.device)
    weights = sum(p.numel() * p.element_size() for p in adapter.model.parameters())
    if sys.platform == "win32":
        return weights, weights
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return before, before
    return pages * resource.getpagesize(), before
