"""What finding heads costs: contributions in closed form, and taking heads away.

Contributions of every head are compared with one prefill, and the causal check with
one prefill and one cached pass of the end template a head. Beside them stands what is
usual: one whole prefill for each head of each layer, and TransformerLens.

Every variant runs once in each round and is divided by the plain pass of the same
round. Time is CPU time of the process. The row "plain again" is the noise. On types
other than the first only contributions are timed: not every cache can be cropped.

    python benchmarks/heads.py --pairs 30 --loop-pairs 2 --json heads.json
    python benchmarks/heads.py --type deepseek_v3 --loop-pairs 1
"""

import argparse
import copy
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import (
    DEFAULT,
    SHAPES,
    about,
    measure,
    one_thread,
    print_table,
    random_model,
    random_tokens,
    row,
    small_tokenizer,
    summarise,
    verdict,
)
from transformers import DynamicCache

from holdfast.heads.attribution import attribute
from holdfast.heads.causal_effects import causal_effects
from holdfast.models.hidden_states import final_states
from holdfast.models.interventions import head_factors, scale_heads
from holdfast.models.loading.causal import adapt
from holdfast.models.model import Adapter

LIMIT, LIMIT_OF_OTHERS, CAUSAL_LIMIT = 1.10, 1.15, 1.3
N_CHECKED, N_TEMPLATE = 32, 4
PLAIN, AGAIN = "plain base forward", "plain again (the noise)"
CLOSED = "Holdfast: every head, plateau mean and last 64"
PREFILL = "plain prefill that keeps its cache"
PASS = f"one cached pass of {N_TEMPLATE} tokens"
CAUSAL = f"Holdfast: {N_CHECKED} heads taken away over {N_TEMPLATE} tokens"
LOOP = "usual: one prefill for each head of each layer"
LENS = "TransformerLens bridge: every head's result"


def variants(adapter: Adapter, kind: str) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name; each reads one batch of the same tokens."""
    ids = random_tokens(kind)
    n_examples, n_positions = ids.shape
    sequences, template = ids.tolist(), ids[:, -N_TEMPLATE:]
    direction = torch.randn(adapter.d_model, generator=torch.Generator().manual_seed(2))
    plateaus = [(20, n_positions - N_TEMPLATE)] * n_examples
    places = [divmod(i, adapter.n_heads) for i in range(N_CHECKED)]
    candidates = [[(adapter.n_layers - 1 - layer, head)] for layer, head in places]

    def plain() -> Any:
        with torch.inference_mode():
            return adapter.base(input_ids=ids, use_cache=False)

    def closed() -> Any:
        return attribute(adapter, sequences, plateaus, direction, batch_size=16)

    if kind != DEFAULT:
        return {PLAIN: plain, AGAIN: plain, CLOSED: closed}

    def prefill() -> Any:
        cache = DynamicCache(config=adapter.model.config)
        with torch.inference_mode():
            adapter.base(ids[:, :-N_TEMPLATE], past_key_values=cache, use_cache=True)
        return cache

    kept = prefill()

    def cached_pass() -> Any:
        with torch.inference_mode():
            adapter.base(template, past_key_values=kept, use_cache=True)
            kept.crop(-N_TEMPLATE)

    def causal() -> Any:
        return causal_effects(
            adapter,
            sequences,
            [N_TEMPLATE] * n_examples,
            candidates,
            direction,
            moments=["end_template"],
        )

    return {
        PLAIN: plain,
        AGAIN: plain,
        CLOSED: closed,
        PREFILL: prefill,
        PASS: cached_pass,
        CAUSAL: causal,
    }


def slow_variants(
    adapter: Adapter, kind: str
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what is usual; it takes minutes, so few rounds have to do."""
    ids = random_tokens(kind)
    sequences = ids.tolist()

    def loop() -> Any:
        for layer in adapter.layers_with_heads:
            for head in range(adapter.n_heads):
                with scale_heads(adapter, head_factors(adapter, [(layer, head)])):
                    final_states(adapter, sequences, batch_size=16)

    if kind == DEFAULT:
        yield LOOP, loop
    if importlib.util.find_spec("transformer_lens") is None:
        print("- TransformerLens: not installed (`pip install '.[bench]'`)")
        return
    try:
        run = _transformer_lens(adapter, ids)
        run()
    except Exception as error:
        # A peer may break on any version of its own; the table goes on without.
        said = str(error)[:200]
        print(f"- TransformerLens: does not run ({type(error).__name__}: {said})")
        return
    yield LENS, run


def _transformer_lens(adapter: Adapter, ids: torch.Tensor) -> Callable[[], Any]:
    from transformer_lens.model_bridge import TransformerBridge

    # It reads a configuration by name, and a folder needs no network.
    with tempfile.TemporaryDirectory() as folder:
        adapter.model.config.save_pretrained(folder)
        small_tokenizer().save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(
            folder, hf_model=copy.deepcopy(adapter.model)
        )
    own = adapter.layers_with_heads
    names = [f"blocks.{layer}.attn.hook_z" for layer in own]
    weights = [
        adapter.output_projection(layer).weight.T.reshape(
            adapter.n_heads, adapter.head_widths[layer], -1
        )
        for layer in own
    ]

    def run() -> Any:
        with torch.inference_mode():
            _, cache = bridge.run_with_cache(ids, names_filter=names)
            return [
                torch.einsum(
                    "ephk,hkd->ephd",
                    cache[name].reshape(*ids.shape, adapter.n_heads, -1)[:, -64:],
                    weight,
                )
                for name, weight in zip(names, weights, strict=True)
            ]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30, help="rounds (30 or more)")
    parser.add_argument("--loop-pairs", type=int, default=2, help="rounds of the loop")
    parser.add_argument("--type", choices=SHAPES, default=DEFAULT, help="of the model")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    limit = LIMIT if options.type == DEFAULT else LIMIT_OF_OTHERS
    with one_thread():
        adapter = adapt(random_model(options.type), None)
        runs = variants(adapter, options.type)
        seconds = measure(runs, options.pairs)
        rows = {n: row(seconds[n], seconds[PLAIN], run) for n, run in runs.items()}
        if options.loop_pairs:
            slow = {PLAIN: runs[PLAIN], **dict(slow_variants(adapter, options.type))}
            slowly = measure(slow, options.loop_pairs)
            for name in list(slowly)[1:]:
                rows[name] = row(slowly[name], slowly[PLAIN], slow[name])
    print_table(rows, options.pairs, about(options.type))
    print(f"\nEvery head within {limit} × one prefill: {verdict(rows[CLOSED], limit)}.")
    result = {
        "pairs": options.pairs,
        "loop_pairs": options.loop_pairs,
        "limits": {"closed": limit, "causal": CAUSAL_LIMIT},
        "rows": rows,
    }
    if CAUSAL in rows:
        # The prefill is paid once, so only what comes on top of it is divided.
        passes = (seconds[CAUSAL] - seconds[PREFILL]) / (N_CHECKED * seconds[PASS])
        result["passes"] = causal = summarise(passes)
        print(
            f"{N_CHECKED} heads taken away cost one prefill and {causal['ratio']:.2f} "
            f"[{causal['low']:.2f}, {causal['high']:.2f}] × {N_CHECKED} cached passes; "
            f"within {CAUSAL_LIMIT} ×: {verdict(causal, CAUSAL_LIMIT)}."
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
