"""How benchmarks measure: interleaved rounds, CPU time, bootstrap, allocated tensors.

Every variant runs once in each round, in an order that rotates, so that a slow spell
of the machine falls on all of them. Ratios are taken within a round.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers

N_EXAMPLES, N_POSITIONS, VOCAB = 16, 256, 16_384
ABOUT = f"Random Qwen3, 8 layers of width 512; {N_EXAMPLES} × {N_POSITIONS} tokens"


def random_model() -> Any:
    """Build the model that every variant runs."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        attn_implementation="sdpa",
    )
    return transformers.Qwen3ForCausalLM(config).eval()


def random_tokens() -> torch.Tensor:
    """Return the tokens that every variant reads."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, (N_EXAMPLES, N_POSITIONS), generator=generator)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the most bytes of tensors that one run holds at a time."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        kept = run()
    del kept
    found = profiler.profiler.kineto_results.events()
    memory = [event for event in found if event.name() == "[memory]"]
    memory.sort(key=lambda event: event.start_ns())
    held = np.cumsum([event.nbytes() for event in memory])
    return int(held.max(initial=0))


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(runs: dict[str, Callable[[], Any]], pairs: int) -> dict[str, np.ndarray]:
    """Return the CPU seconds of every variant in every round."""
    names = list(runs)
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(pairs):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.process_time()
            runs[name]()
            seconds[name].append(time.process_time() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def summarise(ratios: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Return the median ratio and its 95 % bootstrap interval over rounds."""
    generator = np.random.default_rng(seed)
    drawn = generator.choice(ratios, (2_000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return {
        "ratio": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
    }


def row(seconds: np.ndarray, plain: np.ndarray, run: Callable[[], Any]) -> dict:
    """Return one line of a table: ratio to the plain pass, seconds, memory."""
    return {
        **summarise(seconds / plain),
        "seconds": float(np.median(seconds)),
        "peak_mib": peak_bytes(run) / 2**20,
    }


def print_table(
    rows: dict[str, dict[str, float]], pairs: int, about: str = ABOUT
) -> None:
    """Print the lines with what they were measured on."""
    print(
        f"\n{about}, float32, one thread; {pairs} rounds; torch {torch.__version__}, "
        f"transformers {transformers.__version__}.\n"
    )
    print("| variant | CPU time ÷ plain [95 %] | seconds | peak tensors, MiB |")
    print("|---|---|---|---|")
    for name, line in rows.items():
        print(
            f"| {name} | {line['ratio']:.3f} [{line['low']:.3f}, {line['high']:.3f}] "
            f"| {line['seconds']:.2f} | {line['peak_mib']:.0f} |"
        )


def verdict(line: dict[str, float], limit: float) -> str:
    """Say whether the limit holds; an interval on both sides of it does not tell."""
    if line["high"] <= limit:
        return "yes"
    return "no" if line["low"] > limit else "not resolved, run more rounds"
