"""What a run will cost, said before it starts."""

import time
from typing import NamedTuple

import torch

from holdfast.models.parts import Adapter
from holdfast.session.batches import Pace
from holdfast.session.meter import Work

BYTES_PER_TRACED_TOKEN = 40
BYTES_PER_TOKEN = 12


class Cost(NamedTuple):
    """What drawing answers can cost, if each uses its whole budget.

    Most answers end sooner, so none of these says what a run will cost; the pace of
    the first batch does (`pace_sentence`).

    Attributes:
        batch_seconds: Time of one batch, by one bare step: real ones take longer.
        batch_size: Answers in it.
        budget: Tokens that one answer may have, thinking included.
        memory: Bytes of weights and of the cache of one batch.
        disk: Bytes of the study.
    """

    batch_seconds: float
    batch_size: int
    budget: int
    memory: int
    disk: int

    def sentence(self, rows: int) -> str:
        """Return the bounds as the user reads them, before anything is drawn."""
        return (
            f"{rows} answers to draw, of at most {self.budget} tokens each, with at "
            f"most {_size(self.memory)} of memory and {_size(self.disk)} of disk. By "
            f"one timed step, a batch of {self.batch_size} takes "
            f"{duration(self.batch_seconds)} or more where an answer uses all of its "
            "tokens; how long all of them take is said after the first batch."
        )


def pace_sentence(pace: Pace, tokens: float) -> str | None:
    """Return how long the rest will take, measured on the first batch.

    Args:
        pace: How the first batch went.
        tokens: Tokens that its answers have on average, thinking included.

    Returns:
        The estimate and what it rests on; None where nothing is left.
    """
    if not pace.left:
        return None
    return (
        f"Estimate: about {duration(pace.rest)} for the other {pace.left} answers, if "
        f"they are as long as the first {pace.items}, which took "
        f"{duration(pace.seconds)} ({tokens:.0f} tokens each on average)."
    )


def estimate(
    adapter: Adapter, *, rows: int, prompt: int, budget: int, batch_size: int
) -> Cost:
    """Bound the cost of drawing answers; the time is that of one timed step.

    Args:
        adapter: The model.
        rows: Answers to draw.
        prompt: Tokens of the longest prompt.
        budget: Tokens that one answer may have, thinking included.
        batch_size: Rows at once.

    Returns:
        Time of a batch, memory and disk.
    """
    width = min(batch_size, rows) or 1
    length = prompt + budget
    weights = sum(p.numel() * p.element_size() for p in adapter.model.parameters())
    cache = width * length * cache_bytes(adapter)
    return Cost(
        batch_seconds=budget * _seconds_per_step(adapter, width),
        batch_size=width,
        budget=budget,
        memory=weights + cache,
        disk=rows * length * (BYTES_PER_TOKEN + BYTES_PER_TRACED_TOKEN),
    )


def step_work(adapter: Adapter) -> Work:
    """Return what a step of decoding costs, in multiplications.

    Every weight is used once for a row, and every token of the context once for each
    head, for its key and for its value.
    """
    weights = sum(p.numel() for p in adapter.model.parameters())
    attended = 2 * adapter.n_layers * adapter.n_heads * adapter.head_width
    return Work(float(weights), float(attended))


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
