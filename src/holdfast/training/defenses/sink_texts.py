"""Random text in place of answers."""

from collections.abc import Sequence
from typing import Any

import torch

from holdfast.training.targets import Example


def chance_texts(
    rows: Sequence[Example], tokenizer: Any, seed: int
) -> tuple[Example, ...]:
    """Return rows whose answers are random tokens, as many as there were.

    Args:
        rows: Rows with answers; the last token of each ends the answer, and stays.
        tokenizer: Tokenizer of the model; its control tokens are never drawn.
        seed: Seed.
    """
    control = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    plain = torch.tensor(sorted(set(range(len(tokenizer))) - control))
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in rows:
        n = len(row.input_ids) - 1 - row.answer
        drawn = torch.randint(len(plain), (n,), generator=generator)
        ids = (
            *row.input_ids[: row.answer],
            *plain[drawn].tolist(),
            row.input_ids[-1],
        )
        made.append(Example(ids, row.labels, row.answer))
    return tuple(made)
