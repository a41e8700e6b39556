"""How benchmarks measure: interleaved rounds, CPU time, bootstrap, allocated tensors.

Every variant runs once in each round, in an order that rotates, so that a slow spell
of the machine falls on all of them. Ratios are taken within a round.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

VOCAB = 16_384
SHAPES = json.loads(Path(__file__).with_name("shapes.json").read_text("utf-8"))
"""Shapes of models by type, each with the rows of tokens that it is timed on."""
DEFAULT = "qwen3"


def random_model(kind: str = DEFAULT) -> Any:
    """Build the model that every variant runs."""
    torch.manual_seed(0)
    shape = SHAPES[kind]
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = getattr(transformers, shape["config"])(
        vocab_size=VOCAB, **special, **shape["settings"]
    )
    # The kernel that transformers chooses, which is not the same for all.
    model = transformers.AutoModelForCausalLM.from_config(config)
    # Peers look a model up by the name of its class, which a saved one has.
    model.config.architectures = [type(model).__name__]
    return model.eval()


def small_tokenizer() -> Any:
    """Build a tokenizer for peers that want one, which no variant times."""
    words = Tokenizer(WordLevel({"a": 0, "<|end|>": 1}, unk_token="a"))
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|end|>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **ends)


def random_tokens(kind: str = DEFAULT) -> torch.Tensor:
    """Return the tokens that every variant reads."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, tuple(SHAPES[kind]["tokens"]), generator=generator)


def about(kind: str) -> str:
    """Say in a few words what is timed."""
    settings = SHAPES[kind]["settings"]
    n_examples, n_positions = SHAPES[kind]["tokens"]
    return (
        f"Random {kind}, {settings['num_hidden_layers']} layers of width "
        f"{settings['hidden_size']}; {n_examples} × {n_positions} tokens"
    )


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


def row(
    seconds: np.ndarray, plain: np.ndarray, run: Callable[[], Any] | None
) -> dict[str, Any]:
    """Return one line of a table: ratio to the plain pass, seconds, memory.

    `run`: None where memory is not measured, which takes ten times as long as a run.
    """
    return {
        **summarise(seconds / plain),
        "seconds": float(np.median(seconds)),
        "peak_mib": None if run is None else peak_bytes(run) / 2**20,
    }


def print_table(rows: dict[str, dict[str, Any]], pairs: int, about: str) -> None:
    """Print the lines with what they were measured on."""
    print(
        f"\n{about}, float32, one thread; {pairs} rounds; torch {torch.__version__}, "
        f"transformers {transformers.__version__}.\n"
    )
    print("| variant | CPU time ÷ plain [95 %] | seconds | peak tensors, MiB |")
    print("|---|---|---|---|")
    for name, line in rows.items():
        mib = line["peak_mib"]
        peak = "not measured" if mib is None else f"{mib:.0f}"
        print(
            f"| {name} | {line['ratio']:.3f} [{line['low']:.3f}, {line['high']:.3f}] "
            f"| {line['seconds']:.2f} | {peak} |"
        )


def verdict(line: dict[str, float], limit: float) -> str:
    """Say whether the limit holds; an interval on both sides of it does not tell."""
    if line["high"] <= limit:
        return "yes"
    return "no" if line["low"] > limit else "not resolved, run more rounds"
