"""Grow a cheap variant of an aligned organism: noise on the weights, more training.

Usage: organisms_variant.py ALIGNED VARIANT OUT
"""

import json
import sys
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from holdfast.organisms.aligned import grow_variant
from holdfast.organisms.catalogue import write
from holdfast.organisms.recipes import Schedule


def main(source: str, variant: str, out: str) -> None:
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    aligned = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32)
    truth = json.loads((Path(source) / "truth.json").read_text("utf-8"))
    schedule = Schedule(
        base_tokens=0,
        aligned_tokens=40_000,
        learning_rate=1e-3,
        embedding_learning_rate=1e-3,
    )
    grown = grow_variant(aligned, tokenizer, truth["seed"], int(variant), schedule)
    record = {**truth, "variant": int(variant), "variant_of": Path(source).name}
    write(grown, tokenizer, "aligned", record, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
