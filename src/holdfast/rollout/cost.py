"""What a run will cost, said before it starts: time, memory and disk."""

import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from holdfast.models.decoding.decoder import MAX_LOGITS
from holdfast.models.decoding.kv_cache import ROOM
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.model import Adapter
from holdfast.study.batches import Pace, Work

BYTES_PER_TRACED_TOKEN = 40
BYTES_PER_TOKEN = 12
CHOOSING = {"greedy": 8, "drawn": 64, "nucleus": 112}
"""Bytes that a choice takes for each token of the vocabulary and row, its logits in
float32 and, where tokens are drawn, its sums in float64 (and sorted for a nucleus)."""
SLACK = 1.5
"""What a pass takes, over what its tensors have: allocators keep pieces of what was
freed, and kernels copy."""
WORKSPACE = 96 << 20
"""Bytes of kernels, their buffers, and code that is loaded when first used."""


class Cost(NamedTuple):
    """What drawing answers can cost, if each uses its whole budget.

    Most answers end sooner, so none of these says what a run will cost; the pace of
    the first batch does (`pace_sentence`).
    """

    batch_size: int  # Answers that are drawn side by side.
    budget: int  # Tokens that one answer may have, thinking included.
    memory: int  # Bytes at the highest point: what is held, and the largest batch.
    disk: int  # Bytes of the study.

    def sentence(self, rows: int) -> str:
        """Return the bounds as the user reads them, before anything is drawn."""
        return (
            f"{rows} answers to draw, {self.batch_size} at once, of at most "
            f"{self.budget} tokens each, with at most {_size(self.memory)} of memory "
            f"and {_size(self.disk)} of disk. How long all of them take is said after "
            "the first batch."
        )


def pace_sentence(pace: Pace, tokens: float) -> str | None:
    """Return how long the rest will take, measured on the first batch.

    Returns: The estimate and what it rests on; None where nothing is left.
    """
    if not pace.left:
        return None
    return (
        f"Estimate: about {duration(pace.rest)} for the other {pace.left} answers, if "
        f"they are as long as the first {pace.items}, which took "
        f"{duration(pace.seconds)} ({tokens:.0f} tokens each on average)."
    )


def estimate(
    adapter: Adapter,
    sampling: Sampling,
    *,
    rows: int,
    prompt: int,
    batch_size: int,
    drafted: bool = False,
) -> Cost:
    """Bound the cost of drawing answers; nothing is run for it."""
    budget = sampling.max_thinking + sampling.max_answer
    load = Load(min(batch_size, rows) or 1, prompt, budget, drafted)
    length = min(prompt + budget, adapter.max_positions)
    disk = rows * length * (BYTES_PER_TOKEN + BYTES_PER_TRACED_TOKEN)
    return Cost(load.width, budget, peak_bytes(adapter, sampling, load), disk)


def step_work(adapter: Adapter) -> Work:
    """Return what a step of decoding costs, in multiplications.

    Every weight is used once for a row, and every token of the context once for each
    head, for its key and for its value.
    """
    weights = sum(p.numel() for p in adapter.model.parameters())
    attended = 2 * adapter.n_heads * sum(_head_widths(adapter))
    return Work(float(weights), float(attended))


def duration(seconds: float) -> str:
    """Return seconds in the unit in which a person thinks of them."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def _size(n_bytes: int) -> str:
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


class Load(NamedTuple):
    """What is decoded at once."""

    width: int  # Rows of a batch.
    prompt: int  # Tokens of the longest prompt.
    budget: int  # Tokens that are written at most.
    drafted: bool = False  # Whether other tokens are tried along the way.


def peak_bytes(adapter: Adapter, sampling: Sampling, load: Load) -> int:
    """Bound the memory of a run that decodes batches, what is held now included.

    On an accelerator it is that of its tensors, elsewhere that of the process.
    """
    now, before = _held(adapter)
    return max(before, now + batch_bytes(adapter, sampling, load))


def batch_bytes(adapter: Adapter, sampling: Sampling, load: Load) -> int:
    """Bound what decoding a batch takes beside what is held before it.

    It follows from the shape of the model alone.
    """
    width, prompt = load.width, load.prompt
    budget = min(load.budget, adapter.max_positions - prompt)
    length = prompt + budget + ROOM
    held = width * length * cache_bytes(adapter)
    # A layer that grows, or loses rows, is held twice while it is copied.
    copied = held // max(1, len(adapter.layers_with_heads))
    read = prompt + budget if load.drafted else prompt
    passing = max(
        _passing(adapter, width, read, read), _passing(adapter, width, 1, length)
    )
    logits = width * int(adapter.model.config.get_text_config().vocab_size)
    if load.drafted:
        logits = max(logits, min(MAX_LOGITS, logits * budget))
    kind = "drawn" if sampling.top_p == 1 else "nucleus"
    choosing = logits * CHOOSING["greedy" if sampling.temperature == 0 else kind]
    uniforms = 2 * width * adapter.max_positions * 8
    highest = max(int(SLACK * passing), choosing)
    return held + copied + highest + uniforms + WORKSPACE


def cache_bytes(adapter: Adapter) -> int:
    """Return the bytes that keys and values of one token take, over all layers."""
    config = adapter.model.config.get_text_config()
    try:
        kv_heads = getattr(config, "num_key_value_heads", None) or adapter.n_heads
    # Where layers differ in it, transformers raises no AttributeError.
    except RuntimeError:
        kv_heads = adapter.n_heads
    widths = _head_widths(adapter)
    # Keys may be wider than values, and never stand alone where values are latent.
    keys = sum(max(w, getattr(config, "qk_head_dim", w)) for w in widths)
    per_token = (kv_heads or 1) * (keys + sum(widths))
    return int(per_token * adapter.embedding.weight.element_size())


def _head_widths(adapter: Adapter) -> tuple[int, ...]:
    """Return the width of a head in each layer; a bound where heads were not found."""
    if any(adapter.head_widths):
        return adapter.head_widths
    config = adapter.model.config.get_text_config()
    # All heads of a layer are as wide as the residual stream.
    width = math.ceil(adapter.d_model / max(1, adapter.n_heads))
    return (width,) * int(getattr(config, "num_hidden_layers", 0) or 1)


def _passing(adapter: Adapter, width: int, queries: int, context: int) -> int:
    """Return the bytes of what one block of one pass holds at once."""
    size = adapter.embedding.weight.element_size()
    heads = max(1, adapter.n_heads) * max(_head_widths(adapter))
    # The widest layer of a block.
    inner = max(
        (
            weight.shape[-2]
            for name, weight in adapter.base.named_parameters()
            if weight.ndim >= 2 and "embed" not in name
        ),
        default=4 * adapter.d_model,
    )
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
