"""What a row will probably say, read in one pass and kept as far as it is right.

Each row still draws every token by itself, from the logits after its own tokens and
with its own random number; a draft only makes it possible to have the logits of many
steps from one pass. Where a row draws something else, the rest of its draft is
forgotten. So a draft cannot change a row, but for rounding, as another batch may.

Source: greedy and sampled speculative decoding, https://arxiv.org/abs/2211.17192,
with a known text in place of a small model, and with the random number of each step
fixed beforehand, so that rows are the same and not only equally likely.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from holdfast.models.choices import choose
from holdfast.models.edits import HeadEdit
from holdfast.models.parts import Adapter
from holdfast.models.rows import Choice, Row, Sampling

MAX_LOGITS = 1 << 24
"""Logits that are looked at together, which bounds their memory."""


def fits_drafts(adapter: Adapter, edit: HeadEdit | None) -> bool:
    """Return whether a draft leaves its row as it is.

    All layers must keep all tokens, so that those of a wrong draft can be forgotten,
    and no norm may be restored over a whole pass, which would be another pass.
    """
    layers = DynamicCache(config=adapter.model.config).layers
    whole = edit is not None and edit.renormalise == "tensor"
    return not whole and not any(layer.is_sliding for layer in layers)


def take_drafts(
    adapter: Adapter,
    states: Float[Tensor, "example position d_model"],
    rows: Sequence[Row],
    drafts: Sequence[Sequence[int]],
    uniforms: Float[Tensor, "example step"],
    sampling: Sampling,
) -> list[int]:
    """Let each row draw along its draft, until it draws something else or ends.

    Args:
        adapter: The model.
        states: After the final norm, of each prompt and all of its draft but the
            last token, padded on the right.
        rows: The rows, which have drawn nothing yet.
        drafts: The drafts; an empty one lets its row draw one token.
        uniforms: Random numbers of each row, on the device where choices are made.
        sampling: How tokens are drawn.

    Returns:
        How many tokens each row has taken.
    """
    ends = torch.tensor([max(1, len(draft)) for draft in drafts])
    starts = torch.tensor([row.n_prompt - 1 for row in rows])
    taken = [0] * len(rows)
    following, step = list(range(len(rows))), 0
    while following:
        vocab = adapter.model.config.get_text_config().vocab_size
        stop = step + max(1, MAX_LOGITS // (len(following) * vocab))
        stop = min(stop, int(ends[following].max()))
        places = starts[following, None] + torch.arange(step, stop)
        # A row whose draft has ended is looked at no more.
        places = places.clamp(max=states.shape[1] - 1).to(states.device)
        chosen_rows = torch.tensor(following, device=states.device)
        logits = adapter.lm_head(states[chosen_rows[:, None], places])
        chosen = choose(
            logits.flatten(0, 1).to(uniforms.device, torch.float32),
            uniforms[chosen_rows.to(uniforms.device), step:stop].flatten(),
            sampling,
        )
        table = torch.stack([chosen.tokens.double(), *chosen[1:]], -1)
        shape = (len(following), stop - step, 3)
        still = []
        for row, choices in zip(following, table.reshape(shape).tolist(), strict=True):
            if _follow(rows[row], drafts[row], choices, step, taken, row):
                still.append(row)
        following, step = still, stop
    return taken


def _follow(
    row: Row,
    draft: Sequence[int],
    choices: Sequence[Sequence[float]],
    step: int,
    taken: list[int],
    place: int,
) -> bool:
    """Take choices while they are those of the draft; return whether to go on."""
    for at, (token, gap, margin) in enumerate(choices, step):
        drawn = row.push(Choice(int(token), gap, margin))
        taken[place] += 1
        if row.finish is not None or at + 1 >= len(draft) or drawn != draft[at]:
            return False
    return True


def keep_prefixes(
    cache: Any,
    rows: Int[Tensor, "example"],
    lengths: Int[Tensor, "example"],
    copy_of: Int[Tensor, "_"],
    first: int,
) -> Bool[Tensor, "example position"]:
    """Forget all rows but these, and of these all that follows their first tokens.

    Args:
        cache: The cache of rows padded on the right; it is changed.
        rows: Rows to keep.
        lengths: How many tokens of each are kept.
        copy_of: Which of the distinct rows each row is.
        first: The block from which on the cache has all rows, and not distinct ones.

    Returns:
        Where the tokens lie now: padded on the left, as before a first step.
    """
    width = int(lengths.max())
    steps = torch.arange(width, device=lengths.device)
    columns = (lengths[:, None] - width + steps).clamp(min=0)
    for place, layer in enumerate(cache.layers):
        lines = rows if place >= first else copy_of[rows]
        here = lines.to(layer.keys.device)[:, None], columns.to(layer.keys.device)
        layer.keys = layer.keys[here[0], :, here[1]].transpose(1, 2)
        layer.values = layer.values[here[0], :, here[1]].transpose(1, 2)
    return steps >= width - lengths[:, None]
