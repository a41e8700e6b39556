"""What reading states costs, beside a plain forward pass of the base model.

Every variant runs once in each round, in an order that rotates, and is divided by
the plain pass of the same round. Time is CPU time of the process. The row "plain
again" is the noise: a difference smaller than its interval is not resolved.

    python benchmarks/capture.py --pairs 30 --json capture.json
    python benchmarks/capture.py --type gpt_oss
"""

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
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
    verdict,
)

from holdfast.models.hidden_states import project_states, read_states
from holdfast.models.loading.causal import adapt
from holdfast.models.model import Adapter

LIMIT = 1.05
PLAIN, AGAIN = "plain base forward", "plain again (the noise)"
STATES = "Holdfast: states at every position"
SCORES = "Holdfast: one score at every position"
USUAL = "usual: `output_hidden_states=True`, full logits"
PEERS = {"nnsight": "nnsight", "transformer_lens": "TransformerLens bridge"}
DISTRIBUTIONS = {"nnsight": "nnsight", "transformer_lens": "transformer-lens"}


def variants(adapter: Adapter, kind: str) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name; each runs one batch of the same tokens."""
    generator = torch.Generator().manual_seed(2)
    ids = random_tokens(kind)
    sequences = ids.tolist()
    direction = torch.randn(1, adapter.d_model, generator=generator)
    base, model = adapter.base, adapter.model

    def plain() -> Any:
        with torch.inference_mode():
            return base(input_ids=ids, use_cache=False)

    def states() -> Any:
        return read_states(adapter, sequences, lambda found, _: found, batch_size=16)

    def scores() -> Any:
        return project_states(adapter, sequences, direction, batch_size=16)

    def usual() -> Any:
        with torch.inference_mode():
            return model(input_ids=ids, output_hidden_states=True, use_cache=False)

    known = {PLAIN: plain, AGAIN: plain, STATES: states, SCORES: scores, USUAL: usual}
    return known | dict(peers(adapter, kind, ids, plain().last_hidden_state))


def peers(
    adapter: Adapter, kind: str, ids: torch.Tensor, expected: torch.Tensor
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the peers that are installed, and say why the others are not there."""
    for module, name in PEERS.items():
        if importlib.util.find_spec(module) is None:
            print(f"- {name}: not installed (`pip install '.[bench]'`)")
            continue
        try:
            run = PREPARE[module](adapter, kind, ids)
            deviation = float((run() - expected).abs().max())
        except Exception as error:
            # A peer may break on any version of its own; the table goes on without.
            said = str(error)[:200]
            print(f"- {name}: does not run here ({type(error).__name__}: {said})")
            continue
        print(f"- {name} {version(DISTRIBUTIONS[module])}: {deviation:.0e} off")
        yield f"{name}: states at every position", run


def _nnsight(adapter: Adapter, _: str, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    from nnsight import NNsight

    wrapped = NNsight(adapter.base)

    def run() -> torch.Tensor:
        with torch.inference_mode(), wrapped.trace(input_ids=ids, use_cache=False):
            found = wrapped.norm.output.save()
        return found

    return run


def _transformer_lens(
    _: Adapter, kind: str, ids: torch.Tensor
) -> Callable[[], torch.Tensor]:
    from transformer_lens.model_bridge import TransformerBridge

    # The bridge puts its own modules into the model, so it gets a twin.
    twin = random_model(kind)
    with TemporaryDirectory() as directory:
        # It takes configuration and tokenizer from a directory or from the Hub.
        twin.config.save_pretrained(directory)
        small_tokenizer().save_pretrained(directory)
        bridge = TransformerBridge.boot_transformers(directory, hf_model=twin)
    name = "ln_final.hook_out"

    def run() -> torch.Tensor:
        with torch.inference_mode():
            _, cache = bridge.run_with_cache(ids, names_filter=[name], return_type=None)
        return cache[name]

    return run


PREPARE = {"nnsight": _nnsight, "transformer_lens": _transformer_lens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30, help="rounds (30 or more)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--type", choices=SHAPES, default=DEFAULT, help="of the model")
    options = parser.parse_args()
    with one_thread():
        runs = variants(adapt(random_model(options.type), None), options.type)
        seconds = measure(runs, options.pairs)
        rows = {n: row(seconds[n], seconds[PLAIN], run) for n, run in runs.items()}
    print_table(rows, options.pairs, about(options.type))
    holds = verdict(rows[STATES], LIMIT)
    print(f"\nStates at every position within {LIMIT} ×: {holds}.")
    if options.json:
        result = {"pairs": options.pairs, "limit": LIMIT, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
