"""One response of a masked-diffusion model as a grid of steps and positions."""

from typing import Any

import torch

from holdfast.data.conversation import ChatTokenizer, token_texts
from holdfast.models.rows import Drafting
from holdfast.session.rows import Rollout
from holdfast.session.signal_denoising import step_indices
from holdfast.session.signal_reading import LOGIT, TEXT
from holdfast.session.signal_records import Read
from holdfast.session.signal_settings import SignalSettings

MOST_POSITIONS = 48
"""Positions of a response that a grid shows, from its beginning."""

OPEN, FRESH, KEPT = "open", "fresh", "kept"


def drafted(
    read: Read,
    row: Rollout,
    how: Drafting,
    settings: SignalSettings,
    tokenizer: ChatTokenizer,
) -> dict[str, Any]:
    """Return the steps of a response, and what stood where at each of them.

    Args:
        read: What was read.
        row: The row.
        how: How it came about.
        settings: Steps, and what a step is.
        tokenizer: For the text of the tokens.

    Returns:
        `steps`: the signal, the text-level signal and the text that was committed to.
        `words`: the response token by token, each with the step at which it was.
        `grid`: for each step the text at each position, and whether it was only
        predicted (`open`), committed to at this step (`fresh`) or before (`kept`).
    """
    end = min(len(row.token_ids) - row.spans.answer[0], MOST_POSITIONS)
    indices = step_indices(how, settings).tolist()
    n_steps = 1 + indices.index(indices[-1])
    compliance = torch.sigmoid(read.of(LOGIT, [row])[0]).tolist()[:n_steps]
    said = read.of(TEXT, [row])[0].tolist()[:n_steps]
    grid, steps, before = [], [], -1
    for place, index in enumerate(indices[:n_steps]):
        texts = token_texts(tokenizer, how.drafts[index][:end])
        states = [
            OPEN if at > index else FRESH if at > before else KEPT
            for at in how.committed_at[:end]
        ]
        grid.append([list(cell) for cell in zip(texts, states, strict=True)])
        fresh = [
            text for text, state in zip(texts, states, strict=True) if state == FRESH
        ]
        steps.append(
            {
                "text": "".join(fresh),
                "compliance": round(compliance[place], 4),
                "text_signal": said[place],
            }
        )
        before = index
    final = token_texts(tokenizer, how.response[:end])
    # A token that a cut series never reaches has the tone of the last step.
    found = [
        next(
            (i for i, index in enumerate(indices[:n_steps]) if index >= at), n_steps - 1
        )
        for at in how.committed_at[:end]
    ]
    words = [list(pair) for pair in zip(final, found, strict=True)]
    return {"steps": steps, "words": words, "grid": grid}
