"""What a run will cost, said before it starts."""

from typing import NamedTuple

from holdfast.models.decoding.row_state import Sampling
from holdfast.models.model import Adapter
from holdfast.rollout.memory import peak_bytes
from holdfast.study.batches import Pace, Work

BYTES_PER_TRACED_TOKEN = 40
BYTES_PER_TOKEN = 12


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
    width = min(batch_size, rows) or 1
    budget = sampling.max_thinking + sampling.max_answer
    length = min(prompt + budget, adapter.max_positions)
    memory = peak_bytes(
        adapter, sampling, width=width, prompt=prompt, budget=budget, drafted=drafted
    )
    disk = rows * length * (BYTES_PER_TOKEN + BYTES_PER_TRACED_TOKEN)
    return Cost(width, budget, memory, disk)


def step_work(adapter: Adapter) -> Work:
    """Return what a step of decoding costs, in multiplications.

    Every weight is used once for a row, and every token of the context once for each
    head, for its key and for its value.
    """
    weights = sum(p.numel() for p in adapter.model.parameters())
    attended = 2 * adapter.n_layers * adapter.n_heads * adapter.head_width
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
