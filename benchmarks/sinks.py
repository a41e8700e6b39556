"""What the sink term of a defended training step costs, forward and backward.

A harmful and a reference text of 2,048 tokens go through a random Qwen3 of 4 layers, 8
query and 2 key heads of width 64. Every variant but one adds the mean square of the
last states to its loss, so that the whole backward pass runs also without the term, and
a ratio is what the term itself costs. Beside Holdfast stand a second call of attention
with the indicator of the sink as values, and the published way: eager attention for
each text, and a loop over layers and heads, written from the formula.

Before anything is timed, penalty and gradient of all ways are compared.

Every variant runs once in each round and is divided by the plain pass of the same
round. Time is CPU time of the process. The row "plain again" is the noise.

    python benchmarks/sinks.py --pairs 30 --loop-pairs 5 --json sinks.json
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import measure, one_thread, print_table, row, summarise, verdict
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from holdfast.models.attention import SinkProbe, tapped
from holdfast.sinks.divergence import sink_divergence, sink_penalty

LIMIT, MEMORY_LIMIT, FACTOR = 1.2, 1.1, 300.0
LAYERS, HEADS, KV_HEADS, WIDTH, D_MODEL = 4, 8, 2, 64, 256
VOCAB = 512
PLAIN, AGAIN = "plain SDPA, without the term", "plain again (the noise)"
OURS = "Holdfast: one call"
ALONE = "Holdfast: one call, the term alone"
SECOND = "second call, sink as values"
EAGER = "published: eager, loop over heads"
SECOND_CALL = "bench_second_call"
Loss = Callable[[], tuple[Tensor, Tensor | None]]


def random_model() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=3 * D_MODEL,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH,
        # Far enough from uniform attention for heads to differ.
        initializer_range=0.1,
        attn_implementation="sdpa",
    )
    return transformers.Qwen3Model(config)


def random_texts(n_positions: int) -> Tensor:
    """Return a harmful and a reference text."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, (2, n_positions), generator=generator)


def with_second_call(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    masses: list[Tensor] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Call attention again with the indicator of the first token as values."""
    found, _ = sdpa_attention_forward(module, query, key, value, mask, **others)
    if masses is not None:
        sink = torch.zeros_like(value)
        sink[:, :, 0, 0] = 1
        again, _ = sdpa_attention_forward(module, query, key, sink, mask, **others)
        masses.append(again[:, 1:, :, 0].float().mean(1))
    return found, None


AttentionInterface.register(SECOND_CALL, with_second_call)
AttentionMaskInterface.register(SECOND_CALL, sdpa_mask)


def published_penalty(harmful: Any, reference: Any) -> Tensor:
    """Return the penalty head by head, from attentions of eager attention."""
    total: Any = 0.0
    for layer in range(LAYERS):
        for head in range(HEADS):
            on_harmful = harmful[layer][:, head, 1:, 0].mean()
            on_reference = reference[layer][:, head, 1:, 0].mean()
            total = total + torch.relu(on_harmful - on_reference)
    return total / (LAYERS * HEADS)


def losses(model: Any, texts: Tensor) -> dict[str, Loss]:
    """Return what each variant computes: the loss of the states, and the penalty."""
    mask = torch.ones_like(texts, dtype=torch.bool)

    def states(rows: Tensor, **more: Any) -> Any:
        return model(input_ids=rows, use_cache=False, **more)

    def plain() -> tuple[Tensor, None]:
        return states(texts).last_hidden_state.square().mean(), None

    def ours() -> tuple[Tensor, Tensor]:
        with tapped(model):
            probe = SinkProbe(mask)
            found = states(texts, sink_probe=probe).last_hidden_state
        mass = probe.mass()
        return found.square().mean(), sink_penalty(sink_divergence(mass[:1], mass[1:]))

    def alone() -> tuple[Tensor, Tensor]:
        loss, penalty = ours()
        return loss.detach(), penalty

    def second() -> tuple[Tensor, Tensor]:
        model.set_attn_implementation(SECOND_CALL)
        masses: list[Tensor] = []
        found = states(texts, masses=masses).last_hidden_state
        model.set_attn_implementation("sdpa")
        mass = torch.stack(masses, 1)
        return found.square().mean(), sink_penalty(sink_divergence(mass[:1], mass[1:]))

    def eager() -> tuple[Tensor, Tensor]:
        model.set_attn_implementation("eager")
        found = [states(text[None], output_attentions=True) for text in texts]
        model.set_attn_implementation("sdpa")
        squares = [each.last_hidden_state.square().mean() for each in found]
        penalty = published_penalty(*(each.attentions for each in found))
        return (squares[0] + squares[1]) / 2, penalty

    return {
        PLAIN: plain,
        AGAIN: plain,
        OURS: ours,
        ALONE: alone,
        SECOND: second,
        EAGER: eager,
    }


def backward(loss: Loss) -> float | None:
    """Run a variant forward and back; return its penalty."""
    of_states, penalty = loss()
    whole = of_states if penalty is None else of_states + FACTOR * penalty
    whole.backward()
    return None if penalty is None else float(penalty.detach())


def step(model: Any, loss: Loss) -> Callable[[], None]:
    """Return a forward and backward pass from no gradients, which leaves none."""

    def run() -> None:
        backward(loss)
        model.zero_grad(set_to_none=True)

    return run


def check(model: Any, ways: dict[str, Loss]) -> None:
    """Refuse to time ways that do not say the same."""
    found = {}
    for name in (OURS, SECOND, EAGER):
        penalty = backward(ways[name])
        gradient = torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )
        model.zero_grad(set_to_none=True)
        found[name] = (penalty, gradient)
    penalty, gradient = found[EAGER]
    for name in (OURS, SECOND):
        off = abs(found[name][0] - penalty)
        away = float((found[name][1] - gradient).norm() / gradient.norm())
        print(f"- {name}: penalty {off:.0e} off, gradient {away:.0e} (relative)")
        assert off < 1e-6
        assert away < 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30, help="rounds (30 or more)")
    parser.add_argument("--loop-pairs", type=int, default=5, help="rounds of eager")
    parser.add_argument("--positions", type=int, default=2048, help="tokens a text")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with one_thread():
        model, texts = random_model(), random_texts(options.positions)
        ways = losses(model, texts)
        check(model, ways)
        runs = {name: step(model, loss) for name, loss in ways.items()}
        slow = {PLAIN: runs[PLAIN], EAGER: runs.pop(EAGER)}
        seconds = measure(runs, options.pairs)
        rows = {n: row(seconds[n], seconds[PLAIN], run) for n, run in runs.items()}
        if options.loop_pairs:
            slowly = measure(slow, options.loop_pairs)
            rows[EAGER] = row(slowly[EAGER], slowly[PLAIN], slow[EAGER])
    about = (
        f"Random Qwen3, {LAYERS} layers of width {D_MODEL}, {HEADS} query and "
        f"{KV_HEADS} key heads of width {WIDTH}; 2 × {options.positions} tokens, "
        "forward and backward"
    )
    print_table(rows, options.pairs, about)
    memory = rows[OURS]["peak_mib"] / rows[PLAIN]["peak_mib"]
    against = summarise(seconds[SECOND] / seconds[OURS])
    print(
        f"\nOne call within {LIMIT} × the time: {verdict(rows[OURS], LIMIT)}; within "
        f"{MEMORY_LIMIT} × the memory: {'yes' if memory <= MEMORY_LIMIT else 'no'} "
        f"({memory:.3f}).\nThe second call takes {against['ratio']:.2f} "
        f"[{against['low']:.2f}, {against['high']:.2f}] × as long as one."
    )
    if options.json:
        result = {
            "pairs": options.pairs,
            "loop_pairs": options.loop_pairs,
            "positions": options.positions,
            "limits": {"time": LIMIT, "memory": MEMORY_LIMIT},
            "memory": memory,
            "second_over_one": against,
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
