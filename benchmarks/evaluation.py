"""CPU time of an evaluation against a bare batched generate loop on the same prompts.

Run as `python benchmarks/evaluation.py` on a quiet machine; `--prompts 28 --rounds 1`
is a smoke test. Every round runs both, in an order that rotates, on one thread; ratios
are taken within a round. Loading and proving the model is in neither.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from measure import measure, one_thread, summarise, verdict

from holdfast.data.chat.template import prompt_token_ids
from holdfast.evaluate import stage
from holdfast.evaluate.items import gather_items
from holdfast.evaluate.settings import EvaluateSettings
from holdfast.judges.settings import JudgeSettings
from holdfast.models.model import Adapter
from holdfast.rollout.session import Session
from holdfast.study import Study

TOKENS = 32
BATCH = 32
LIMIT = 1.3
CONDITIONS = 14
"""Prompts a request: twelve harmful conditions, lookalikes and benign ones."""


class Kept(Session):
    """A session that keeps its model, so that loading is measured nowhere."""

    def release(self) -> None:
        """Keep it."""


def bare(adapter: Adapter, sequences: list[tuple[int, ...]]) -> None:
    """Decode every prompt with the model's own generate, at most 32 tokens each."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    pad = adapter.tokenizer.pad_token_id or 0
    with torch.inference_mode():
        for first in range(0, len(order), BATCH):
            rows = [sequences[i] for i in order[first : first + BATCH]]
            width = max(map(len, rows))
            ids = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows])
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
            out = adapter.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=TOKENS,
                do_sample=False,
                pad_token_id=pad,
            )
            adapter.tokenizer.batch_decode(out[:, width:])


def ours(settings: EvaluateSettings, session: Session) -> None:
    """Run a whole evaluation: suites, prompts, answers, rules, tables, figures."""
    with tempfile.TemporaryDirectory() as folder:
        study = Study.create(Path(folder) / "study")
        stage.run(study, settings, JudgeSettings(), session)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="organism:cliff")
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=20)
    return parser.parse_args()


def main() -> None:
    """Print the CPU seconds of both in every round, and their ratio."""
    given = arguments()
    session = Kept(given.model)
    adapter = session.adapter
    # Both decode exactly the same number of tokens at most: thinking is closed at once.
    settings = EvaluateSettings(
        limit=-(-given.prompts // CONDITIONS), max_thinking=0, max_answer=TOKENS
    )
    items = gather_items(settings).items
    sequences = [
        prompt_token_ids(
            adapter.tokenizer,
            item.prompt.text,
            system_prompt=None,
            thinking=adapter.thinking,
        )
        for item in items
    ]
    print(f"{given.model}: {len(items)} prompts × {TOKENS} tokens, batches of {BATCH}")
    with one_thread():
        seconds = measure(
            {
                "bare": lambda: bare(adapter, sequences),
                "evaluation": lambda: ours(settings, session),
            },
            given.rounds,
        )
    ratios = seconds["evaluation"] / seconds["bare"]
    for plain, whole, ratio in zip(*seconds.values(), ratios, strict=True):
        print(f"bare {plain:.2f} s, evaluation {whole:.2f} s, ratio {ratio:.3f}")
    found = summarise(ratios)
    print(
        f"CPU time ÷ bare: {found['ratio']:.3f} [{found['low']:.3f}, "
        f"{found['high']:.3f}], from {ratios.min():.3f} to {ratios.max():.3f} in "
        f"{given.rounds} rounds; at most {LIMIT}: {verdict(found, LIMIT)}"
    )


if __name__ == "__main__":
    main()
