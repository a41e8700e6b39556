"""What exchanging every head between twins costs, beside the plain loop.

All heads of one run go into the other, over the end template. The limit for a pair of
runs is two prefills and 1.3 cached passes of the end template for each head. Beside it
stands what is usual: one whole pass without a cache for each head of each layer.

Every variant runs once in each round and is divided by the plain pass of the same
round. Time is CPU time of the process. The row "plain again" is the noise.

    python benchmarks/interchange.py --loop-pairs 2 --json interchange.json
    python benchmarks/interchange.py --type qwen3 --twins 8 --pairs 6
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import (
    SHAPES,
    VOCAB,
    about,
    measure,
    one_thread,
    print_table,
    random_model,
    random_tokens,
    row,
    summarise,
    verdict,
)
from transformers import DynamicCache

from holdfast.heads.interchange.exchange import Run, exchange
from holdfast.models.decoding.head_swap import KEEP
from holdfast.models.loading.causal import adapt
from holdfast.models.model import Adapter

KIND, LIMIT, N_TEMPLATE, BATCH = "organism", 1.3, 4, 32
PLAIN, AGAIN = "plain base forward of both runs", "plain again (the noise)"
PREFILL = "plain prefill of both runs that keeps its cache"
PASS = f"one cached pass of {N_TEMPLATE} tokens, one run of each pair"
ONE_WAY = "Holdfast: every head, into one run of each pair"
BOTH_WAYS = "Holdfast: every head, into both runs"
LOOP = "usual: one whole pass for each head, into one run of each pair"


def twins(kind: str, n_twins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two runs of each pair; their end templates are the same tokens."""
    ids = random_tokens(kind)
    ids = ids.repeat(-(-2 * n_twins // len(ids)), 1)[: 2 * n_twins].clone()
    generator = torch.Generator().manual_seed(3)
    ids[:, :16] = torch.randint(VOCAB, (len(ids), 16), generator=generator)
    ids[:, -N_TEMPLATE:] = ids[0, -N_TEMPLATE:]
    return ids[::2], ids[1::2]


def variants(adapter: Adapter, kind: str, n_twins: int) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name; each works through the same pairs."""
    first, second = twins(kind, n_twins)
    batches = [
        (first[at : at + BATCH], second[at : at + BATCH])
        for at in range(0, n_twins, BATCH)
    ]
    length = first.shape[1]
    span = (length - N_TEMPLATE, length)
    heads = adapter.n_layers * adapter.n_heads
    take = torch.full((heads, adapter.n_layers, adapter.n_heads), KEEP)
    take.view(heads, -1).fill_diagonal_(0)
    direction = torch.randn(adapter.d_model, generator=torch.Generator().manual_seed(2))

    def plain() -> None:
        with torch.inference_mode():
            for pair in batches:
                adapter.base(input_ids=torch.cat(pair), use_cache=False)

    def prefill() -> list[Any]:
        caches = []
        with torch.inference_mode():
            for pair in batches:
                cache = DynamicCache(config=adapter.model.config)
                ids = torch.cat(pair)[:, :-N_TEMPLATE]
                adapter.base(ids, past_key_values=cache, use_cache=True)
                caches.append(cache)
        return caches

    kept = []
    with torch.inference_mode():
        for one, _ in batches:
            cache = DynamicCache(config=adapter.model.config)
            adapter.base(one[:, :-N_TEMPLATE], past_key_values=cache, use_cache=True)
            kept.append(cache)

    def cached_pass() -> None:
        with torch.inference_mode():
            for (one, _), cache in zip(batches, kept, strict=True):
                ids = one[:, -N_TEMPLATE:]
                adapter.base(ids, past_key_values=cache, use_cache=True)
                cache.crop(-N_TEMPLATE)

    def exchanged(ways: int) -> None:
        for one, other in batches:
            n = len(one)
            tables = [take] * (ways * n) + [None] * ((2 - ways) * n)
            runs = [
                Run(ids, span, ((place + n) % (2 * n),), tables[place])
                for place, ids in enumerate([*one.tolist(), *other.tolist()])
            ]
            exchange(adapter, runs, lambda states: states.float() @ direction)

    return {
        PLAIN: plain,
        AGAIN: plain,
        PREFILL: prefill,
        PASS: cached_pass,
        ONE_WAY: lambda: exchanged(1),
        BOTH_WAYS: lambda: exchanged(2),
    }


def plain_loop(adapter: Adapter, kind: str, n_twins: int) -> Callable[[], None]:
    """Return what is usual: hooks, whole passes, one head after the other."""
    first, second = twins(kind, n_twins)
    here = slice(first.shape[1] - N_TEMPLATE, None)

    def loop() -> None:
        with torch.inference_mode():
            for at in range(0, n_twins, BATCH):
                one, other = (each[at : at + BATCH] for each in (first, second))
                for layer in adapter.layers_with_heads:
                    projection = adapter.output_projection(layer)
                    width, seen = adapter.head_widths[layer], []
                    handle = projection.register_forward_pre_hook(
                        lambda _, given, seen=seen: seen.append(given[0])
                    )
                    adapter.base(input_ids=other, use_cache=False)
                    handle.remove()
                    for head in range(adapter.n_heads):
                        columns = slice(head * width, (head + 1) * width)

                        def put(_: Any, given: Any, columns: slice = columns) -> Any:
                            states = given[0].clone()
                            states[:, here, columns] = seen[0][:, here, columns]  # noqa: B023
                            return (states,)

                        handle = projection.register_forward_pre_hook(put)
                        adapter.base(input_ids=one, use_cache=False)
                        handle.remove()

    return loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10, help="rounds (10 or more)")
    parser.add_argument("--loop-pairs", type=int, default=1, help="rounds of the loop")
    parser.add_argument("--twins", type=int, default=64, help="pairs of runs")
    parser.add_argument("--loop-twins", type=int, default=8, help="pairs for the loop")
    parser.add_argument("--type", choices=SHAPES, default=KIND, help="of the model")
    parser.add_argument("--memory", action="store_true", help="also peak tensors")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with one_thread():
        adapter = adapt(random_model(options.type), None)
        runs = variants(adapter, options.type, options.twins)
        seconds = measure(runs, options.pairs)
        watched = runs if options.memory else dict.fromkeys(runs)
        rows = {n: row(seconds[n], seconds[PLAIN], run) for n, run in watched.items()}
        if options.loop_pairs:
            few = options.loop_twins
            slow = {
                PLAIN: variants(adapter, options.type, few)[PLAIN],
                LOOP: plain_loop(adapter, options.type, few),
            }
            slowly = measure(slow, options.loop_pairs)
            loop = slow[LOOP] if options.memory else None
            rows[LOOP] = row(slowly[LOOP], slowly[PLAIN], loop)
    print_table(rows, options.pairs, f"{options.twins} pairs; {about(options.type)}")
    heads = adapter.total_heads
    result: dict[str, Any] = {
        "pairs": options.pairs,
        "twins": options.twins,
        "heads": heads,
        "limit": LIMIT,
        "rows": rows,
    }
    # The prefills are paid once, so only what comes on top of them is divided.
    for name in (ONE_WAY, BOTH_WAYS):
        passes = (seconds[name] - seconds[PREFILL]) / (heads * seconds[PASS])
        result[name] = found = summarise(passes)
        print(
            f"{name}: two prefills a pair, and {found['ratio']:.2f} "
            f"[{found['low']:.2f}, {found['high']:.2f}] × {heads} cached passes; "
            f"within {LIMIT} ×: {verdict(found, LIMIT)}."
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
