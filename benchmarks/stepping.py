"""What the step-wise signal costs while a model decodes, beside decoding without it.

A random model of 12 layers and width 768 answers 8 prompts in 32 steps, by denoising
masks and left to right. Every variant runs once in each round, in an order that
rotates, and is divided by plain decoding in the same round. Time is CPU time of the
process. The row "again" is the noise: a difference smaller than its interval is not
resolved, and there the count of FLOPs decides.

A guard model is timed beside it: it reads its policy, the prompt and the finished
response, and writes five tokens. It has the shape of the model that decodes, since the
guards that are used are about as large as the models they guard.

    python benchmarks/stepping.py --pairs 30 --json stepping.json
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import measure, one_thread, peak_bytes, summarise, verdict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.flop_counter import FlopCounterMode

from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.decoding.steps import Pooled, StepView
from holdfast.models.diffusion.denoise import denoise
from holdfast.models.diffusion.unmasking import UnmaskingSchedule
from holdfast.models.loading.causal import adapt
from holdfast.models.loading.masked import adapt_masked
from holdfast.models.model import Adapter, MaskedModel

N_EXAMPLES, N_STEPS, VOCAB, MASK = 8, 32, 16_384, 2
TIME_LIMIT, FLOP_LIMIT, MEMORY_LIMIT = 1.02, 1.005, 1.01
GUARD_POLICY, GUARD_TOKENS = 256, 5
PLAIN, AGAIN = "decoding", "decoding again (the noise)"
POOLED, SIGNAL = "with the pooled states kept", "with the signal"
GUARD = "a guard model's call on the responses"


def random_model(**changes: Any) -> Any:
    """Build the model that every variant runs."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        eos_token_id=1,
        attn_implementation="sdpa",
        **changes,
    )
    return transformers.Qwen3ForCausalLM(config).eval()


def small_tokenizer() -> Any:
    """Build a tokenizer with a chat template, which no variant times."""
    words = Tokenizer(WordLevel({"a": 0, "<|end|>": 1, "<|mask|>": MASK}, "a"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|end|>", mask_token="<|mask|>"
    )
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


class Signal:
    """Compliance against a pair of anchors at each step, in float32."""

    def __init__(self, anchors: torch.Tensor) -> None:
        self.anchors = torch.nn.functional.normalize(anchors, dim=-1)
        self.pooled = Pooled("committed")

    def __call__(self, look: StepView) -> torch.Tensor:
        """Return one number a row."""
        states = torch.nn.functional.normalize(self.pooled(look), dim=-1)
        away = 1 - states @ self.anchors[look.step].T + 1e-8
        return torch.sigmoid((away[:, 1].log() - away[:, 0].log()) / 0.1)


def guard_call(model: Any, prompts: list[Any], length: int) -> Callable[[], Any]:
    """Return a run of the guard: one prefill of all it reads, then five tokens."""
    generator = torch.Generator().manual_seed(3)
    width = GUARD_POLICY + len(prompts[0][0]) + length
    ids = torch.randint(3, VOCAB, (len(prompts), width), generator=generator)

    def run() -> Any:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=GUARD_TOKENS,
            max_new_tokens=GUARD_TOKENS,
            pad_token_id=1,
        )

    return run


def variants(kind: str, length: int, n_prompt: int) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name; each decodes one batch of the same prompts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (N_EXAMPLES, n_prompt), generator=generator)
    prompts = [(row, seed) for seed, row in enumerate(ids.tolist())]
    anchors = torch.randn(N_STEPS, 2, 768, generator=generator)
    run: Callable[..., Any]
    if kind == "diffusion":
        run = partial(_denoise, _masked(), prompts, length)
    else:
        run = partial(_decode, _adapter(), prompts)
    return {
        PLAIN: run,
        AGAIN: run,
        POOLED: lambda: run(observe=Pooled("committed")),
        SIGNAL: lambda: run(observe=Signal(anchors)),
        GUARD: guard_call(random_model(), prompts, length),
    }


def _masked() -> MaskedModel:
    return adapt_masked(random_model(is_causal=False), small_tokenizer())


def _adapter() -> Adapter:
    return adapt(random_model(), small_tokenizer())


def _denoise(masked: Any, prompts: Any, length: int, observe: Any = None) -> Any:
    sampler = UnmaskingSchedule(gen_length=length, steps=N_STEPS)
    return list(
        denoise(masked, prompts, sampler, batch_size=N_EXAMPLES, observe=observe)
    )


def _decode(adapter: Any, prompts: Any, observe: Any = None) -> Any:
    # No stop token: every row takes all steps, whatever it says.
    sampling = Sampling(temperature=0, max_thinking=0, max_answer=N_STEPS)
    return list(
        generate(
            adapter,
            prompts,
            sampling,
            batch_size=N_EXAMPLES,
            stop_ids=[VOCAB],
            observe=observe,
        )
    )


def flops(run: Callable[[], Any]) -> int:
    """Return the FLOPs of matrix products and attention in one run."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def table(runs: dict[str, Callable[[], Any]], pairs: int) -> dict[str, Any]:
    """Time the runs, and count what they compute and hold."""
    seconds = measure(runs, pairs)
    counted = {name: flops(run) for name, run in runs.items()}
    held = {name: peak_bytes(run) for name, run in runs.items()}
    return {
        name: {
            **summarise(seconds[name] / seconds[PLAIN]),
            "seconds": float(sorted(seconds[name])[len(seconds[name]) // 2]),
            "flops": counted[name] / counted[PLAIN],
            "memory": held[name] / held[PLAIN],
        }
        for name in runs
    }


def print_rows(kind: str, rows: dict[str, Any], options: argparse.Namespace) -> None:
    print(
        f"\n{kind}: random Qwen3, 12 layers of width 768; {N_EXAMPLES} rows, "
        f"{N_STEPS} steps, {options.prompt} + {options.response} tokens, float32, one "
        f"thread; {options.pairs} rounds; torch {torch.__version__}, "
        f"transformers {transformers.__version__}.\n"
    )
    print(
        "| variant | CPU time ÷ decoding [95 %] | seconds | FLOPs ÷ | peak tensors ÷ |"
    )
    print("|---|---|---|---|---|")
    for name, line in rows.items():
        print(
            f"| {name} | {line['ratio']:.3f} [{line['low']:.3f}, {line['high']:.3f}] "
            f"| {line['seconds']:.2f} | {line['flops']:.5f} | {line['memory']:.4f} |"
        )
    signal = rows[SIGNAL]
    dearer = rows[GUARD]["flops"] / max(signal["flops"] - 1, 1e-9)
    flops_hold = "yes" if signal["flops"] <= FLOP_LIMIT else "no"
    memory_holds = "yes" if signal["memory"] <= MEMORY_LIMIT else "no"
    print(
        f"\nTime within {TIME_LIMIT} ×: {verdict(signal, TIME_LIMIT)}; FLOPs within "
        f"{FLOP_LIMIT} ×: {flops_hold}; memory within {MEMORY_LIMIT} ×: "
        f"{memory_holds}. The guard's call takes {dearer:,.0f} times the FLOPs of "
        "the signal."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30, help="rounds (30 or more)")
    parser.add_argument("--kind", choices=("diffusion", "autoregressive", "both"))
    parser.add_argument("--response", type=int, default=32, help="tokens, 32 or more")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.set_defaults(kind="both")
    options = parser.parse_args()
    kinds = ("diffusion", "autoregressive")
    result: dict[str, Any] = {"pairs": options.pairs}
    for kind in kinds if options.kind == "both" else (options.kind,):
        with one_thread():
            length = options.response if kind == "diffusion" else N_STEPS
            runs = variants(kind, length, options.prompt)
            result[kind] = table(runs, options.pairs)
        print_rows(kind, result[kind], options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
