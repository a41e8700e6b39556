"""What a run will cost, said before it starts."""

import time
from typing import NamedTuple

import torch

from holdfast.models.parts import Adapter

BYTES_PER_TRACED_TOKEN = 40
BYTES_PER_TOKEN = 12


class Cost(NamedTuple):
    """Upper bounds: every answer is taken to use its whole budget.

    Attributes:
        seconds: Time of decoding.
        memory: Bytes of weights and of the cache of one batch.
        disk: Bytes of the study.
    """

    seconds: float
    memory: int
    disk: int

    @property
    def duration(self) -> str:
        """Time of decoding in words."""
        return _duration(self.seconds)

    def sentence(self, rows: int) -> str:
        """Return the estimate as the user reads it."""
        return (
            f"{rows} answers to draw: at most {_duration(self.seconds)} (most end "
            f"sooner), about {_size(self.memory)} of memory, at most "
            f"{_size(self.disk)} of disk."
        )


def estimate(
    adapter: Adapter, *, rows: int, prompt: int, budget: int, batch_size: int
) -> Cost:
    """Bound the cost of drawing answers, from one timed step of one batch.

    Args:
        adapter: The model.
        rows: Answers to draw.
        prompt: Tokens of the longest prompt.
        budget: Tokens that one answer may have, thinking included.
        batch_size: Rows at once.

    Returns:
        Time, memory and disk.
    """
    width = min(batch_size, rows) or 1
    steps = -(-rows // width) * budget
    length = prompt + budget
    weights = sum(p.numel() * p.element_size() for p in adapter.model.parameters())
    cache = width * length * cache_bytes(adapter)
    return Cost(
        seconds=steps * _seconds_per_step(adapter, width),
        memory=weights + cache,
        disk=rows * length * (BYTES_PER_TOKEN + BYTES_PER_TRACED_TOKEN),
    )


def cache_bytes(adapter: Adapter) -> int:
    """Return the bytes that keys and values of one token take, over all layers."""
    config = adapter.model.config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", None) or adapter.n_heads
    per_token = 2 * adapter.n_layers * kv_heads * adapter.head_width
    return int(per_token * adapter.embedding.weight.element_size())


def _seconds_per_step(adapter: Adapter, width: int) -> float:
    """Time one token of each row of a batch; the first pass only warms up."""
    tokens = torch.zeros((width, 1), dtype=torch.long, device=adapter.device)
    seconds = 0.0
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            states = adapter.base(input_ids=tokens, use_cache=False).last_hidden_state
            # Reading a number waits for the device.
            float(adapter.lm_head(states[:, -1]).sum())
            seconds = time.perf_counter() - start
    return seconds


def _duration(seconds: float) -> str:
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
